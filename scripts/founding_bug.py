"""The founding bug, planted in a copy of the package, beside the healthy one.

A step holds decode rows first, then prompt rows. An engine that was ported from one with prompts
first, and went on slicing its decode rows and decode slots behind them, answers well alone and
rots in company: nothing crashes, and a step without prompts is right. This plants that bug (the
product holds no switch for it) and asks both packages the same word problems, one at a time and
32 at once on the same engine, as `python -m bailing_jax.evaluate` does. Takes a little more than a
minute on two idle cores.

    python scripts/founding_bug.py
    python scripts/founding_bug.py --num 200 --seed 3 --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from planting import PACKAGES, copy_of_project, plant, read_bugs

FOUNDING = ("founding-rows", "founding-slots")
CONCURRENCY = 32
# More problems than places, so that prompts keep joining answers under way.
NUM, QUICK_NUM = 40, 6
QUICK_CONCURRENCY = 4
# Alone, the planted package is right, which a dozen show. In exact mode a step has all 32 rows
# whoever is there: a problem alone takes as long as 32.
NUM_ALONE_PLANTED, NUM_ALONE_EXACT = 12, 6
SHOWN, SHOWN_LINES = 2, 8
WORKER = Path(__file__).resolve().parent / "founding_bug_worker.py"
_TAKEN = ("num", "correct", "accuracy", "ci95", "truncated", "seconds", "tokens_per_s")


@dataclass(frozen=True)
class Job:
    """One way of asking one package."""

    package: str
    concurrency: int
    exact: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        mode = ", exact mode" if self.exact else ""
        return f"{self.package}, {self.concurrency} at once{mode}"


@dataclass(frozen=True)
class Result:
    """What a run found: its figures and its answers by problem, or why it failed."""

    job: Job
    found: dict[str, Any]
    answers: list[dict[str, Any]]
    error: str = ""


def main() -> int:
    args = _arguments()
    num, company = (QUICK_NUM, QUICK_CONCURRENCY) if args.quick else (args.num, CONCURRENCY)
    start = time.perf_counter()
    with (
        copy_of_project(PACKAGES) as healthy,
        copy_of_project(PACKAGES) as planted,
        TemporaryDirectory(prefix="programs-") as cache,
    ):
        for bug in read_bugs():
            if bug.id in FOUNDING:
                plant(bug, planted)
        ask = Asking(num, company, args.seed, Path(cache))
        _say(f"{num} word problems, one at a time and {company} at once")
        with ThreadPoolExecutor(3) as pool:
            # Programs are found again by what they compute, and those that only decode compute
            # the same in both packages: the planted one waits until they are there.
            compiled = threading.Event()

            def ask_planted() -> list[Result]:
                compiled.wait()
                return ask.package("planted", planted, _nothing)

            runs = [
                pool.submit(ask.package, "healthy", healthy, compiled.set),
                pool.submit(ask.package, "healthy", healthy, _nothing, exact=True),
                pool.submit(ask_planted),
            ]
            found = [result for run in runs for result in run.result()]
    exact = [result for result in found if result.job.exact]
    results = [result for result in found if not result.job.exact]
    results.sort(key=lambda result: result.job.concurrency)
    report = _report([*results, *exact], time.perf_counter() - start, args.seed)
    if args.json:
        print(json.dumps(report))
    else:
        print(_as_text(report, results, company))
    return 1 if report["errors"] else 0


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--num", type=int, default=NUM, help=f"problems (default: {NUM})")
    p.add_argument("--seed", type=int, default=0, help="of the held-out problems")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    p.add_argument(
        "--quick", action="store_true",
        help=f"{QUICK_NUM} problems, {QUICK_CONCURRENCY} at once: shows that it runs",
    )  # fmt: skip
    args = p.parse_args()
    if args.num < 1:
        p.error("--num: at least 1")
    return args


@dataclass(frozen=True)
class Asking:
    """The same questions for each package.

    Attributes:
        num: problems.
        company: how many of them at once.
        seed: of the problems.
        cache: where compiled programs are kept.
    """

    num: int
    company: int
    seed: int
    cache: Path

    def package(
        self, name: str, folder: Path, on_compiled: Callable[[], None], *, exact: bool = False
    ) -> list[Result]:
        """Ask one package; `on_compiled` is called once, by the end at the latest."""
        jobs = [Job(name, count, exact) for count in (1, self.company)]
        most = NUM_ALONE_PLANTED if name == "planted" else self.num
        num_alone = min(self.num, NUM_ALONE_EXACT if exact else most)
        arguments = [
            "--num", str(self.num), "--num-alone", str(num_alone), "--company", str(self.company),
            "--seed", str(self.seed), "--compile-cache", str(self.cache),
            *["--exact"] * exact,
        ]  # fmt: skip
        try:
            found, error = _python(folder, [str(WORKER), *arguments], on_compiled)
        finally:
            on_compiled()
        if error:
            return [Result(job, {}, [], error) for job in jobs]
        _say(f"{name}{', exact mode' * exact}: done")
        parts = (found["alone"], found["together"])
        return [Result(job, **part) for job, part in zip(jobs, parts, strict=True)]


def _python(
    package: Path, arguments: Sequence[str], on_compiled: Callable[[], None]
) -> tuple[dict[str, Any], str]:
    """What the worker prints, or the end of its complaint; its `bailing_jax` is this folder's."""
    # Debug mode would end the planted run at its second step instead of letting it rot.
    environment = {**os.environ, "PYTHONPATH": str(package), "BAILING_DEBUG": "0"}
    with (
        TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, *arguments], cwd=package, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line
            if line == "compiled\n":
                on_compiled()
        if process.wait():
            errors.seek(0)
            return {}, errors.read().strip()[-400:] or f"exit {process.returncode}"
    return json.loads(last), ""


def _report(results: Sequence[Result], seconds: float, seed: int) -> dict[str, Any]:
    """Everything found, as JSON has it."""
    alone = {result.job.exact: result for result in results
             if result.job.package == "healthy" and result.job.concurrency == 1}  # fmt: skip
    runs = []
    for result in results:
        job = result.job
        reference = alone.get(job.exact)
        runs.append(
            {
                "package": job.package,
                "concurrency": job.concurrency,
                "exact": job.exact,
                **{key: result.found.get(key) for key in _TAKEN},
                "same_as_alone": _same(result, reference),
                "compared": _compared(result, reference),
                "error": result.error or None,
            }
        )
    return {
        "seed": seed,
        "runs": runs,
        "errors": sum(bool(result.error) for result in results),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),
    }


def _compared(result: Result, alone: Result | None) -> int | None:
    """How many problems the healthy package was asked one at a time, and this one too."""
    if alone is None or not alone.answers or not result.answers:
        return None
    return min(len(alone.answers), len(result.answers))


def _same(result: Result, alone: Result | None) -> int | None:
    """How many of these have the same answer."""
    if alone is None or _compared(result, alone) is None:
        return None
    pairs = zip(result.answers, alone.answers, strict=False)
    return sum(one["tokens"] == other["tokens"] for one, other in pairs)


def _as_text(report: dict[str, Any], results: Sequence[Result], company: int) -> str:
    lines = [f"{'':<34}{'right':>10}  {'accuracy, 95 % interval':<26}{'as alone':>9}"]
    for run in report["runs"]:
        name = Job(run["package"], run["concurrency"], run["exact"]).name
        if run["error"]:
            lines.append(f"{name:<34}failed: {run['error']}")
            continue
        low, high = run["ci95"]
        right = f"{run['correct']}/{run['num']}"
        share = f"{run['accuracy']:.1%}  ({low:.1%} to {high:.1%})"
        same = "-"
        if run["same_as_alone"] is not None:
            same = f"{run['same_as_alone']}/{run['compared']}"
        lines.append(f"{name:<34}{right:>10}  {share:<26}{same:>9}")
    answers = {(r.job.package, r.job.concurrency): r.answers for r in results}
    for pair in _shown(answers["healthy", company], answers["planted", company]):
        lines += ["", *_side_by_side(*pair)]
    took = f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} s of CPU time"
    return "\n".join([*lines, "", took])


def _shown(
    healthy: Sequence[dict[str, Any]], planted: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Short problems that only the healthy package gets right; the longest good starts first."""
    pairs = [
        (good, bad)
        for good, bad in zip(healthy, planted, strict=False)
        if good["correct"] and not bad["correct"]
        and len(good["answer"].splitlines()) <= SHOWN_LINES
    ]  # fmt: skip

    def common_start(pair: tuple[dict[str, Any], dict[str, Any]]) -> int:
        letters = zip(pair[0]["answer"], pair[1]["answer"], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], letters))

    return sorted(pairs, key=common_start, reverse=True)[:SHOWN]


def _side_by_side(good: dict[str, Any], bad: dict[str, Any]) -> list[str]:
    """The same problem's two answers, a column each."""
    columns = [_cut(answer["answer"]) for answer in (good, bad)]
    width = max(map(len, columns[0])) + 4
    rows = max(map(len, columns))
    left, right = ([*c, *[""] * (rows - len(c))] for c in columns)
    return [
        f"problem {good['index']}: {good['prompt']}",
        "",
        f"{'healthy':<{width}}planted",
        *(f"{a:<{width}}{b}".rstrip() for a, b in zip(left, right, strict=True)),
    ]


def _cut(answer: str) -> list[str]:
    """The first lines of an answer, each short enough for half a screen."""
    lines = answer.splitlines()
    shown = [line if len(line) <= 60 else line[:57] + "..." for line in lines[:SHOWN_LINES]]
    return [*shown, "..."] if len(lines) > SHOWN_LINES else shown


def _nothing() -> None:
    pass


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
