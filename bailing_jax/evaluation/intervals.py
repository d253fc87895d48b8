"""Intervals: of a share of right answers, and of a mean over texts of different lengths.

Standard library only. Both hold for independent problems or windows, and 95 % is the only level.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

_NORMAL = 1.959963984540054  # 97.5 % of a normal distribution
_HALVINGS = 60


class Estimate(NamedTuple):
    """A mean a token, and its 95 % interval; low and high are infinite for a single window."""

    mean: float
    low: float
    high: float


def wilson(correct: int, num: int) -> tuple[float, float]:
    """The Wilson 95 % interval of a share; never outside 0 to 1, and of use when all are right.

    The two shares p at which the count found lies just 1.96 standard errors of p away.

    Raises:
        ValueError: `correct` is not in 0 to `num`, or `num` is 0.
    """
    if not 0 <= correct <= num or num == 0:
        raise ValueError(f"{correct} of {num}")
    share, z2 = correct / num, _NORMAL**2
    centre = share + z2 / (2 * num)
    half = _NORMAL * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    low, high = (centre - half) / (1 + z2 / num), (centre + half) / (1 + z2 / num)
    # The ends are exact where rounding would leave 1e-17.
    return (0.0 if correct == 0 else low), (1.0 if correct == num else high)


def mean_a_token(sums: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """The mean over all tokens of windows, with the windows as the independent units.

    The mean is sum(sums) / sum(tokens); its standard error is that of the residuals
    sums_i - mean * tokens_i, and the interval Student's with one degree of freedom less than
    windows. For windows of one length that is the t interval of the windows' means.

    Args:
        sums: of each window, over its tokens.
        tokens: of each window, at least 1.

    Raises:
        ValueError: no window, or not one sum a window.
    """
    if not sums or len(sums) != len(tokens):
        raise ValueError(f"{len(sums)} sums of {len(tokens)} windows")
    total, num = sum(tokens), len(sums)
    mean = math.fsum(sums) / total
    if num == 1:
        return Estimate(mean, -math.inf, math.inf)
    residuals = (s - mean * n for s, n in zip(sums, tokens, strict=True))
    squares = math.fsum(residual**2 for residual in residuals)
    half = student(num - 1) * math.sqrt(num / (num - 1) * squares) / total
    return Estimate(mean, mean - half, mean + half)


@functools.cache
def student(degrees: int) -> float:
    """97.5 % of Student's t distribution with so many degrees of freedom.

    Raises:
        ValueError: less than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom")
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        angle = (low + high) / 2
        if _within(angle, degrees) < 0.95:
            low = angle
        else:
            high = angle
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) * tan(angle)): the finite sums for whole degrees of freedom."""
    cos2 = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    # cos(1 + 2/3 cos^2 + 2*4/(3*5) cos^4 ...) if odd, 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ... if even.
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cos2 * (2 * k - 1 + odd) / (2 * k + odd)
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
