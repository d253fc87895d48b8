"""A reader of word problems that knows English sentences but not how the problems are made.

It keeps how much each named person has, changes it sentence by sentence as a person would, and
looks up the person whom the last sentence asks about. A sentence that fits two readings, or a
division that is not exact, fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container

CONNECTIVE = re.compile(r"^(Then|Next,|Later,|After that,) ")
WORD_FACTORS = {"twice": 2, "half": 2, "three": 3, "four": 4, "one quarter": 4}
NAME = r"([A-Z][a-z]+)"


class Reader:
    """What a reader knows after some sentences."""

    def __init__(self) -> None:
        self.has: dict[str, int] = {}
        self.price = 0  # of the thing, or of each, that the sentence before told
        self.portion = 0  # what each of the children gets
        self.seller = ""

    def change(self, name: str, amount: int) -> None:
        assert amount >= 0
        self.has[name] = amount

    def divide(self, name: str, by: int) -> int:
        assert self.has[name] % by == 0
        return self.has[name] // by

    def compare(self, one: str, other: str, difference: int) -> None:
        """`one` has `difference` more than `other`; exactly one of the two is known."""
        assert (one in self.has) != (other in self.has)
        if other in self.has:
            self.change(one, self.has[other] + difference)
        else:
            self.change(other, self.has[one] - difference)

    def scale(self, one: str, other: str, factor: int) -> None:
        """`one` has `factor` times as many as `other`; exactly one of the two is known."""
        assert (one in self.has) != (other in self.has)
        if other in self.has:
            self.change(one, self.has[other] * factor)
        else:
            self.change(other, self.divide(one, factor))

    def new(self, name: str, amount: int) -> None:
        assert name not in self.has
        self.change(name, amount)

    def give_all(self, giver: str, taker: str) -> None:
        self.change(taker, self.has[taker] + self.has.pop(giver))

    def share(self, name: str, by: int) -> None:
        self.portion = self.divide(name, by)
        del self.has[name]

    def sell(self, name: str) -> None:
        self.seller = name


def _rules(r: Reader) -> list[tuple[str, Callable[..., None]]]:
    """Sentences and what they do; groups are names and numbers in order of appearance."""
    has = r.has
    her = "(?:her|his)"
    return [
        (f"{NAME} has (\\d+) times as many \\w+ as {NAME}", lambda p, n, o: r.scale(p, o, int(n))),
        (f"For each \\w+ that {NAME} has, {NAME} has (\\d+) \\w+",
         lambda o, p, n: r.scale(p, o, int(n))),
        (f"{NAME} has (\\d+) more \\w+ than {NAME}", lambda a, n, b: r.compare(a, b, int(n))),
        (f"{NAME} has (\\d+) fewer \\w+ than {NAME}", lambda a, n, b: r.compare(b, a, int(n))),
        (f"{NAME} has (half|one quarter) as many \\w+ as {NAME}",
         lambda a, f, b: r.scale(b, a, WORD_FACTORS[f])),
        (f"{NAME} has (twice|four) (?:times )?as many \\w+ as {NAME}",
         lambda a, f, b: r.scale(a, b, WORD_FACTORS[f])),
        (f"A (?:week|month) later, {NAME} has (twice|three) (?:times )?as many \\w+ as before",
         lambda o, f: r.change(o, has[o] * WORD_FACTORS[f])),
        (f"{NAME} doubles {her} number of \\w+", lambda o: r.change(o, has[o] * 2)),
        (f"{NAME} triples {her} number of \\w+", lambda o: r.change(o, has[o] * 3)),
        (f"{NAME} keeps one third of {her} \\w+ and gives away the rest",
         lambda o: r.change(o, r.divide(o, 3))),
        (f"{NAME} gives away all but one third of {her} \\w+",
         lambda o: r.change(o, r.divide(o, 3))),
        (f"{NAME} splits {her} \\w+ into (\\d+) equal groups and keeps only one group",
         lambda o, n: r.change(o, r.divide(o, int(n)))),
        (f"{NAME} divides {her} \\w+ into (\\d+) equal parts and gives away all parts but one",
         lambda o, n: r.change(o, r.divide(o, int(n)))),
        (f"{NAME} gives all {her} \\w+ to {NAME}", r.give_all),
        (f"{NAME} gets all the \\w+ from {NAME}", lambda o, q: r.give_all(q, o)),
        (f"{NAME} gets as many additional \\w+ as {NAME} has",
         lambda o, q: r.change(o, has[o] + has[q])),
        (f"{NAME} (?:gives away|loses) as many \\w+ as {NAME} has",
         lambda o, q: r.change(o, has[o] - has[q])),
        (f"Together, {NAME} and {NAME} have (\\d+) \\w+",
         lambda o, p, n: r.new(p, int(n) - has[o])),
        (f"{NAME} and {NAME} have (\\d+) \\w+ in all", lambda o, p, n: r.new(p, int(n) - has[o])),
        (f"A \\w+ costs as many dollars as {NAME} has", lambda o: setattr(r, "price", has[o])),
        (f"{NAME} pays for the \\w+ with all {her} money, (\\d+) dollars, and gets change",
         lambda p, n: r.new(p, int(n) - r.price)),
        (f"{NAME} has (\\d+) dollars and buys a \\w+ that costs as many dollars as {NAME} has",
         lambda p, n, o: r.new(p, int(n) - has[o])),
        (f"{NAME} has (\\d+) (?:rooms|shelves), and (?:each room holds|on each shelf there are) "
         f"as many \\w+ as {NAME} has", lambda p, n, o: r.new(p, int(n) * has[o])),
        (f"{NAME} starts with no \\w+", lambda p: r.new(p, 0)),
        (f"(?:Every day|Each hour) for (\\d+) (?:days|hours), {NAME} gets as many \\w+ as {NAME} "
         "has",
         lambda n, p, o: r.change(p, has[p] + int(n) * has[o])),
        (f"{NAME} shares all {her} \\w+ equally among (\\d+) friends, and {NAME} is one of them",
         lambda o, n, p: (r.share(o, int(n)), r.new(p, r.portion))),
        (f"{NAME} divides all {her} \\w+ equally among (\\d+) children",
         lambda o, n: r.share(o, int(n))),
        (f"One of them is {NAME}", lambda p: r.new(p, r.portion)),
        (f"{NAME} puts all {her} \\w+ into \\w+, (\\d+) in each",
         lambda o, n: r.change(o, r.divide(o, int(n)))),
        (f"{NAME} packs all {her} \\w+ into \\w+ of (\\d+)",
         lambda o, n: r.change(o, r.divide(o, int(n)))),
        (f"{NAME} trades each \\w+ for (\\d+) \\w+", lambda o, n: r.change(o, has[o] * int(n))),
        (f"{NAME} trades all {her} \\w+ and gets (\\d+) \\w+ for each \\w+",
         lambda o, n: r.change(o, has[o] * int(n))),
        (f"{NAME} sells all {her} \\w+ for (\\d+) dollars each",
         lambda o, n: r.change(o, has[o] * int(n))),
        (f"{NAME} sells all {her} \\w+", r.sell),
        ("The price of each \\w+ is (\\d+) dollars",
         lambda n: r.change(r.seller, has[r.seller] * int(n))),
        (f"{NAME} spends all {her} dollars on \\w+ that cost (\\d+) dollars each",
         lambda o, n: r.change(o, r.divide(o, int(n)))),
        ("At the store, \\w+ cost (\\d+) dollars each", lambda n: setattr(r, "price", int(n))),
        (f"{NAME} spends all {her} dollars on \\w+",
         lambda o: r.change(o, r.divide(o, r.price))),
        (f"{NAME} (?:[a-z ]+ (?:and adds )?)(\\d+) more \\w+(?: [a-z ]+)?",
         lambda o, n: r.change(o, has[o] + int(n))),
        (f"{NAME} gets a gift of (\\d+) dollars", lambda o, n: r.change(o, has[o] + int(n))),
    ]  # fmt: skip


LOSS = re.compile(
    rf"{NAME} (?:throws|throws away|uses|drops|serves|gives|loses|burns|cooks|lets|eats|ruins|sends"
    r"|sends out|brings|feeds|spends|pays|gives away|pays a bill of) (\d+) (?!more )[a-z ]+"
)


def solve(question: str, names: Container[str]) -> int:
    """The number the question asks for; `names` says which words are people."""
    reader = Reader()
    rules = _rules(reader)
    first, *sentences, asked = re.split(r"(?<=[.?]) ", question)
    owner = next(w for w in re.findall(NAME, first) if w in names)
    (amount,) = re.findall(r"\d+", first)
    reader.new(owner, int(amount))
    for sentence in sentences:
        text = CONNECTIVE.sub("", sentence.rstrip("."))
        found = [(m, act) for rule, act in rules if (m := re.fullmatch(rule, text))]
        loss = LOSS.fullmatch(text)
        if loss and not found:
            reader.change(loss[1], reader.has[loss[1]] - int(loss[2]))
            continue
        assert len(found) + bool(loss) == 1, (sentence, [m.re.pattern for m, _ in found])
        match, act = found[0]
        act(*match.groups())
    final = re.fullmatch(
        rf"How many \w+ does {NAME} have (?:now|in the end)\?|"
        rf"Find the number of \w+ that {NAME} has now\.",
        asked,
    )
    assert final
    return reader.has[final[1] or final[2]]
