"""The numbers of a word problem: every amount an integer within bounds, every division exact.

First factors are drawn and the bounds are carried from the last step back to the first: amount i
must be a multiple of `multiples[i]` in `lows[i]..highs[i]` for the rest to work out. Then the
amounts are drawn from the first on. Steps that refer back to an earlier amount can still fail; so
can bounds that leave nothing, and the caller draws again.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

from bailing_jax.tasks.held_out import between
from bailing_jax.tasks.plans import Plan
from bailing_jax.tasks.step_kinds import EARLIER

MAX_NUMBER = 999  # in the text
MAX_AMOUNT = 9_999
MIN_AMOUNT = 2  # so that every noun stays plural
MAX_FACTOR = 12
MAX_MULTIPLICAND = 999
_MODEST = 99
_SHARE_OF_MODEST = 0.6  # of the numbers in the text
_SHARE_OF_THREE_DIGITS = 0.85  # of the last amounts


class Bounds(NamedTuple):
    """What amounts 0..n must keep, and the factors of steps 1..n (0: not a factor)."""

    factors: list[int]
    multiples: list[int]
    lows: list[int]
    highs: list[int]


def draw_bounds(plan: Plan, random: Callable[[], float]) -> Bounds | None:
    """Factors and the bounds that follow from them; None if they leave no room."""
    n = len(plan.kinds)
    factors, multiples = [0] * n, [1] * (n + 1)
    lows, highs = [MIN_AMOUNT] * (n + 1), [MAX_AMOUNT] * (n + 1)
    if random() < _SHARE_OF_THREE_DIGITS:
        highs[n] = 999
    for i in range(n - 1, -1, -1):
        kind = plan.kinds[i]
        multiple, low, high = multiples[i + 1], lows[i + 1], highs[i + 1]
        if kind.op in "*/":
            factor = (
                kind.operand if isinstance(kind.operand, int) else between(2, MAX_FACTOR, random)
            )
            factors[i] = factor
            if kind.op == "*":
                multiple //= gcd(multiple, factor)
                low, high = -(-low // factor), min(high // factor, MAX_MULTIPLICAND)
            else:
                multiple, low, high = multiple * factor, low * factor, high * factor
        elif kind.operand == EARLIER:
            low, high = (MIN_AMOUNT, high) if kind.op == "+" else (low + MIN_AMOUNT, MAX_AMOUNT)
        elif kind.from_operand:
            multiple, low, high = 1, MIN_AMOUNT, MAX_NUMBER - low
        elif kind.op == "+":
            multiple, low, high = 1, low - MAX_NUMBER, high - MIN_AMOUNT
        else:
            multiple, low, high = 1, low + MIN_AMOUNT, high + MAX_NUMBER
        low, high = max(low, MIN_AMOUNT), min(high, MAX_AMOUNT)
        if high // multiple * multiple < low:
            return None
        multiples[i], lows[i], highs[i] = multiple, low, high
    return Bounds(factors, multiples, lows, highs)


def draw_amounts(
    plan: Plan, bounds: Bounds, random: Callable[[], float]
) -> tuple[list[int], list[int]] | None:
    """Operands of the steps [n] and amounts [n + 1] within the bounds; None if none were met."""
    factors, multiples, lows, highs = bounds
    amount = _draw(multiples[0], lows[0], highs[0], MIN_AMOUNT, MAX_NUMBER, random)
    if not amount:
        return None
    operands: list[int] = []
    amounts = [amount]
    for i, kind in enumerate(plan.kinds):
        multiple, low, high = multiples[i + 1], lows[i + 1], highs[i + 1]
        operand = factors[i]
        if operand:
            result = amount * operand if kind.op == "*" else amount // operand
        elif kind.operand == EARLIER:
            operand = amounts[plan.earlier[i]]
            result = amount + operand if kind.op == "+" else amount - operand
            if not low <= result <= high or result % multiple:
                result = 0
        elif kind.from_operand:
            result = _draw(multiple, low, high, MIN_AMOUNT, MAX_NUMBER - amount, random)
            operand = amount + result
        elif kind.op == "+":
            near, far = amount + MIN_AMOUNT, amount + MAX_NUMBER
            result = _draw(multiple, low, high, near, far, random)
            operand = result - amount
        else:
            near, far = amount - MIN_AMOUNT, amount - MAX_NUMBER
            result = _draw(multiple, low, high, near, far, random)
            operand = amount - result
        if not result:
            return None
        operands.append(operand)
        amounts.append(result)
        amount = result
    return operands, amounts


def _draw(
    multiple: int, low: int, high: int, near: int, far: int, random: Callable[[], float]
) -> int:
    """A multiple in low..high between `near` and `far`, often close to `near`; 0: there is none."""
    limit = far
    if random() < _SHARE_OF_MODEST:
        limit = min(far, near + _MODEST) if far > near else max(far, near - _MODEST)
    while True:
        least, most = (near, limit) if near < limit else (limit, near)
        first = -(-(low if low > least else least) // multiple)
        last = (high if high < most else most) // multiple
        if first <= last:
            return multiple * (first + int(random() * (last - first + 1)))
        if limit == far:
            return 0
        limit = far
