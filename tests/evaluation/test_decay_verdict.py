"""The verdict from likelihoods alone: who is named when, and when nobody is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bailing_jax.evaluation import decay

TOKENS = [100] * 12


def bowl(
    rng: np.random.Generator, best: float, depth: float = 2.0, noise: float = 1.0, num: int = 12
) -> dict[int, list[float]]:
    """Likelihoods of windows, a parabola along the offset around `best`."""
    base, slant = rng.normal(50, 10, num), rng.normal(0, noise, num)
    return {
        offset: (base + depth * (offset - best) ** 2 + slant * (offset - 0.5)).tolist()
        for offset in (-1, 0, 1, 2)
    }


@pytest.mark.parametrize("trained", [0, 1])
def test_the_offset_at_the_bottom_is_named(rng: np.random.Generator, trained: int) -> None:
    nll = bowl(rng, trained)
    beyond = {0: -1, 1: 2}[trained]
    assert decay.control_offset(nll, TOKENS) == beyond
    verdict = decay.judge(nll, TOKENS)
    assert verdict.offset == trained
    assert verdict.text == f"these weights were trained with decay_layer_offset {trained}"
    assert verdict.control is not None
    assert verdict.control.offset == beyond
    want = sum(nll[beyond]) - sum(nll[trained])
    assert verdict.control.difference.mean == pytest.approx(want / sum(TOKENS))
    assert verdict.difference.mean == pytest.approx((sum(nll[1]) - sum(nll[0])) / sum(TOKENS))


@pytest.mark.parametrize(
    ("best", "leader", "beyond"), [(3.0, 1, 2), (-2.0, 0, -1)], ids=["faster", "slower"]
)
def test_a_text_that_suits_a_further_offset_says_nothing(
    rng: np.random.Generator, best: float, leader: int, beyond: int
) -> None:
    """The trap: unrelated pieces in a row suit whatever forgets faster, whoever was trained."""
    verdict = decay.judge(bowl(rng, best), TOKENS)
    assert verdict.offset is None
    assert verdict.text == (
        f"undecided: {leader} does better than {1 - leader}, but {beyond} does better still: "
        "the text is unlike those of training"
    )


def test_equal_likelihoods_say_nothing_and_need_no_control(rng: np.random.Generator) -> None:
    nll = bowl(rng, 0.5, depth=0.1)
    assert decay.control_offset(nll, TOKENS) is None
    verdict = decay.judge({offset: nll[offset] for offset in (0, 1)}, TOKENS)
    assert (verdict.offset, verdict.control) == (None, None)
    assert verdict.text.startswith("undecided: the 95 % interval of the difference holds zero")


def test_a_leader_not_surely_better_than_its_other_neighbour_is_not_named(
    rng: np.random.Generator,
) -> None:
    nll = bowl(rng, 1.0, noise=0.1)
    nll[2] = [value + (-1) ** i for i, value in enumerate(nll[1])]
    verdict = decay.judge(nll, TOKENS)
    assert verdict.offset is None
    assert verdict.text == (
        "undecided: 1 does better than 0, but not surely better than 2; more text may decide"
    )


@pytest.mark.parametrize(("num", "said"), [(1, "1 window"), (7, "7 windows")])
def test_few_windows_say_nothing_however_clear(
    rng: np.random.Generator, num: int, said: str
) -> None:
    nll = bowl(rng, 0, depth=20, num=num)
    assert decay.control_offset(nll, TOKENS[:num]) is None
    verdict = decay.judge(nll, TOKENS[:num])
    assert verdict.text == f"undecided: too little text ({said}; at least 8 are needed)"
    fields = decay.as_json(verdict)
    assert (fields["difference_ci95"] is None) == (num == 1)
    json.dumps(fields, allow_nan=False)


def test_chance_alone_seldom_names_anyone(rng: np.random.Generator) -> None:
    """Where nothing depends on the offset, 2000 texts: two lucky intervals are needed."""
    named = 0
    for _ in range(2000):
        nll = {offset: rng.normal(50, 1, 12).tolist() for offset in (-1, 0, 1, 2)}
        named += decay.judge(nll, TOKENS).offset is not None
    assert named < 2000 * 0.05


@pytest.mark.parametrize(
    ("trained", "stated", "says"),
    [
        (0, 0, None),
        (1, 1, None),
        (0, None, None),
        (1, None, "states none, so 0 is in force"),
        (1, 0, "states 0"),
        (0, 1, "states 1"),
    ],
)
def test_a_config_that_says_otherwise_is_contradicted(
    rng: np.random.Generator, trained: int, stated: int | None, says: str | None
) -> None:
    warning = decay.disagreement(decay.judge(bowl(rng, trained), TOKENS), stated)
    if says is None:
        assert warning is None
    else:
        assert warning is not None
        assert f"config.json {says}: " in warning
        assert f"""--hf-overrides '{{"decay_layer_offset": {trained}}}'""" in warning


def test_an_undecided_verdict_contradicts_nobody(rng: np.random.Generator) -> None:
    verdict = decay.judge(bowl(rng, 3.0), TOKENS)
    assert decay.disagreement(verdict, 0) is None
