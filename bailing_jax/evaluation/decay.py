"""Which decay layer offset was a model trained with? What the likelihood of a text says.

The weights are scored under both offsets on the same windows, and the difference is taken window
by window: what makes one text harder than another cancels. The offset of training predicts
better; where the 95 % interval of the difference holds zero, or there are too few windows to have
an interval worth the name, nothing is claimed. No jax, no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bailing_jax.evaluation.intervals import Estimate, mean_a_token

MIN_WINDOWS = 8


@dataclass(frozen=True)
class Verdict:
    """What two offsets' likelihoods say.

    Attributes:
        difference: of the negative log likelihood a token, offset 1 minus offset 0.
        offset: 0 or 1; None: undecided.
        text: the sentence.
    """

    difference: Estimate
    offset: int | None
    text: str


def judge(nll: Mapping[int, Sequence[float]], tokens: Sequence[int]) -> Verdict:
    """Compare the two offsets.

    Args:
        nll: of offsets 0 and 1, the sum of negative log likelihoods of each window.
        tokens: of each window that were scored.
    """
    differences = [one - zero for zero, one in zip(nll[0], nll[1], strict=True)]
    difference = mean_a_token(differences, tokens)
    if len(tokens) < MIN_WINDOWS:
        windows = "1 window" if len(tokens) == 1 else f"{len(tokens)} windows"
        return Verdict(
            difference,
            None,
            f"undecided: too little text ({windows}; at least {MIN_WINDOWS} are needed)",
        )
    if difference.low <= 0 <= difference.high:
        return Verdict(
            difference, None, "undecided: the 95 % interval of the difference holds zero"
        )
    offset = 0 if difference.mean > 0 else 1
    text = f"these weights were trained with decay_layer_offset {offset}"
    return Verdict(difference, offset, text)


def disagreement(verdict: Verdict, stated: int | None) -> str | None:
    """The warning where a verdict contradicts what the config states or implies; else None.

    Args:
        verdict: from `judge`.
        stated: the key's value in config.json; None: it has none, and 0 is in force.
    """
    if verdict.offset is None or verdict.offset == (stated or 0):
        return None
    says = "states none, so 0 is in force" if stated is None else f"states {stated}"
    override = f'{{"decay_layer_offset": {verdict.offset}}}'
    return f"config.json {says}: the text is predicted better with --hf-overrides '{override}'"


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The fields of the JSON line."""
    difference = verdict.difference
    return {
        "difference": difference.mean,
        "difference_ci95": interval(difference),
        "trained_offset": verdict.offset,
        "verdict": verdict.text,
    }


def interval(estimate: Estimate) -> list[float] | None:
    """The interval's ends as JSON has them; None for a single window's, which are infinite."""
    is_infinite = estimate.high - estimate.low == float("inf")
    return None if is_infinite else [estimate.low, estimate.high]
