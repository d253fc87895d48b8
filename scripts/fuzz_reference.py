"""Compare the model with the float64 reference on random configs, as many as time allows.

The test suite does the same with a handful of configs; this is the long form. Every config draws
an architecture and its irregularities, writes a random checkpoint, runs three requests in one
schedule and compares every row. A failure prints the example that reproduces it.

    python scripts/fuzz_reference.py --examples 200 --seed 1
    python scripts/fuzz_reference.py --quick
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
# The root comes before it: tests/ has folders named like the packages they test.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bailing_jax  # noqa: F401  (before jax: sets the CPU scheduler)

# isort: split
import jax
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from random_checkpoints import draw_config
from test_against_reference import check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="3 examples")
    args = parser.parse_args()
    examples = 3 if args.quick else args.examples
    start, seen = time.perf_counter(), dict[str, int]()

    @seed(args.seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(config=draw_config(), number=st.integers(0, 2**31 - 1))
    def run(config: dict[str, Any], number: int) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(Path(folder), config, number)
        name = config["architectures"][0]
        seen[name] = seen.get(name, 0) + 1
        # Each example compiles programs of its own that no other uses.
        jax.clear_caches()

    run()
    counts = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()))
    print(f"agreed: {counts}; seed {args.seed}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
