"""Intervals against their defining equations, and against tables of Student's distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bailing_jax.evaluation.intervals import mean_a_token, student, wilson

Z = 1.959963984540054
# 97.5 %, as printed in tables.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 7: 2.3646, 10: 2.2281,
         15: 2.1314, 30: 2.0423, 60: 2.0003, 120: 1.9799}  # fmt: skip


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_where_the_count_is_just_possible(case: tuple[int, int]) -> None:
    """|share - p| = z sqrt(p (1 - p) / n) at both ends; the share lies between them."""
    correct, num = case
    share = correct / num
    low, high = wilson(correct, num)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        error = Z * math.sqrt(end * (1 - end) / num)
        assert abs(share - end) == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_wilson_at_the_ends() -> None:
    """All right is no proof of 100 %: the other end is 1 / (1 + z^2 / n) in closed form."""
    low, high = wilson(10, 10)
    assert high == 1.0
    assert low == pytest.approx(1 / (1 + Z**2 / 10), rel=1e-12)
    assert wilson(0, 10) == pytest.approx((0.0, 1 - low), rel=1e-12)


@pytest.mark.parametrize(("correct", "num"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(correct: int, num: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} of {num}"):
        wilson(correct, num)


@pytest.mark.parametrize("degrees", TABLE)
def test_student_is_the_tables(degrees: int) -> None:
    assert student(degrees) == pytest.approx(TABLE[degrees], abs=5e-5)


def test_student_comes_down_to_the_normal() -> None:
    values = [student(degrees) for degrees in (1, 2, 3, 10, 11, 100, 1001, 20_000)]
    assert values == sorted(values, reverse=True)
    assert Z < values[-1] < Z + 2e-4


def test_equal_windows_have_the_interval_of_their_means(rng: np.random.Generator) -> None:
    means = rng.normal(2.0, 0.3, 12)
    got = mean_a_token((means * 50).tolist(), [50] * 12)
    half = student(11) * means.std(ddof=1) / math.sqrt(12)
    np.testing.assert_allclose(
        got, (means.mean(), means.mean() - half, means.mean() + half), rtol=1e-12
    )


def test_a_long_window_counts_by_its_tokens() -> None:
    assert mean_a_token([10.0, 90.0], [10, 30]).mean == 2.5


def test_a_constant_has_no_width() -> None:
    assert mean_a_token([2.0 * n for n in (3, 8, 5)], [3, 8, 5]) == (2.0, 2.0, 2.0)


def test_one_window_has_no_interval() -> None:
    assert mean_a_token([6.0], [3]) == (2.0, -math.inf, math.inf)


def test_intervals_of_unequal_windows_hold_the_truth_as_often_as_they_say(
    rng: np.random.Generator,
) -> None:
    """Of 2000 intervals around a mean of 1, about 95 % hold it (4 standard errors: 2 %)."""
    held = 0
    for _ in range(2000):
        tokens = rng.integers(20, 60, 20)
        sums = tokens + rng.normal(0, 1, 20) * np.sqrt(tokens)
        estimate = mean_a_token(sums.tolist(), tokens.tolist())
        held += estimate.low <= 1.0 <= estimate.high
    assert 0.93 < held / 2000 < 0.97


@pytest.mark.parametrize(("sums", "tokens"), [([], []), ([1.0], [1, 2])])
def test_mean_refuses_what_is_no_list_of_windows(sums: list[float], tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="windows"):
        mean_a_token(sums, tokens)
