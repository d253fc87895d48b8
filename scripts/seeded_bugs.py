"""Plant known bugs one at a time, each in a copy of the project, and see whether tests notice.

Each bug of tests/seeded_bugs/ names the tests expected to fail. A bug is killed when one of them
fails, survives when all pass, and is an error when it can't be planted or its tests can't be run.

    python scripts/seeded_bugs.py                      all, against the tests each names
    python scripts/seeded_bugs.py --ids founding-rows founding-slots
    python scripts/seeded_bugs.py --each               and each test named must notice it alone
    python scripts/seeded_bugs.py --all --ids ...      against the whole fast suite
    python scripts/seeded_bugs.py --record             and write docs/seeded_bugs.md

Exit code 0 when every bug was killed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from planting import ROOT, Bug, PlantingError, copy_of_project, plant, read_bugs

# One of each kind whose tests are quick: batch order, slots, padding, chunks, ledgers.
QUICK = ("founding-slots", "fresh-by-mask", "pads-decay", "carry-lost", "stale-handle-frees")
RECORD = ROOT / "docs" / "seeded_bugs.md"
FAST_SUITE = ("-m", "not gpu and not slow", "tests")
LIMIT_S = 900
_PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--timeout=300", "-rfE", "--tb=line")
_FAILED = re.compile(r"^FAILED (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What became of a bug: "killed", "survived" or "error", by which test, and in how long."""

    bug: Bug
    verdict: str
    by: str
    seconds: float

    def in_words(self) -> str:
        """One line."""
        return f"{self.verdict:<9}{self.seconds:6.1f} s  {self.bug.id:<28}{self.by}"


def main() -> int:
    args = _arguments()
    bugs = _chosen(args)
    start = time.perf_counter()
    if args.all and not _healthy():
        print("the fast suite fails without any bug: --all would prove nothing", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = []
        for outcome in pool.map(lambda bug: _try(bug, _groups(bug, args)), bugs):
            print(outcome.in_words(), flush=True)
            outcomes.append(outcome)
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} killed in {time.perf_counter() - start:.0f} s")
    if args.record and killed == len(outcomes):
        RECORD.write_text(_table(outcomes))
        print(f"wrote {RECORD.relative_to(ROOT)}")
    return 0 if killed == len(outcomes) else 1


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ids", nargs="+", metavar="ID", help="only these")
    p.add_argument("--quick", action="store_true", help="only five whose tests are quick")
    p.add_argument("--all", action="store_true", help="run the whole fast suite on each")
    p.add_argument("--each", action="store_true", help="every test named must notice it")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="bugs at once (default: 1)")
    p.add_argument("--record", action="store_true", help="write docs/seeded_bugs.md")
    p.add_argument("--list", action="store_true", help="print the ids and what each does")
    args = p.parse_args()
    if args.record and (args.ids or args.quick or args.all):
        p.error("--record is of a run over all bugs against the tests they name")
    if args.jobs < 1:
        p.error("--jobs: at least 1")
    return args


def _chosen(args: argparse.Namespace) -> list[Bug]:
    bugs = {bug.id: bug for bug in read_bugs()}
    if args.list:
        for bug in bugs.values():
            print(f"{bug.id:<28}{' '.join(bug.rows):<16}{bug.what}")
        sys.exit(0)
    names = args.ids or (QUICK if args.quick else tuple(bugs))
    if unknown := [name for name in names if name not in bugs]:
        sys.exit(f"no such bug: {', '.join(unknown)}; --list prints them")
    return [bugs[name] for name in names]


def _groups(bug: Bug, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """What to run on it: in each group at least one test must fail."""
    if args.all:
        return [FAST_SUITE]
    return [(test,) for test in bug.tests] if args.each else [bug.tests]


def _try(bug: Bug, groups: Sequence[tuple[str, ...]]) -> Outcome:
    """Plant it and run its tests."""
    start, killers = time.perf_counter(), []

    def outcome(verdict: str, by: str) -> Outcome:
        return Outcome(bug, verdict, by, time.perf_counter() - start)

    try:
        with copy_of_project() as project:
            plant(bug, project)
            for group in groups:
                code, output = _pytest(project, group)
                found = _FAILED.search(output)
                # Only 1 means that a test ran and failed: a test that isn't there, or a module
                # that no longer imports, proves nothing about the test.
                if code == 0:
                    return outcome("survived", " ".join(group))
                if code != 1 or not found:
                    return outcome("error", f"pytest exit code {code}: {output[-600:]}")
                killers.append(found[1])
    except PlantingError as error:
        return outcome("error", str(error))
    return outcome("killed", killers[0])


def _healthy() -> bool:
    """Whether the fast suite passes in a copy without a bug."""
    with copy_of_project() as project:
        return _pytest(project, FAST_SUITE)[0] == 0


def _pytest(project: Path, what: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest in the copy, on the copy's own packages."""
    limit = None if what == FAST_SUITE else LIMIT_S
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # A test that kills may be one of those left out by default.
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", *_PYTEST, *what]
    try:
        done = subprocess.run(
            command, cwd=project, env=environment, timeout=limit, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"not done after {LIMIT_S} s"
    return done.returncode, done.stdout


def _table(outcomes: Sequence[Outcome]) -> str:
    """docs/seeded_bugs.md."""
    families = {outcome.bug.family for outcome in outcomes}
    lines = [
        "# Seeded bugs",
        "",
        f"{len(outcomes)} bugs of {len(families)} families, each planted alone in a copy of the "
        "project. The last column is the first test",
        "that failed. Written by `python scripts/seeded_bugs.py --record`; the bugs themselves "
        "are in `tests/seeded_bugs/`,",
        "the rows in [regressions.md](regressions.md).",
        "",
        "| Bug | Rows | What is wrong | Killed by | Seconds |",
        "|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        bug = outcome.bug
        by = outcome.by.removeprefix("tests/")
        lines.append(
            f"| {bug.id} | {' '.join(bug.rows)} | {bug.what} | `{by}` | {outcome.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
