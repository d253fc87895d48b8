"""Several shards, one step: who runs where, and what the programs of a step are.

A shard is one set of devices with rows, slots and pages of its own; it numbers them from 1, and
only its own ledgers know who holds them. All shards run the same program at the same time, so each
call has one size and one number of steps; a shard with nothing to do takes part with padding.

Requests wait in one queue and get their shard when they start, for good: whoever gives way comes
back to it. Every process of a job runs this code and must come to the same plans, so nothing here
looks at clocks, addresses or the order of sets. Host only, no arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bailing_jax.engine import debug, scheduler, sizes
from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.scheduler import Scheduler, StepPlan
from bailing_jax.engine.sizes import ProgramSize
from bailing_jax.engine.slots import SlotLedger

if TYPE_CHECKING:
    from bailing_jax.engine.limits import EngineLimits

_NOBODY = StepPlan((), ())


@dataclass(frozen=True)
class CallPlan:
    """What one call of a program computes: a plan for each shard, all with as many steps.

    Attributes:
        shards: by shard; empty ones take part with padding.
        size: of the program, the same for all.
    """

    shards: tuple[StepPlan, ...]
    size: ProgramSize

    @property
    def num_steps(self) -> int:
        """Decode steps, the same for all."""
        return self.shards[0].num_steps

    @property
    def rows_a_shard(self) -> int:
        """B = D + P."""
        return self.size.decode_rows + self.size.segments

    def decodes(self) -> dict[int, scheduler.Sequence]:
        """The decoding sequences by their row among the S x (D + P) of the call."""
        return {
            shard * self.rows_a_shard + i: sequence
            for shard, plan in enumerate(self.shards)
            for i, sequence in enumerate(plan.decodes)
        }

    def rows(self) -> Mapping[int, scheduler.Sequence]:
        """All sequences by their row among the S x (D + P) of the call, shard by shard."""
        return self._rows

    @functools.cached_property
    def _rows(self) -> dict[int, scheduler.Sequence]:
        found: dict[int, scheduler.Sequence] = {}
        for shard, plan in enumerate(self.shards):
            first = shard * self.rows_a_shard
            found.update(enumerate(plan.decodes, first))
            segments = (sequence for sequence, _ in plan.segments)
            found.update(enumerate(segments, first + self.size.decode_rows))
        return found


def call_of_nobody(size: ProgramSize, num_shards: int) -> CallPlan:
    """Nothing but padding: the shapes of a call of this size."""
    return CallPlan((_NOBODY,) * num_shards, size)


@dataclass(frozen=True)
class Shard:
    """The host's books of one shard."""

    scheduler: Scheduler
    debug: debug.Debug

    def wait_here(self) -> tuple[int, int, int]:
        """What says how soon a newcomer is served here, least first.

        Prefill calls before its first one; then the rows it shares each step with, and the tokens
        those may still take.
        """
        books = self.scheduler
        left = sum(s.max_length - s.num_computed for s in books.running)
        return books.prefill_left // books.prefill_chunk, len(books.running), left


class Shards:
    """All shards of an engine, and the requests that have none yet.

    Args:
        limits: of each shard, and how many there are.
        num_pages: that each shard can hand out.
        new_debug: the debug mode of one shard.
    """

    def __init__(
        self, limits: EngineLimits, num_pages: int, new_debug: Callable[[], debug.Debug]
    ) -> None:
        self._limits = limits
        self.waiting: list[scheduler.Sequence] = []
        self.all = tuple(
            Shard(_scheduler(limits, num_pages), new_debug()) for _ in range(limits.num_shards)
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting) or any(shard.scheduler.has_work for shard in self.all)

    @property
    def is_running(self) -> bool:
        """Whether anybody holds a slot."""
        return any(shard.scheduler.running for shard in self.all)

    def submit(self, sequence: scheduler.Sequence) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run.
        """
        if len(self.all) == 1:
            self.all[0].scheduler.submit(sequence)
            return
        self.all[0].scheduler.check(sequence)  # all are alike
        self.waiting.append(sequence)

    def remove(self, sequence: scheduler.Sequence) -> None:
        """End a request at any point."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.all[sequence.shard].scheduler.remove(sequence)

    def plan(
        self,
        *,
        budget: int | None = None,
        cuts: Mapping[int, int] | None = None,
        preempt: Collection[int] = (),
        max_steps: int = 1,
    ) -> list[CallPlan]:
        """The calls of the next step, see `Scheduler.plan`; budget and cuts are of each shard."""
        if len(self.all) == 1:
            only = self.all[0].scheduler
            plan = only.plan(budget=budget, cuts=cuts, preempt=preempt, max_steps=max_steps)
            return self._calls([plan])
        for shard in self.all:
            shard.scheduler.make_room(preempt)
        self._hand_out()
        plans = [shard.scheduler.plan(budget=budget, cuts=cuts) for shard in self.all]
        steps = self._common_steps(plans, max_steps)
        return self._calls(
            [
                shard.scheduler.take_steps(plan, steps)
                for shard, plan in zip(self.all, plans, strict=True)
            ]
        )

    def plan_on(self, call: CallPlan, max_steps: int) -> CallPlan | None:
        """The call behind one of decodes that runs still, in all shards; None where one must wait.

        See `Scheduler.steps_on`.
        """
        if self.waiting:
            return None
        steps = max_steps
        for shard, plan in zip(self.all, call.shards, strict=True):
            if plan.decodes or shard.scheduler.has_work:
                steps = shard.scheduler.steps_on(plan, steps)
        if steps == 0:
            return None
        plans = [
            shard.scheduler.take_steps(plan, steps, begun=plan.num_steps)
            for shard, plan in zip(self.all, call.shards, strict=True)
        ]
        return CallPlan(tuple(plans), call.size)

    def commit(self, call: CallPlan, came: Sequence[int]) -> None:
        """Record what a call has folded in; `came`: how many tokens each of its rows gave."""
        counts = {sequence.number: came[row] for row, sequence in call.decodes().items()}
        for shard, plan in zip(self.all, call.shards, strict=True):
            shard.scheduler.commit(plan, counts)

    def before(self, call: CallPlan, layouts: Sequence[Any], state: Any) -> Any:
        """Debug mode's checks of each shard before a call; the state, poisoned."""
        if not self.all[0].debug.on:
            return state
        states = debug.apart(state, len(self.all))
        checked = [
            shard.debug.before(plan, layout, part, shard.scheduler)
            for shard, plan, layout, part in zip(
                self.all, call.shards, layouts, states, strict=True
            )
        ]
        return debug.together(checked, state)

    def after(self, state: Any, logits: Any) -> None:
        """Debug mode's checks of what a call left; logits are [B, vocab], or one each a shard."""
        if not self.all[0].debug.on:
            return
        each = [logits] if len(self.all) == 1 else logits
        states = debug.apart(state, len(self.all))
        for shard, part, rows in zip(self.all, states, each, strict=True):
            shard.debug.after(part, rows)

    def _hand_out(self) -> None:
        """Whoever waits longest starts in the shard that serves it soonest, while one has room."""
        while self.waiting:
            first = self.waiting[0]
            able = [i for i, s in enumerate(self.all) if s.scheduler.has_room_for(first)]
            if not able:
                return
            # Among equals the lowest number.
            first.shard = min(able, key=lambda i: self.all[i].wait_here())
            books = self.all[first.shard].scheduler
            books.submit(self.waiting.pop(0))
            books.make_room()

    def _common_steps(self, plans: Sequence[StepPlan], most: int) -> int:
        """Decode steps that every shard with work can run in one call; at least one."""
        steps = most
        for shard, plan in zip(self.all, plans, strict=True):
            if plan.decodes or plan.segments:
                wait = bool(self.waiting)
                steps = shard.scheduler.possible_steps(plan, steps, others_wait=wait)
        return max(steps, 1)

    def _calls(self, plans: Sequence[StepPlan]) -> list[CallPlan]:
        """What runs as one call: all together, of the size that the fullest shard needs.

        In exact mode decodes are a call, and the prefills of each size: a size must follow from
        each sequence alone.
        """
        limits = self._limits
        tokens = [plan.num_prefill_tokens for plan in plans]
        if not limits.exact:
            if any(tokens):
                return [CallPlan(tuple(plans), sizes.prefill_size(limits, max(tokens)))]
            return self._decodes(plans)
        calls = self._decodes([StepPlan(p.decodes, (), p.num_steps) for p in plans])
        needed = [sizes.prefill_size(limits, count) if count else None for count in tokens]
        for size in sorted({size for size in needed if size is not None}):
            shards = [
                StepPlan((), plan.segments) if need == size else _NOBODY
                for plan, need in zip(plans, needed, strict=True)
            ]
            calls.append(CallPlan(tuple(shards), size))
        return calls

    def _decodes(self, plans: Sequence[StepPlan]) -> list[CallPlan]:
        most = max(len(plan.decodes) for plan in plans)
        if most == 0:
            return []
        return [CallPlan(tuple(plans), sizes.decode_size(self._limits, most))]


def _scheduler(limits: EngineLimits, num_pages: int) -> Scheduler:
    """Free ledgers, and nobody in them."""
    return Scheduler(
        slots=SlotLedger(limits.max_num_seqs),
        pages=PageLedger(num_pages, limits.page_size),
        prefill_chunk=limits.prefill_chunk,
        max_segments=sizes.max_segments(limits),
        exact=limits.exact,
        prefill_rows=sizes.prefill_rows(limits),
    )
