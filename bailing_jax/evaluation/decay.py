"""Which decay layer offset was a model trained with? What the likelihood of a text says.

The weights are scored under both offsets on the same windows, and the difference is taken window
by window: what makes one text harder than another cancels. The offset of training predicts
better. But so does, on a text unlike those of training, whichever offset happens to suit it, such
as the one that forgets faster where unrelated pieces follow one another. So the offset that leads
must also beat its neighbour on the other side (-1 or 2), with which nobody trains: the likelihood
has to be best there, not just better than at the rival. Where a 95 % interval holds zero, or there
are too few windows to have an interval worth the name, nothing is claimed. No jax, no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bailing_jax.evaluation.intervals import Estimate, mean_a_token

MIN_WINDOWS = 8
Nll = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Control:
    """How the leading offset does beside its neighbour away from its rival.

    Attributes:
        offset: -1 or 2.
        difference: of the negative log likelihood a token, that offset minus the leader.
    """

    offset: int
    difference: Estimate


@dataclass(frozen=True)
class Verdict:
    """What the likelihoods say.

    Attributes:
        difference: of the negative log likelihood a token, offset 1 minus offset 0.
        control: None where neither offset leads.
        offset: 0 or 1; None: undecided.
        text: the sentence.
    """

    difference: Estimate
    control: Control | None
    offset: int | None
    text: str


def control_offset(nll: Nll, tokens: Sequence[int]) -> int | None:
    """The further offset that `judge` wants scored; None: it would say nothing anyway."""
    difference = _difference(nll, tokens, 1, 0)
    if len(tokens) < MIN_WINDOWS or difference.low <= 0 <= difference.high:
        return None
    return -1 if difference.mean > 0 else 2


def judge(nll: Nll, tokens: Sequence[int]) -> Verdict:
    """Compare the offsets.

    Args:
        nll: of offsets 0, 1 and `control_offset`, the sum of negative log likelihoods of each
            window.
        tokens: of each window that were scored.
    """
    difference = _difference(nll, tokens, 1, 0)
    beyond = control_offset(nll, tokens)
    if len(tokens) < MIN_WINDOWS:
        windows = "1 window" if len(tokens) == 1 else f"{len(tokens)} windows"
        text = f"undecided: too little text ({windows}; at least {MIN_WINDOWS} are needed)"
        return Verdict(difference, None, None, text)
    if beyond is None:
        text = "undecided: the 95 % interval of the difference holds zero; more text may decide"
        return Verdict(difference, None, None, text)
    leader = 0 if beyond == -1 else 1
    control = Control(beyond, _difference(nll, tokens, beyond, leader))
    if control.difference.low > 0:
        text = f"these weights were trained with decay_layer_offset {leader}"
        return Verdict(difference, control, leader, text)
    if control.difference.high < 0:
        rest = f"but {beyond} does better still: the text is unlike those of training"
    else:
        rest = f"but not surely better than {beyond}; more text may decide"
    text = f"undecided: {leader} does better than {1 - leader}, {rest}"
    return Verdict(difference, control, None, text)


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
    difference, control = verdict.difference, verdict.control
    return {
        "difference": difference.mean,
        "difference_ci95": interval(difference),
        "control": None
        if control is None
        else {
            "offset": control.offset,
            "difference": control.difference.mean,
            "difference_ci95": interval(control.difference),
        },
        "trained_offset": verdict.offset,
        "verdict": verdict.text,
    }


def interval(estimate: Estimate) -> list[float] | None:
    """The interval's ends as JSON has them; None for a single window's, which are infinite."""
    is_infinite = estimate.high - estimate.low == float("inf")
    return None if is_infinite else [estimate.low, estimate.high]


def _difference(nll: Nll, tokens: Sequence[int], one: int, other: int) -> Estimate:
    return mean_a_token([a - b for a, b in zip(nll[one], nll[other], strict=True)], tokens)
