"""One process of a job: the real command with an engine that costs nothing.

In each step stands a collective over the devices of all processes (gloo), as in a sharded model's.
The first argument is how long the others may take to come, in seconds.
"""

from __future__ import annotations

import faulthandler
import functools
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEP_S = 0.02
LIMIT_S = 240


def main() -> int:
    """Run the command with another engine."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    sys.path.insert(0, str(HERE))
    from bailing_jax import distributed, generate

    generate._Engine = Engine  # pyright: ignore
    distributed.join = functools.partial(distributed.join, wait_s=float(sys.argv[1]))
    return generate.main(sys.argv[2:])


class Engine:
    """In place of the command's own."""

    def __init__(self, _args: Any, say: Any, check_limits: Any) -> None:
        from fake_engine import FakeEngine

        together = collective()
        together()

        def fault(_engine: FakeEngine) -> None:
            time.sleep(STEP_S)
            together()

        self.llm, self.prompts = FakeEngine(fault), None
        check_limits(self.llm.limits)
        say("loaded")

    def close(self) -> None:
        """Nothing to put in order."""


def collective() -> Any:
    """A function that adds up over the devices of all processes, and waits for the sum."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",))
    row = np.arange(jax.device_count(), dtype=np.float32)
    shared = jax.make_array_from_callback(
        row.shape, NamedSharding(mesh, PartitionSpec("all")), lambda index: row[index]
    )
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def together() -> None:
        if float(add(shared)) != row.sum():
            raise RuntimeError("the sum over all devices is wrong")

    return together


if __name__ == "__main__":
    sys.exit(main())
