"""Run random schedules of the engine, every request compared with itself alone.

    python scripts/fuzz_schedules.py --schedules 20000 --seed 1 --minutes 45
    python scripts/fuzz_schedules.py --shards 3       # an engine of several shards
    python scripts/fuzz_schedules.py --quick          # 2,000, as in CI; one in eight on two shards

Tiny models of every architecture take turns, in exact mode (tokens, log probabilities and owned
state equal bit for bit) and in normal mode (within bounds). A failure prints the schedule's seed
and a shortest list of operations that still fails. A run of at least 1,000 schedules also fails if
some pair of operations never came one after the other, or some event (requests that gave way for
pages, calls started ahead, ...) was rarer than EVENTS says.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
# The root comes before it: tests/ has folders named like the packages they test.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bailing_jax  # noqa: F401  (before jax: sets the CPU scheduler)

# isort: split
from schedules import CONFIGS, KINDS, Bench, Op, make_schedule

QUICK = 2_000
# Of a quick run's schedules, one in so many is for two shards.
QUICK_SHARE = 8
ENOUGH_FOR_COVERAGE = 1_000
# How often each must happen in a thousand schedules of several shards, and in a thousand of all, at
# least.
SHARD_EVENTS = {
    "calls of several shards": 1_000,
    "calls with an idle shard": 1_000,
    "one prefills, one does not": 500,
}
EVENTS = {
    "gave way for pages": 50,
    "preempted": 50,
    "calls started ahead": 500,
    "states compared": 5_000,
    "answers compared": 1_000,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=QUICK)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long; 0: never")
    parser.add_argument("--mode", choices=("exact", "normal", "both"), default="both")
    parser.add_argument("--architecture", choices=(*CONFIGS, "all"), default="all")
    parser.add_argument("--shards", type=int, default=1, help="of the engine (default: 1)")
    parser.add_argument("--only", help="one schedule, by the name a failure gives it")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} schedules")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    args = parser.parse_args()
    names = list(CONFIGS) if args.architecture == "all" else [args.architecture]
    modes = {"exact": (True,), "normal": (False,), "both": (True, False)}[args.mode]
    start = time.monotonic()
    if args.shards < 1:
        parser.error("--shards: at least 1")
    benches = [Bench(name, exact=exact) for name in names for exact in modes]
    several = [bench.on_shards(max(args.shards, 2)) for bench in benches]
    total = QUICK if args.quick else args.schedules
    done = 0
    for number in range(total):
        turn, place = divmod(number, len(benches))
        on_shards = args.shards > 1 or (args.quick and turn % QUICK_SHARE == QUICK_SHARE - 1)
        bench = (several if on_shards else benches)[place]
        name = f"{args.seed}/{turn}"
        if args.only is not None:
            name = args.only
        schedule = draw(bench, name)
        try:
            bench.run(schedule)
        except Exception as error:
            report(bench, name, schedule, error)
            return 1
        done += 1
        if done % 500 == 0:
            said = f"{done} schedules, {time.monotonic() - start:.0f} s"
            print(said, file=sys.stderr, flush=True)
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            break
    seconds = time.monotonic() - start
    return summary([*benches, *several], done, args.seed, seconds, as_json=args.json)


def draw(bench: Bench, name: str) -> list[Op]:
    """The schedule of a name, the same on every machine."""
    rng = random.Random(f"schedule {name} {bench.name} {bench.exact}")
    return make_schedule(rng, len(bench.pool), rng.randint(8, 40))


def report(bench: Bench, name: str, schedule: list[Op], error: Exception) -> None:
    """Say what failed, and the shortest list of operations found that fails too."""
    mode = "exact" if bench.exact else "normal"
    where = f"{bench.name}, {mode} mode, {bench.shards} shard{'s' * (bench.shards != 1)}"
    print(f"{where}, schedule {name}: {type(error).__name__}: {error}")
    least = shrink(bench, schedule)
    print(f"{len(least)} of its {len(schedule)} operations are enough:")
    for op in least:
        print(f"  {op!r},")
    chosen = f"--architecture {bench.name} --mode {mode} --shards {bench.shards}"
    print(f"  {chosen} --only {name} --schedules 1")


def shrink(bench: Bench, schedule: list[Op]) -> list[Op]:
    """Leave out operations, many at a time and then one by one, while it still fails."""
    least, size = list(schedule), len(schedule)
    while size:
        start = 0
        while start < len(least):
            shorter = least[:start] + least[start + size :]
            if fails(bench, shorter):
                least = shorter
            else:
                start += size
        size //= 2
    return least


def fails(bench: Bench, schedule: list[Op]) -> bool:
    try:
        bench.run(schedule)
    except Exception:
        return True
    return False


def summary(benches: list[Bench], done: int, seed: int, seconds: float, *, as_json: bool) -> int:
    """What was covered; the exit code."""
    counts: Counter[str] = sum((bench.counts for bench in benches), Counter())
    pairs: Counter[tuple[str, str]] = sum((bench.pairs for bench in benches), Counter())
    missing = [f"{a} then {b}" for a in KINDS for b in KINDS if not pairs[a, b]]
    on_shards = sum(bench.done for bench in benches if bench.shards > 1)
    missing += [
        f"{event} ({counts[event]} times; {least} a thousand schedules are expected)"
        for expected, schedules in ((EVENTS, done), (SHARD_EVENTS, on_shards))
        for event, least in expected.items()
        if counts[event] * 1_000 < least * schedules
    ]
    found = {
        "schedules": done,
        "on_several_shards": on_shards,
        "seed": seed,
        "seconds": round(seconds, 1),
        "counts": dict(counts),
        "rarest_pair": min(pairs.values(), default=0),
        "never": missing,
    }
    if as_json:
        print(json.dumps(found))
    else:
        print(f"{done} schedules of seed {seed} in {seconds:.0f} s, every request as it is alone")
        print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    if missing and done >= ENOUGH_FOR_COVERAGE:
        print(f"never happened, or too rarely: {', '.join(missing)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
