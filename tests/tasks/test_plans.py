"""Plans of word problems: people and units fit, and who is referred to still has what is said."""

from __future__ import annotations

import pytest

from bailing_jax.tasks.held_out import random_of
from bailing_jax.tasks.plans import DOLLARS, Plan, draw_plan
from bailing_jax.tasks.step_kinds import EARLIER


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    random = random_of("plans", 0, "train", 0)
    drawn = [draw_plan(8, lambda kinds: True, random) for _ in range(5_000)]
    return [plan for plan in drawn if plan is not None]


def test_almost_every_draw_gives_a_plan(plans: list[Plan]) -> None:
    assert len(plans) > 4_990


def test_an_earlier_amount_is_still_there_and_counts_the_same(plans: list[Plan]) -> None:
    for plan in plans:
        gone: set[int] = set()  # amounts shared out or given away, by number
        for step, kind in enumerate(plan.kinds):
            refers_to = plan.earlier[step]
            assert (refers_to >= 0) == (kind.operand == EARLIER)
            if refers_to >= 0:
                owner = plan.owners[refers_to]
                assert plan.units[refers_to] == plan.units[step]
                assert refers_to not in gone
                # The last amount this person had, and not the one who acts.
                assert owner not in plan.owners[refers_to + 1 : step + 1]
            if kind.name == "combine":
                gone.add(refers_to)
            if kind.name == "share":
                gone.add(step)


def test_dollars_are_spent_only_where_there_are_dollars(plans: list[Plan]) -> None:
    for plan in plans:
        for step, kind in enumerate(plan.kinds):
            is_dollars = plan.units[step] == DOLLARS
            assert kind.needs != ("things" if is_dollars else "dollars")


def test_units_and_owners_change_only_where_the_kind_says_so(plans: list[Plan]) -> None:
    for plan in plans:
        for step, kind in enumerate(plan.kinds):
            before, after = plan.units[step : step + 2]
            assert (before == after) == (kind.unit == "same")
            assert (after == DOLLARS) or kind.unit != "dollars"
            assert (plan.owners[step] != plan.owners[step + 1]) == kind.new_owner


def test_no_kind_follows_itself(plans: list[Plan]) -> None:
    for plan in plans:
        assert all(a is not b for a, b in zip(plan.kinds, plan.kinds[1:], strict=False))


def test_the_last_kind_is_one_that_is_accepted() -> None:
    random = random_of("plans", 1, "train", 0)
    for _ in range(500):
        plan = draw_plan(3, lambda kinds: kinds[-1] in ("sell", "gain"), random)
        assert plan is None or plan.kinds[-1].name in ("sell", "gain")
