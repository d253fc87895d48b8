"""python -m bailing_jax.selftest: can this machine and installation be trusted with a model?

One line a check on stdout, with its time; with --json one object. Exit code 1 and the reason of
every failed check where something is wrong. Needs no checkpoint. jax is imported only after the
flags are read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, run_command


def main(argv: list[str] | None = None) -> int:
    """Parse, check; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bailing_jax.selftest",
        description="Check in seconds that this machine computes what a model needs: indexing, "
        "operators against float64, untouched neighbours, decay table, exact mode.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    return run_command(lambda: _run(as_json=args.json))


def _run(*, as_json: bool) -> int:
    start = time.perf_counter()
    from bailing_jax import runtime
    from bailing_jax.engine.selfcheck import run_checks

    results = []
    for result in run_checks():
        results.append(result)
        if not as_json:
            said = "ok" if result.problem is None else f"FAILED: {result.problem}"
            print(f"{result.name:<24} {result.seconds:6.2f} s  {said}", flush=True)
    seconds = time.perf_counter() - start
    failed = [result.name for result in results if result.problem is not None]
    if as_json:
        checks = [
            {"name": r.name, "seconds": round(r.seconds, 3), "problem": r.problem} for r in results
        ]
        found = {
            "ok": not failed,
            "platform": runtime.platform(),
            "seconds": round(seconds, 3),
            "checks": checks,
        }
        print(json.dumps(found), flush=True)
    else:
        verdict = f"FAILED: {', '.join(failed)}" if failed else "all checks passed"
        print(f"{verdict} ({runtime.platform()}, {seconds:.1f} s)", flush=True)
    return EXIT_FAILURE if failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
