"""What must hold of every step, checked on the host: plan, ledgers and layout against each other.

The names are those of the project's list of invariants: I4 ownership, I5 freshness, I6 position,
I7 uniqueness, I8 padding, I9 phase, I14 finite. The books here are kept apart from the engine's:
`Tally` records what each step fed and compares it with what the engine believes. No jax; what the
device holds is `debug`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

NAMES = {
    "I4": "ownership",
    "I5": "freshness",
    "I6": "position",
    "I7": "uniqueness",
    "I8": "padding",
    "I9": "phase",
    "I14": "finite",
}


class InvariantError(RuntimeError):
    """A step that must not go on: which invariant, whose, where, and in which step."""

    def __init__(
        self,
        invariant: str,
        what: str,
        *,
        step: int,
        request: int | None = None,
        slot: int | None = None,
    ) -> None:
        where = [f"step {step}"]
        where += [f"request {request}"] if request is not None else []
        where += [f"slot {slot}"] if slot is not None else []
        super().__init__(f"{invariant} {NAMES[invariant]}: {', '.join(where)}: {what}")
        self.invariant, self.step, self.request, self.slot = invariant, step, request, slot


class Handle(Protocol):
    """A slot's or some pages' owner and the number of the hand-out."""

    @property
    def owner(self) -> int:
        """The request."""
        ...

    @property
    def epoch(self) -> int:
        """Grows with every hand-out."""
        ...


class Planned(Protocol):
    """What is looked at of a sequence."""

    number: int
    tokens: list[int]
    num_prompt: int
    num_computed: int
    slot: Any
    pages: Any


@dataclass(frozen=True)
class Part:
    """One sequence of a step: where its rows and places stand in the layout.

    `rows` are those of the layout's tokens, `logit_row` indexes `logit_rows` and the logits.
    """

    sequence: Planned
    count: int
    is_decode: bool
    index: int
    rows: slice
    logit_row: int

    @property
    def slot(self) -> int:
        """The slot the ledger gave it."""
        return self.sequence.slot.slot

    @property
    def span(self) -> range:
        """The positions it folds in now."""
        return range(self.sequence.num_computed, self.sequence.num_computed + self.count)


def parts_of(plan: Any, layout: Any, num_steps: int = 1) -> list[Part]:
    """The sequences of a plan in the order the layout must have them."""
    found = []
    for i, sequence in enumerate(plan.decodes):
        found.append(Part(sequence, num_steps, True, i, slice(i, i + 1), i))
    num_decode = layout.decode_slots.shape[0]
    start = num_decode
    for i, (sequence, count) in enumerate(plan.segments):
        rows = slice(start, start + count)
        found.append(Part(sequence, count, False, i, rows, num_decode + i))
        start += count
    return found


def held(ledger: Any) -> list[Any]:
    """The handles in force."""
    return list(ledger._held.values())


def check_ledgers(slots: Any, pages: Any, parts: Sequence[Part], step: int) -> None:
    """I7: free and held slots and pages are all there are, once each; I4: a handle is in force."""
    for kind, ledger, numbers in (
        ("slot", slots, [h.slot for h in held(slots)]),
        ("page", pages, [p for h in held(pages) for p in h.pages]),
    ):
        everything = sorted([*ledger._free, *numbers])
        if everything != list(range(1, ledger.capacity + 1)):
            lost = sorted(set(range(1, ledger.capacity + 1)) - set(everything))
            twice = sorted({n for n in everything if everything.count(n) > 1})
            what = f"{kind}s lost {lost}, handed out twice {twice}, in all {len(everything)}"
            raise InvariantError("I7", what, step=step)
    for part in parts:
        sequence = part.sequence
        for kind, handle, ledger in (
            ("slot", sequence.slot, slots),
            ("pages", sequence.pages, pages),
        ):
            if handle is None or handle not in held(ledger) or handle.owner != sequence.number:
                what = f"runs with {kind} {handle}, which the ledger did not give it"
                slot = getattr(sequence.slot, "slot", None)
                raise InvariantError("I4", what, step=step, request=sequence.number, slot=slot)


def check_layout(parts: Sequence[Part], layout: Any, step: int) -> None:
    """The arrays name each sequence's own places, tokens and positions; pads name NULL."""
    decodes = [part for part in parts if part.is_decode]
    segments = [part for part in parts if not part.is_decode]
    places = (
        (decodes, layout.decode_slots, layout.decode_pages, layout.decode_contexts),
        (segments, layout.segment_slots, layout.segment_pages, layout.segment_contexts),
    )
    for mine, slots, pages, contexts in places:
        _check_pads(np.asarray(slots), np.asarray(pages), len(mine), step)
        for part in mine:
            _check_places(part, slots, pages, contexts, step)
    used = [part.slot for part in parts]
    if len(set(used)) != len(used):
        raise InvariantError("I7", f"slots of a step are not distinct: {used}", step=step)
    _check_segments(segments, layout, step)
    for part in parts:
        _check_rows(part, layout, step)


def _check_pads(slots: np.ndarray, pages: np.ndarray, count: int, step: int) -> None:
    if slots[count:].any() or pages[count:].any():
        what = f"padding names slots {slots[count:].tolist()} or pages that are not NULL"
        raise InvariantError("I8", what, step=step)


def _check_places(part: Part, slots: Any, pages: Any, contexts: Any, step: int) -> None:
    sequence, i = part.sequence, part.index
    at = {"step": step, "request": sequence.number, "slot": part.slot}
    if int(slots[i]) != part.slot or part.slot == 0:
        raise InvariantError("I4", f"its row names slot {int(slots[i])}", **at)
    mine = sequence.pages.pages
    named = np.asarray(pages[i])
    if tuple(named[: len(mine)].tolist()) != tuple(mine) or named[len(mine) :].any():
        raise InvariantError("I4", f"its row names pages {named.tolist()}, it has {mine}", **at)
    if int(contexts[i]) != sequence.num_computed:
        what = f"its row says {int(contexts[i])} tokens, the sequence {sequence.num_computed}"
        raise InvariantError("I6", what, **at)
    if part.is_decode and sequence.num_computed < 1:
        raise InvariantError("I9", "decodes without state", **at)
    if part.is_decode and sequence.num_computed < sequence.num_prompt:
        raise InvariantError("I9", "decodes before its prompt is folded in", **at)


def _check_segments(segments: Sequence[Part], layout: Any, step: int) -> None:
    cu_seqlens, is_fresh = np.asarray(layout.cu_seqlens), np.asarray(layout.is_fresh)
    ends = np.cumsum([0, *(part.count for part in segments)])
    in_place = cu_seqlens[: len(ends)].tolist() == ends.tolist()
    if not in_place or (cu_seqlens[len(ends) :] != ends[-1]).any():
        raise InvariantError("I9", f"segments end at {cu_seqlens}, not at {ends}", step=step)
    for part in segments:
        if bool(is_fresh[part.index]) != (part.sequence.num_computed == 0):
            what = f"fresh is {bool(is_fresh[part.index])} at {part.sequence.num_computed} tokens"
            number = part.sequence.number
            raise InvariantError("I5", what, step=step, request=number, slot=part.slot)


def _check_rows(part: Part, layout: Any, step: int) -> None:
    """I6: fed tokens and positions; the row whose logits are wanted is the last."""
    sequence = part.sequence
    start, count = sequence.num_computed, part.rows.stop - part.rows.start
    want = sequence.tokens[start : start + count]
    tokens = np.asarray(layout.tokens)[part.rows].tolist()
    positions = np.asarray(layout.positions)[part.rows].tolist()
    at = {"step": step, "request": sequence.number, "slot": part.slot}
    if tokens != want:
        raise InvariantError("I6", f"fed {tokens} at position {start}, it has {want}", **at)
    if positions != list(range(start, start + count)):
        raise InvariantError("I6", f"positions {positions} at {start} tokens", **at)
    last = int(np.asarray(layout.logit_rows)[part.logit_row])
    if count and last != part.rows.stop - 1:
        what = f"logits are taken from row {last}, its last is {part.rows.stop - 1}"
        raise InvariantError("I6", what, **at)


class Tally:
    """What was folded into each slot since it was handed out, by our own count."""

    def __init__(self) -> None:
        # Slot epoch -> the tokens fed, and how many more a call of several steps may have fed.
        self._fed: dict[int, tuple[list[int], int]] = {}

    def check(self, parts: Sequence[Part], slots: Any, step: int) -> None:
        """I6: each sequence's number of folded tokens is ours, and they are its own tokens."""
        living = {handle.epoch for handle in held(slots)}
        self._fed = {epoch: fed for epoch, fed in self._fed.items() if epoch in living}
        for part in parts:
            sequence = part.sequence
            fed, more = self._fed.get(sequence.slot.epoch, ([], 0))
            at = {"step": step, "request": sequence.number, "slot": part.slot}
            if not len(fed) <= sequence.num_computed <= len(fed) + more:
                what = f"{sequence.num_computed} tokens claimed, {len(fed)} were folded in"
                raise InvariantError("I6", what, **at)
            if sequence.tokens[: len(fed)] != fed:
                raise InvariantError("I6", "its tokens are not those folded in", **at)

    def record(self, parts: Sequence[Part]) -> None:
        """A step has run; of several decode steps only the first token is known."""
        for part in parts:
            sequence, start = part.sequence, part.sequence.num_computed
            sure = 1 if part.is_decode else part.count
            self._fed[sequence.slot.epoch] = (
                list(sequence.tokens[: start + sure]),
                part.count - sure,
            )


def written(parts: Sequence[Part], page_size: int) -> Iterator[tuple[int, int]]:
    """(page, row within it) of every token a step folds in."""
    for part in parts:
        for position in part.span:
            entry = position // page_size
            if entry < len(part.sequence.pages.pages):
                yield part.sequence.pages.pages[entry], position % page_size
