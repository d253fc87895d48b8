"""The kinds of step of a word problem: what each computes and how it is told.

A step takes the running amount a and an operand b to a result: a op b, or b - a where the kind is
`from_operand`. Each kind is a row of `KINDS`; its wordings stand in the question, its reason in
the answer. Placeholders:

    o  the person who has the running amount      w, s  what is counted, plural and singular
    p  a person not met before                    v     what is counted after the step, plural
    q  a person met earlier who has an amount     n     the number of the step
    oh, ph, qh  the word her or his for them      then  nothing, "Then " or a like word
    thing  something to pay for                   calc  a op b = <<a op b=result>>result
    told  in a reason, the wording as the question has it, without the full stop

A reason starts from what it needs: it says again how two people compare, or what an earlier person
has, and then calculates. Nobody has to hold both in mind.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

# Operands that are not fixed by the words of the step.
NUMBER = "number"  # any number, 2..999
FACTOR = "factor"  # a small number, 2..12
EARLIER = "earlier"  # the amount an earlier person still has

CONNECTIVES = ("", "", "Then ", "Next, ", "Later, ", "After that, ")
ASKED = (
    "How many {w} does {o} have now?",
    "How many {w} does {o} have in the end?",
    "Find the number of {w} that {o} has now.",
)
THINGS = ("coat", "bike", "lamp", "watch", "guitar", "phone")


class Kind(NamedTuple):
    """One kind of step; the module's docstring explains the texts.

    Args:
        weight: how often it is drawn, relative to the others that fit.
        operand: a fixed number, or NUMBER, FACTOR or EARLIER.
        unit: what the result counts: the same, or things of another role.
        needs: whether the running amount must be dollars, must not be, or may be anything.
        new_owner: the result belongs to a new person.
        keeps: where there is a new owner, whether the old one still has the running amount.
    """

    name: str
    op: Literal["+", "-", "*", "/"]
    operand: int | str
    weight: int
    reason: str
    wordings: tuple[str, ...]
    unit: Literal["same", "container", "traded", "bought", "dollars"] = "same"
    needs: Literal["anything", "dollars", "things"] = "anything"
    new_owner: bool = False
    keeps: bool = True
    from_operand: bool = False


_SAME = (
    # The wordings of these two come from the story, see `stories`.
    Kind("gain", "+", NUMBER, 5, "{o} now has {calc} {w}.", ()),
    Kind("lose", "-", NUMBER, 5, "{o} has {calc} {w} left.", ()),
    Kind("double", "*", 2, 2, "{o} now has {calc} {w}.", (
        "{then}{o} doubles {oh} number of {w}.",
        "A week later, {o} has twice as many {w} as before.",
    )),
    Kind("triple", "*", 3, 2, "{o} now has {calc} {w}.", (
        "{then}{o} triples {oh} number of {w}.",
        "A month later, {o} has three times as many {w} as before.",
    )),
    Kind("third", "/", 3, 2, "{o} keeps {calc} {w}.", (
        "{then}{o} keeps one third of {oh} {w} and gives away the rest.",
        "{then}{o} gives away all but one third of {oh} {w}.",
    )),
    Kind("piles", "/", FACTOR, 2, "{o} keeps {calc} {w}.", (
        "{then}{o} splits {oh} {w} into {n} equal groups and keeps only one group.",
        "{then}{o} divides {oh} {w} into {n} equal parts and gives away all parts but one.",
    )),
    Kind("combine", "+", EARLIER, 9, "{q} has {n} {w}, so {o} now has {calc} {w}.", (
        "{then}{q} gives all {qh} {w} to {o}.",
        "{then}{o} gets all the {w} from {q}.",
    )),
    Kind("match", "+", EARLIER, 6, "{q} has {n} {w}, so {o} now has {calc} {w}.", (
        "{then}{o} gets as many additional {w} as {q} has.",
    )),
    Kind("take", "-", EARLIER, 6, "{q} has {n} {w}, so {o} has {calc} {w} left.", (
        "{then}{o} gives away as many {w} as {q} has.",
        "{then}{o} loses as many {w} as {q} has.",
    )),
)  # fmt: skip

_OTHER_PERSON = (
    Kind("more", "+", NUMBER, 4, "{told}, so {p} has {calc} {w}.", (
        "{p} has {n} more {w} than {o}.",
        "{o} has {n} fewer {w} than {p}.",
    ), new_owner=True),
    Kind("fewer", "-", NUMBER, 4, "{told}, so {p} has {calc} {w}.", (
        "{p} has {n} fewer {w} than {o}.",
        "{o} has {n} more {w} than {p}.",
    ), new_owner=True),
    Kind("total", "-", NUMBER, 3, "{p} has {calc} {w}.", (
        "Together, {o} and {p} have {n} {w}.",
        "{o} and {p} have {n} {w} in all.",
    ), new_owner=True, from_operand=True),
    Kind("change", "-", NUMBER, 9, "{p} has {calc} dollars left.", (
        "A {thing} costs as many dollars as {o} has. {p} pays for the {thing} with all {ph} "
        "money, {n} dollars, and gets change.",
        "{p} has {n} dollars and buys a {thing} that costs as many dollars as {o} has.",
    ), needs="dollars", new_owner=True, from_operand=True),
    Kind("times", "*", FACTOR, 4, "{p} has {calc} {w}.", (
        "{p} has {n} times as many {w} as {o}.",
        "For each {s} that {o} has, {p} has {n} {w}.",
    ), new_owner=True),
    Kind("rooms", "*", FACTOR, 2, "{p} has {calc} {w}.", (
        "{p} has {n} rooms, and each room holds as many {w} as {o} has.",
        "{p} has {n} shelves, and on each shelf there are as many {w} as {o} has.",
    ), new_owner=True),
    Kind("rate", "*", FACTOR, 3, "{p} has {calc} {w}.", (
        "{p} starts with no {w}. Every day for {n} days, {p} gets as many {w} as {o} has.",
        "{p} starts with no {w}. Each hour for {n} hours, {p} gets as many {w} as {o} has.",
    ), new_owner=True),
    Kind("half", "/", 2, 3, "{p} has {calc} {w}.", (
        "{p} has half as many {w} as {o}.",
        "{o} has twice as many {w} as {p}.",
    ), new_owner=True),
    Kind("quarter", "/", 4, 2, "{p} has {calc} {w}.", (
        "{p} has one quarter as many {w} as {o}.",
        "{o} has four times as many {w} as {p}.",
    ), new_owner=True),
    Kind("share", "/", FACTOR, 4, "{p} gets {calc} {w}.", (
        "{then}{o} shares all {oh} {w} equally among {n} friends, and {p} is one of them.",
        "{then}{o} divides all {oh} {w} equally among {n} children. One of them is {p}.",
    ), new_owner=True, keeps=False),
)  # fmt: skip

_OTHER_UNIT = (
    Kind("pack", "/", FACTOR, 3, "{o} fills {calc} {v}.", (
        "{then}{o} puts all {oh} {w} into {v}, {n} in each.",
        "{then}{o} packs all {oh} {w} into {v} of {n}.",
    ), unit="container"),
    Kind("trade", "*", FACTOR, 2, "{o} gets {calc} {v}.", (
        "{then}{o} trades each {s} for {n} {v}.",
        "{then}{o} trades all {oh} {w} and gets {n} {v} for each {s}.",
    ), unit="traded"),
    Kind("sell", "*", FACTOR, 4, "{o} gets {calc} dollars.", (
        "{then}{o} sells all {oh} {w} for {n} dollars each.",
        "{then}{o} sells all {oh} {w}. The price of each {s} is {n} dollars.",
    ), unit="dollars", needs="things"),
    Kind("buy", "/", FACTOR, 9, "{o} buys {calc} {v}.", (
        "{then}{o} spends all {oh} dollars on {v} that cost {n} dollars each.",
        "At the store, {v} cost {n} dollars each. {o} spends all {oh} dollars on {v}.",
    ), unit="bought", needs="dollars"),
)  # fmt: skip

KINDS = (*_SAME, *_OTHER_PERSON, *_OTHER_UNIT)
