"""Who runs in the next step. Host only, no arrays.

Requests are served in order of arrival: one is admitted when a slot and all the pages it can
ever need are free. Every running sequence with state and one new token decodes in every step;
what is left of the token budget prefills waiting prompts, oldest first, in segments.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from bailing_jax.engine.pages import PageHandle, PageLedger
from bailing_jax.engine.slots import SlotHandle, SlotLedger
from bailing_jax.row import Row


@dataclass
class Sequence:
    """One request in the engine.

    Attributes:
        number: its identity in this engine.
        tokens: prompt and generated tokens.
        num_prompt: how many of them are the prompt.
        max_length: the most tokens it can come to hold.
        num_computed: tokens folded into its state.
    """

    number: int
    tokens: list[int]
    num_prompt: int
    max_length: int
    num_computed: int = 0
    slot: SlotHandle | None = None
    pages: PageHandle | None = None

    @property
    def decodes(self) -> bool:
        """Whether it has state and exactly one new token that it generated itself."""
        return len(self.tokens) > self.num_prompt and self.num_computed == len(self.tokens) - 1


@dataclass(frozen=True)
class StepPlan:
    """The sequences of a step: decoding ones, and prefilling ones with their token counts."""

    decodes: tuple[Sequence, ...]
    segments: tuple[tuple[Sequence, int], ...]

    @property
    def num_prefill_tokens(self) -> int:
        """New tokens of all segments."""
        return sum(count for _, count in self.segments)

    def decode_rows(self) -> list[Row]:
        """The decoding sequences as rows of a layout."""
        return [_row(sequence, 1) for sequence in self.decodes]

    def segment_rows(self) -> list[Row]:
        """The prefilling sequences as rows of a layout."""
        return [_row(sequence, count) for sequence, count in self.segments]


def _row(sequence: Sequence, count: int) -> Row:
    if sequence.slot is None or sequence.pages is None:
        raise ValueError(f"request {sequence.number} runs without slot or pages")
    start = sequence.num_computed
    return Row(
        tokens=sequence.tokens[start : start + count],
        slot=sequence.slot.slot,
        pages=sequence.pages.pages,
        context=start,
    )


@dataclass
class Scheduler:
    """Plans steps over the two ledgers.

    Attributes:
        slots: the slot ledger.
        pages: the page ledger.
        prefill_budget: prefill tokens a step.
        max_segments: segments a step.
    """

    slots: SlotLedger
    pages: PageLedger
    prefill_budget: int
    max_segments: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def submit(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never be admitted, or brings no tokens.
        """
        if not sequence.tokens:
            raise ValueError(f"request {sequence.number} has no tokens")
        if self.pages.pages_for(sequence.max_length) > self.pages.capacity:
            raise ValueError(f"request {sequence.number}: {sequence.max_length} tokens never fit")
        self.waiting.append(sequence)

    def plan(self) -> StepPlan:
        """Admit what fits and choose the next step."""
        while self.waiting and self.slots.num_free:
            first = self.waiting[0]
            if self.pages.pages_for(first.max_length) > self.pages.num_free:
                break
            first.slot = self.slots.allocate(first.number)
            first.pages = self.pages.allocate(first.number, first.max_length)
            self.running.append(self.waiting.popleft())
        budget = self.prefill_budget
        segments: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if sequence.decodes or not budget or len(segments) == self.max_segments:
                continue
            count = min(budget, len(sequence.tokens) - sequence.num_computed)
            segments.append((sequence, count))
            budget -= count
        return StepPlan(tuple(s for s in self.running if s.decodes), tuple(segments))

    def commit(self, plan: StepPlan) -> None:
        """Record that the step's tokens are folded in."""
        for sequence in plan.decodes:
            sequence.num_computed += 1
        for sequence, count in plan.segments:
            sequence.num_computed += count

    def remove(self, sequence: Sequence) -> None:
        """End a request at any point, queued or not, and take its slot and pages back."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        if sequence not in self.running:
            return
        self.running.remove(sequence)
        if sequence.slot is not None:
            self.slots.free(sequence.slot)
        if sequence.pages is not None:
            self.pages.free(sequence.pages)
        sequence.slot = sequence.pages = None
