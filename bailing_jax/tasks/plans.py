"""The plan of a word problem: kinds of step that fit together, before any name or number.

People and units are numbered as they appear: person 0 and unit 1 open the story, unit 0 is
dollars. A step that needs an amount someone earlier still has (`EARLIER`) is drawn only where
such a person counts the same unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bailing_jax.tasks.held_out import pick
from bailing_jax.tasks.step_kinds import EARLIER, KINDS, Kind

DOLLARS = 0
_STARTS_WITH_DOLLARS = 1 / 8
_KIND_DRAWS = 8


class Plan(NamedTuple):
    """Steps 1..n and the amounts 0..n they lead through.

    Args:
        kinds: the kind of each step [n].
        owners: who has each amount [n + 1].
        units: what each amount counts [n + 1].
        earlier: for each step the number of the amount it refers back to [n]; -1 for none.
    """

    kinds: tuple[Kind, ...]
    owners: tuple[int, ...]
    units: tuple[int, ...]
    earlier: tuple[int, ...]


def _fitting(*, is_dollars: bool, has_earlier: bool) -> tuple[Kind, ...]:
    """The kinds that may follow, each as often as its weight."""
    refused = "things" if is_dollars else "dollars"
    return tuple(
        kind
        for kind in KINDS
        for _ in range(kind.weight)
        if kind.needs != refused and (has_earlier or kind.operand != EARLIER)
    )


_FITTING = {
    (is_dollars, has_earlier): _fitting(is_dollars=is_dollars, has_earlier=has_earlier)
    for is_dollars in (False, True)
    for has_earlier in (False, True)
}


def draw_plan(
    num_steps: int, accepts: Callable[[tuple[str, ...]], bool], random: Callable[[], float]
) -> Plan | None:
    """A plan of that many steps whose kinds, by name, are accepted; None if it was not found.

    Only the last step is drawn again while `accepts` refuses, since a whole plan costs more.
    """
    unit = DOLLARS if random() < _STARTS_WITH_DOLLARS else 1
    owner = people = 0
    next_unit = 2
    kinds: list[Kind] = []
    owners, units, earlier = [owner], [unit], []
    left: dict[int, int] = {}  # amount number -> unit, of the people who still have one
    last = None
    for step in range(num_steps):
        same_unit = [amount for amount in left if left[amount] == unit] if left else []
        fitting = _FITTING[unit == DOLLARS, bool(same_unit)]
        for _ in range(_KIND_DRAWS):
            kind = fitting[int(random() * len(fitting))]
            # The same sentence twice would read like a mistake.
            if kind is not last and (
                step < num_steps - 1 or accepts((*(k.name for k in kinds), kind.name))
            ):
                break
        else:
            return None
        refers_to = -1
        if kind.operand == EARLIER:
            refers_to = pick(same_unit, random)
            if kind.name == "combine":
                del left[refers_to]
        elif kind.new_owner:
            if kind.keeps:
                left[step] = unit
            people += 1
            owner = people
        elif kind.unit == "dollars":
            unit = DOLLARS
        elif kind.unit != "same":
            unit, next_unit = next_unit, next_unit + 1
        last = kind
        kinds.append(kind)
        owners.append(owner)
        units.append(unit)
        earlier.append(refers_to)
    return Plan(tuple(kinds), tuple(owners), tuple(units), tuple(earlier))
