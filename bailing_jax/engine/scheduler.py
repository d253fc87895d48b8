"""Who runs in the next step. Host only, no arrays.

Requests are served in order of arrival, and whoever came first keeps that place for good. A
request is admitted when a slot is free and pages for the tokens it has; it gets further pages as
it grows. Where they run out the youngest running request gives way: its slot and pages are taken,
and it waits at its old place to be computed again. The youngest itself, when there is nobody
younger, stands still with what it has. So the oldest always moves on, and everybody ends.

Every running sequence with state and one new token decodes in every step; what is left of the
token budget prefills waiting prompts, oldest first, in segments. In exact mode prompts are cut only
at multiples of `prefill_chunk` from token 0, pieces prefill together only where each alone would
take a call of the same size, and generated tokens always go through decode, also when they are
computed again: then a token's arithmetic is that of the request alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from bailing_jax.engine.pages import PageHandle, PageLedger
from bailing_jax.engine.slots import SlotHandle, SlotLedger
from bailing_jax.row import Row


@dataclass(eq=False)
class Sequence:
    """One request in the engine.

    Attributes:
        number: its identity in this engine.
        tokens: prompt and generated tokens.
        num_prompt: how many of them are the prompt.
        max_length: the most tokens it can come to hold.
        several_steps: whether the host need not see each token before the next is computed.
        num_computed: tokens folded into its state.
        place: its place in the order of arrival.
        num_preempted: how often it had to give way.
        shard: the shard that it runs in and comes back to; see `shards`.
    """

    number: int
    tokens: list[int]
    num_prompt: int
    max_length: int
    several_steps: bool = True
    num_computed: int = 0
    place: int = 0
    num_preempted: int = 0
    shard: int = 0
    slot: SlotHandle | None = None
    pages: PageHandle | None = None


@dataclass(frozen=True)
class StepPlan:
    """The sequences of a step: decoding ones, and prefilling ones with their token counts.

    `num_steps` above 1 lets a step without segments decode that many tokens a sequence; the
    pages for them are allocated.
    """

    decodes: tuple[Sequence, ...]
    segments: tuple[tuple[Sequence, int], ...]
    num_steps: int = 1

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


def _place(sequence: Sequence) -> int:
    return sequence.place


@dataclass
class Scheduler:
    """Plans steps over the two ledgers.

    Attributes:
        slots: the slot ledger.
        pages: the page ledger.
        prefill_chunk: prefill tokens a step, and in exact mode the grid prompts are cut on.
        max_segments: segments a step.
        exact: see above.
        prefill_rows: the sizes of prefill calls, ascending; looked at in exact mode only.
        waiting: without slot and pages, in order of arrival.
        running: with both, in order of arrival.
    """

    slots: SlotLedger
    pages: PageLedger
    prefill_chunk: int
    max_segments: int
    exact: bool = False
    prefill_rows: tuple[int, ...] = ()
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    _arrivals: int = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def submit(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            ValueError: as `check`.
        """
        self.check(sequence)
        self._arrivals += 1
        sequence.place = self._arrivals
        self.waiting.append(sequence)

    def check(self, sequence: Sequence) -> None:
        """Refuse what could never run.

        Raises:
            ValueError: it could never be admitted, or brings no tokens.
        """
        if not sequence.tokens:
            raise ValueError(f"request {sequence.number} has no tokens")
        if self.pages.pages_for(sequence.max_length) > self.pages.capacity:
            raise ValueError(f"request {sequence.number}: {sequence.max_length} tokens never fit")

    def plan(
        self,
        *,
        budget: int | None = None,
        cuts: Mapping[int, int] | None = None,
        preempt: Collection[int] = (),
        max_steps: int = 1,
    ) -> StepPlan:
        """Make room, admit what fits and choose the next step.

        Args:
            budget: fewer prefill tokens than usual; None: as many as there may be.
            cuts: most prefill tokens by request number; in exact mode moved down to the grid.
            preempt: numbers of running requests that give way now, whatever room there is.
            max_steps: decode steps that one call may run.
        """
        ready = self.make_room(preempt)
        segments = self._segments(self.prefill_chunk if budget is None else budget, cuts or {})
        plan = StepPlan(tuple(ready), tuple(segments))
        return self.take_steps(plan, self.possible_steps(plan, max_steps))

    def make_room(self, preempt: Collection[int] = ()) -> list[Sequence]:
        """Pages for whoever decodes, then slots and pages for whoever waits; who decodes."""
        for sequence in [s for s in self.running if s.number in preempt]:
            self._preempt(sequence)
        ready = [s for s in list(self.running) if self._decodes(s) and self._grow(s)]
        # Whoever an older one has driven out since is not ready any more.
        ready = [s for s in ready if s.slot is not None]
        while self.waiting and self._fits(self.waiting[0]):
            self._start(self.waiting.pop(0))
        return ready

    def has_room_for(self, sequence: Sequence) -> bool:
        """Whether a request that comes now would start at once."""
        return not self.waiting and self._fits(sequence)

    @property
    def prefill_left(self) -> int:
        """Prompt tokens of those who run, not folded in yet."""
        return sum(self._prefill_left(s) for s in self.running if not self._decodes(s))

    def possible_steps(
        self, plan: StepPlan, most: int, *, begun: int = 0, others_wait: bool = False
    ) -> int:
        """How many decode steps one call of a plan may run; 0 where nothing but one will do.

        Nobody gives way for them: pages must be free. While others wait, here or (`others_wait`)
        elsewhere, no row may idle at its known end. `begun` steps run already, and may give a
        token each.
        """
        ready = plan.decodes
        if plan.segments or not ready or not all(self._may_run_ahead(s) for s in ready):
            return 0
        rooms = [s.max_length - len(s.tokens) - begun for s in ready]
        steps = min(most, min(rooms) if self.waiting or others_wait else max(rooms))
        while steps > 0:
            if sum(self._missing(s, begun + steps) for s in ready) <= self.pages.num_free:
                return steps
            steps //= 2
        return 0

    def take_steps(self, plan: StepPlan, steps: int, *, begun: int = 0) -> StepPlan:
        """The plan with so many steps, `possible_steps` at most, and the pages for them."""
        for sequence in plan.decodes if steps else ():
            if sequence.pages is not None:
                length = min(sequence.num_computed + begun + steps, sequence.max_length)
                sequence.pages = self.pages.grow(sequence.pages, length)
        return StepPlan(plan.decodes, plan.segments, max(steps, 1))

    def steps_on(self, plan: StepPlan, most: int) -> int:
        """How many steps may run behind those of `plan`, which run still; 0: see its tokens first.

        They are for the same sequences, all of which still hold what they held, and only while
        nobody waits. So no slot or page named in the running step is free, and none of them can be
        handed out here.
        """
        if self.waiting or plan.segments or set(plan.decodes) != set(self.running):
            return 0
        return self.possible_steps(plan, most, begun=plan.num_steps)

    def plan_on(self, plan: StepPlan, max_steps: int) -> StepPlan | None:
        """The step behind one of decodes that runs still; None where its tokens must be seen first.

        See `steps_on`.
        """
        steps = self.steps_on(plan, max_steps)
        return self.take_steps(plan, steps, begun=plan.num_steps) if steps else None

    def commit(self, plan: StepPlan, counts: Mapping[int, int] | None = None) -> None:
        """Record that the step's tokens are folded in; `counts` by number where not one each."""
        for sequence in plan.decodes:
            sequence.num_computed += 1 if counts is None else counts[sequence.number]
        for sequence, count in plan.segments:
            sequence.num_computed += count

    def remove(self, sequence: Sequence) -> None:
        """End a request at any point, queued or not, and take its slot and pages back."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._take_back(sequence)

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether it has state and its next token is one it generated itself."""
        if self.exact:
            return sequence.num_computed >= sequence.num_prompt
        left = len(sequence.tokens) - sequence.num_computed
        return left == 1 and len(sequence.tokens) > sequence.num_prompt

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for its next token, if need be from the youngest; whether it has them."""
        if sequence.pages is None:  # driven out by an older one
            return False
        wanted = sequence.num_computed + 1
        missing = self.pages.pages_for(wanted) - len(sequence.pages.pages)
        while missing > self.pages.num_free:
            if self.running[-1] is sequence:
                return False
            self._preempt(self.running[-1])
        sequence.pages = self.pages.grow(sequence.pages, wanted)
        return True

    def _missing(self, sequence: Sequence, steps: int) -> int:
        """Pages it lacks for so many steps more."""
        length = min(sequence.num_computed + steps, sequence.max_length)
        held = 0 if sequence.pages is None else len(sequence.pages.pages)
        return max(self.pages.pages_for(length) - held, 0)

    def _may_run_ahead(self, sequence: Sequence) -> bool:
        return sequence.several_steps and sequence.num_computed == len(sequence.tokens) - 1

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a slot is free, and pages for what it has and for those who run to grow."""
        if not self.slots.num_free:
            return False
        needed = self.pages.pages_for(self._first_length(sequence)) + self._soon_needed()
        return needed <= self.pages.num_free

    def _first_length(self, sequence: Sequence) -> int:
        return min(len(sequence.tokens) + 1, sequence.max_length)

    def _start(self, sequence: Sequence) -> None:
        sequence.slot = self.slots.allocate(sequence.number)
        sequence.pages = self.pages.allocate(sequence.number, self._first_length(sequence))
        bisect.insort(self.running, sequence, key=_place)

    def _soon_needed(self) -> int:
        """A page for each that can grow: else who comes in now is driven out a few steps later."""
        return sum(
            s.pages is not None and len(s.pages.pages) < self.pages.pages_for(s.max_length)
            for s in self.running
        )

    def _segments(self, budget: int, cuts: Mapping[int, int]) -> list[tuple[Sequence, int]]:
        """Pieces of prompts, oldest first; in exact mode those that need the first one's size."""
        segments: list[tuple[Sequence, int]] = []
        rows = 0
        for sequence in self.running:
            if budget <= 0 or len(segments) == self.max_segments:
                break
            if self._decodes(sequence):
                continue
            count = self._piece(sequence, budget, cuts.get(sequence.number))
            if count <= 0:
                continue
            if self.exact and not segments:
                rows = self._rows_for(count)
                budget = min(budget, rows)
            if not self.exact or self._rows_for(count) == rows:
                segments.append((sequence, count))
                budget -= count
        return segments

    def _rows_for(self, count: int) -> int:
        """The size of the prefill call that a piece takes, which its own length decides."""
        return next((r for r in self.prefill_rows if r >= count), self.prefill_chunk)

    def _piece(self, sequence: Sequence, budget: int, cut: int | None) -> int:
        """How many tokens of its prompt a sequence takes in now."""
        left = self._prefill_left(sequence)
        if not self.exact:
            return min(budget, left) if cut is None else min(budget, left, cut)
        count = min(left, self.prefill_chunk)
        if cut is not None and cut < count:
            return 0  # the grid has nothing between here and there
        return count if count <= budget else 0

    def _prefill_left(self, sequence: Sequence) -> int:
        tokens = sequence.num_prompt if self.exact else len(sequence.tokens)
        return tokens - sequence.num_computed

    def _preempt(self, sequence: Sequence) -> None:
        """Take its slot and pages; it waits at its place in the order of arrival."""
        self._take_back(sequence)
        sequence.num_computed = 0
        sequence.num_preempted += 1
        bisect.insort(self.waiting, sequence, key=_place)

    def _take_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.slot is not None:
            self.slots.free(sequence.slot)
        if sequence.pages is not None:
            self.pages.free(sequence.pages)
        sequence.slot = sequence.pages = None
