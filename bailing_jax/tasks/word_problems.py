"""Arithmetic word problems in the format of GSM8K, made from a seed.

A problem starts with an amount and takes 2 to 8 steps, each of which turns the running amount into
the next. The answer is a line a step, with the calculation in << >>, and "#### result". The plan
(`plans`) comes first, then the numbers (`numbers`), then names and wordings (`stories`,
`step_kinds`). Two things decide the split, by a stable hash: the tuple of step kinds, held out for
one tuple in 8, and the tuple of numbers in the text, held out for one in 16. A train problem has
neither, a test problem both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bailing_jax.errors import bad_value
from bailing_jax.tasks.held_out import (
    Split,
    between,
    is_held_out,
    pick,
    pick_distinct,
    random_of,
)
from bailing_jax.tasks.numbers import draw_amounts, draw_bounds
from bailing_jax.tasks.plans import DOLLARS, Plan, draw_plan
from bailing_jax.tasks.step_kinds import ASKED, CONNECTIVES, EARLIER, THINGS
from bailing_jax.tasks.stories import (
    BOUGHT,
    CONTAINERS,
    DOLLAR,
    DOLLAR_GAINS,
    DOLLAR_LOSSES,
    MONEY_STORIES,
    NAMES,
    OTHER_GAINS,
    OTHER_LOSSES,
    POSSESSIVE,
    STORIES,
    TRADED,
    Noun,
    Story,
)

MIN_STEPS = 2
MAX_STEPS = 8
STEPS_ONE_IN = 8
NUMBERS_ONE_IN = 16
# Draws before a larger part is drawn anew: amounts for the same factors, factors for a plan.
_AMOUNT_DRAWS = 40
_BOUND_DRAWS = 8


@dataclass(frozen=True, slots=True)
class WordProblem:
    """One problem.

    Args:
        question: the text of the problem, one paragraph.
        answer: a line a step, then "#### result".
        result: the number asked for.
        story: the name of the setting.
        steps: the kinds of step, in order.
        numbers: the numbers of the question, in order of appearance.
    """

    question: str
    answer: str
    result: int
    story: str
    steps: tuple[str, ...]
    numbers: tuple[int, ...]


def is_held_out_steps(steps: tuple[str, ...]) -> bool:
    """Whether this combination of step kinds belongs to the test split."""
    return is_held_out("steps:" + ",".join(steps), STEPS_ONE_IN)


def is_held_out_numbers(numbers: tuple[int, ...]) -> bool:
    """Whether this tuple of numbers belongs to the test split."""
    return is_held_out("numbers:" + ",".join(map(str, numbers)), NUMBERS_ONE_IN)


def word_problem(seed: int, index: int, split: Split, num_steps: int | None = None) -> WordProblem:
    """Problem `index` of a split; the same arguments give the same problem everywhere.

    Args:
        seed: which sequence of problems, 0 or greater.
        index: which problem of it, 0 or greater.
        split: "train" or "test".
        num_steps: 2..8; None draws it evenly.

    Raises:
        UserError: an argument outside these.
    """
    if num_steps is not None and not MIN_STEPS <= num_steps <= MAX_STEPS:
        raise bad_value("num_steps", num_steps, f"{MIN_STEPS}..{MAX_STEPS} or None")
    random = random_of("word problem", seed, split, index)
    steps = between(MIN_STEPS, MAX_STEPS, random) if num_steps is None else num_steps
    is_test = split == "test"
    while True:
        plan = draw_plan(steps, lambda kinds: is_held_out_steps(kinds) == is_test, random)
        if plan is None:
            continue
        drawn = _draw_numbers(plan, split, random)
        if drawn is not None:
            return _told(plan, *drawn, random)


def _draw_numbers(
    plan: Plan, split: Split, random: Callable[[], float]
) -> tuple[list[int], list[int], tuple[int, ...]] | None:
    """Operands [n], amounts [n + 1] and the numbers of the text, of the split; None: give up."""
    for _ in range(_BOUND_DRAWS):
        bounds = draw_bounds(plan, random)
        if bounds is None:
            continue
        for _ in range(_AMOUNT_DRAWS):
            drawn = draw_amounts(plan, bounds, random)
            if drawn is None:
                break
            operands, amounts = drawn
            numbers = (amounts[0], *_in_text(plan, operands))
            if is_held_out_numbers(numbers) == (split == "test"):
                return operands, amounts, numbers
    return None


def _in_text(plan: Plan, operands: list[int]) -> list[int]:
    """The operands that are written as numbers: neither part of a word nor an earlier amount."""
    return [
        operand
        for kind, operand in zip(plan.kinds, operands, strict=True)
        if isinstance(kind.operand, str) and kind.operand != EARLIER
    ]


def _told(
    plan: Plan,
    operands: list[int],
    amounts: list[int],
    numbers: tuple[int, ...],
    random: Callable[[], float],
) -> WordProblem:
    """The problem in words."""
    story = pick(MONEY_STORIES if plan.units[0] == DOLLARS else STORIES, random)
    names = pick_distinct(NAMES, plan.owners[-1] + 1, random)
    nouns = _nouns(plan, story, random)
    opening = pick(story.openings, random)
    first = names[0]
    question = [opening.format(o=first, n=amounts[0], w=nouns[0].plural, oh=POSSESSIVE[first])]
    lines = []
    for i, kind in enumerate(plan.kinds):
        wordings = kind.wordings or _story_wordings(story, kind.name, nouns[i])
        o, p = names[plan.owners[i]], names[plan.owners[i + 1]]
        q = names[plan.owners[plan.earlier[i]]]
        a, b, result = amounts[i], operands[i], amounts[i + 1]
        left, right = (b, a) if kind.from_operand else (a, b)
        fields = {
            "o": o, "p": p, "q": q,
            "oh": POSSESSIVE[o], "ph": POSSESSIVE[p], "qh": POSSESSIVE[q],
            "w": nouns[i].plural, "s": nouns[i].singular, "v": nouns[i + 1].plural,
            "n": b, "then": pick(CONNECTIVES, random), "thing": pick(THINGS, random),
            "calc": f"{left} {kind.op} {right} = <<{left}{kind.op}{right}={result}>>{result}",
        }  # fmt: skip
        told = pick(wordings, random).format_map(fields)
        question.append(told)
        lines.append(kind.reason.format_map({**fields, "told": told.removesuffix(".")}))
    last = names[plan.owners[-1]]
    question.append(pick(ASKED, random).format(w=nouns[-1].plural, o=last))
    return WordProblem(
        question=" ".join(question),
        answer="\n".join([*lines, f"#### {amounts[-1]}"]),
        result=amounts[-1],
        story=story.name,
        steps=tuple(kind.name for kind in plan.kinds),
        numbers=numbers,
    )


def _nouns(plan: Plan, story: Story, random: Callable[[], float]) -> list[Noun]:
    """What each amount counts [n + 1]; no two units share a noun."""
    named = {DOLLARS: DOLLAR, plan.units[0]: story.item}
    nouns = [story.item]
    for kind, unit in zip(plan.kinds, plan.units[1:], strict=True):
        if unit not in named:
            used = named.values()
            pool = {"traded": TRADED, "bought": BOUGHT}.get(kind.unit, CONTAINERS)
            free = [noun for noun in pool if noun not in used]
            if kind.unit == "container" and nouns[-1] == story.item:
                free = [story.container] if story.container not in used else free
            named[unit] = pick(free, random)
        nouns.append(named[unit])
    return nouns


def _story_wordings(story: Story, kind: str, noun: Noun) -> tuple[str, ...]:
    """How the story tells that someone gets more of these things, or loses some."""
    if noun == story.item:
        return story.gains if kind == "gain" else story.losses
    if noun == DOLLAR:
        return DOLLAR_GAINS if kind == "gain" else DOLLAR_LOSSES
    return OTHER_GAINS if kind == "gain" else OTHER_LOSSES
