"""How many answers were right: the JSON object of a run and its table. No jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bailing_jax.evaluation.intervals import wilson
from bailing_jax.evaluation.problems import distance_bucket

if TYPE_CHECKING:
    from bailing_jax.evaluation.answering import Answered, Run

_TABLES = {"num_steps": ("by_steps", "steps"), "distance": ("by_distance", "distance")}


def summary(run: Run, measure: str | None) -> dict[str, Any]:
    """What a run found, as JSON has it.

    Args:
        run: at least one answered problem.
        measure: what the table is by (see `Task.measure`).
    """
    answered = run.answered
    output_tokens = sum(len(answer.tokens) for answer in answered)
    return {
        **_share(answered),
        **({} if measure is None else {_TABLES[measure][0]: _table(answered, measure)}),
        "truncated": sum(answer.finish_reason == "length" for answer in answered),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answered),
        "output_tokens": output_tokens,
        "seconds": round(run.seconds, 3),
        "tokens_per_s": round(output_tokens / run.seconds, 2),
    }


def as_text(task: str, found: Mapping[str, Any], measure: str | None) -> str:
    """The same to be read."""
    low, high = found["ci95"]
    lines = [
        f"{task}: {found['correct']} of {found['num']} correct, {found['accuracy']:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%})"
    ]
    if measure is not None:
        table, heading = _TABLES[measure]
        lines.append(f"{heading:<12}{'problems':>10}{'correct':>10}{'accuracy':>10}")
        lines += [
            f"{name:<12}{row['num']:>10}{row['correct']:>10}{row['accuracy']:>10.1%}"
            for name, row in found[table].items()
        ]
    if found["truncated"]:
        lines.append(f"cut by --max-tokens or --max-model-len: {found['truncated']}")
    lines.append(
        f"prompts {found['prompt_tokens']} tokens, answers {found['output_tokens']} tokens in "
        f"{found['seconds']:.1f} s: {found['tokens_per_s']:.1f} tokens/s"
    )
    return "\n".join(lines)


def _share(answered: Sequence[Answered]) -> dict[str, Any]:
    num, correct = len(answered), sum(answer.is_correct for answer in answered)
    return {
        "num": num,
        "correct": correct,
        "accuracy": round(correct / num, 6),
        "ci95": [round(end, 6) for end in wilson(correct, num)],
    }


def _table(answered: Sequence[Answered], measure: str) -> dict[str, dict[str, Any]]:
    """A share for each number of steps, or for each bucket of distances, ascending."""
    groups: dict[tuple[int, int], list[Answered]] = {}
    for answer in answered:
        value = answer.problem.measure
        if value is None:
            raise ValueError(f"problem {answer.problem.index} has no {measure}")
        key = distance_bucket(value) if measure == "distance" else (value, value)
        groups.setdefault(key, []).append(answer)
    return {
        str(low) if low == high else f"{low}-{high}": _share(groups[low, high])
        for low, high in sorted(groups)
    }
