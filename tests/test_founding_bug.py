"""The founding bug's script: what it reports of made-up runs, and one short real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import founding_bug
from founding_bug import Job, Result
from planting import PACKAGES, copy_of_project, plant, read_bugs

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "founding_bug.py"


def answer(index: int, text: str, correct: bool) -> dict[str, Any]:
    return {
        "index": index, "prompt": f"What is {index}?", "answer": text, "correct": correct,
        "tokens": list(text.encode()),
    }  # fmt: skip


def result(job: Job, texts: list[str]) -> Result:
    answers = [answer(i, text, text.endswith(f"#### {i}")) for i, text in enumerate(texts)]
    correct = sum(a["correct"] for a in answers)
    found = {"num": len(texts), "correct": correct, "accuracy": correct / len(texts)}
    return Result(job, {**found, "ci95": [0.1, 0.9]}, answers)


GOOD = [f"It is {i}.\nYes.\n#### {i}" for i in range(4)]
ROTTEN = [GOOD[0], "It is is\n####", "It is 2.\nYes, yes\n#### 7", "\n\n"]
RESULTS = [
    result(Job("healthy", 1), GOOD), result(Job("planted", 1), GOOD),
    result(Job("healthy", 32), GOOD), result(Job("planted", 32), ROTTEN),
]  # fmt: skip


def test_the_report_counts_answers_that_are_as_alone() -> None:
    report = founding_bug._report(RESULTS, 61.0, 5)
    assert [run["same_as_alone"] for run in report["runs"]] == [4, 4, 4, 1]
    assert [run["correct"] for run in report["runs"]] == [4, 4, 4, 1]
    assert (report["errors"], report["seed"]) == (0, 5)
    json.dumps(report)


def test_right_and_rotten_answers_stand_side_by_side() -> None:
    text = founding_bug._as_text(founding_bug._report(RESULTS, 61.0, 5), RESULTS, 32)
    # Of the three that rot, the two that begin best.
    assert [line for line in text.splitlines() if line.startswith("problem")] == [
        "problem 2: What is 2?", "problem 1: What is 1?",
    ]  # fmt: skip
    assert "#### 2      #### 7" in text


def test_the_exact_rows_are_compared_with_exact_mode_alone() -> None:
    """One at a time it is asked the first problems only; those are what counts as alike."""
    exact = [
        result(Job("healthy", 1, exact=True), ROTTEN[:2]),
        result(Job("healthy", 32, exact=True), GOOD),
    ]
    report = founding_bug._report([*RESULTS, *exact], 61.0, 5)
    assert [(run["same_as_alone"], run["compared"]) for run in report["runs"][4:]] == [
        (2, 2), (1, 2),
    ]  # fmt: skip
    assert "healthy, 32 at once, exact mode" in founding_bug._as_text(report, RESULTS, 32)


def test_a_package_asked_fewer_problems_alone_is_compared_on_those() -> None:
    few = [RESULTS[0], result(Job("planted", 1), [GOOD[0], ROTTEN[1], GOOD[2]]), *RESULTS[2:]]
    report = founding_bug._report(few, 61.0, 5)
    found = [(run["same_as_alone"], run["compared"]) for run in report["runs"]]
    assert found == [(4, 4), (2, 3), (4, 4), (1, 4)]


def test_a_run_that_fails_is_said_and_counted() -> None:
    broken = [*RESULTS[:3], Result(Job("planted", 32), {}, [], "no memory")]
    report = founding_bug._report(broken, 1.0, 0)
    assert report["errors"] == 1
    assert "failed: no memory" in founding_bug._as_text(report, broken, 32)


def test_the_swap_is_in_the_copy_only() -> None:
    before = (Path(__file__).parents[1] / "bailing_jax" / "batch.py").read_text()
    with copy_of_project(PACKAGES) as copy:
        for bug in read_bugs():
            if bug.id in founding_bug.FOUNDING:
                plant(bug, copy)
        planted = (copy / "bailing_jax" / "batch.py").read_text()
    assert planted != before
    assert not copy.exists()
    assert (Path(__file__).parents[1] / "bailing_jax" / "batch.py").read_text() == before
