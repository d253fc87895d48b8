"""One process of a job, the real command, on a host with as many bytes as argument 1 says."""

from __future__ import annotations

import sys

from bailing_jax import generate, runtime


def main() -> int:
    """Run the command with another memory."""
    num_bytes = int(sys.argv[1])
    runtime.memory_bytes = lambda *_: num_bytes
    return generate.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
