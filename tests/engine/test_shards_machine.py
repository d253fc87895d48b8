"""Any order of events over the books of several shards, without a model.

After every operation: each shard's slots and pages are held once or free, by requests of that shard
alone; what a call names in a shard is what that shard's books gave. At the end all that are left
finish.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bailing_jax.engine.debug import Debug
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.scheduler import Sequence
from bailing_jax.engine.shards import CallPlan, Shards

LIMITS = EngineLimits(max_num_seqs=3, max_model_len=28, prefill_chunk=8, page_size=4)


class ShardsMachine(RuleBasedStateMachine):
    """The engine's part and the users' part of what happens to `Shards`."""

    @initialize(
        shards=st.integers(2, 4), pages=st.integers(7, 16), exact=st.booleans(),
        small=st.sampled_from([(), (1, 3)]),
    )  # fmt: skip
    def begin(self, shards: int, pages: int, exact: bool, small: tuple[int, ...]) -> None:
        limits = replace(LIMITS, num_shards=shards, exact=exact, small_prefills=small)
        self.limits, self.num_pages = limits, pages
        self.shards = Shards(limits, pages, lambda: Debug(None, 4, on=False))
        self.alive: dict[int, Sequence] = {}
        self.home: dict[int, int] = {}
        self.numbers = count(1)

    @rule(num_prompt=st.integers(1, 20), num_new=st.integers(1, 8), ahead=st.booleans())
    def submit(self, num_prompt: int, num_new: int, ahead: bool) -> None:
        number = next(self.numbers)
        prompt = list(range(num_prompt))
        length = num_prompt + num_new
        sequence = Sequence(number, prompt, num_prompt, length, several_steps=ahead)
        self.shards.submit(sequence)
        self.alive[number] = sequence

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        self._end(sorted(self.alive)[which % len(self.alive)])

    @rule(
        budget=st.none() | st.integers(0, 8),
        preempt=st.sets(st.integers(1, 12), max_size=2),
        steps=st.integers(1, 8),
        ends=st.sets(st.integers(1, 12), max_size=2),
        on=st.booleans(),
    )
    def step(
        self, budget: int | None, preempt: set[int], steps: int, ends: set[int], on: bool
    ) -> None:
        calls = self.shards.plan(budget=budget, preempt=preempt, max_steps=steps)
        for call in calls:
            self._check(call)
        behind = self.shards.plan_on(calls[0], steps) if on and len(calls) == 1 else None
        if behind is not None:
            self._check(behind)
            assert not self.shards.waiting
        for call in calls:
            self._finish(call, ends)
        if behind is not None:
            self._finish(behind, ends)

    def _check(self, call: CallPlan) -> None:
        """It fits its size, and every row is of the shard that holds its slot and pages."""
        assert len({plan.num_steps for plan in call.shards}) == 1
        assert call.rows()
        for shard, plan in enumerate(call.shards):
            assert len(plan.decodes) <= call.size.decode_rows
            assert len(plan.segments) <= call.size.segments
            assert plan.num_prefill_tokens <= call.size.prefill_rows
            assert plan.num_steps == 1 or not plan.segments
            books = self.shards.all[shard].scheduler
            for sequence in (*plan.decodes, *(s for s, _ in plan.segments)):
                assert sequence.slot == books.slots._held[sequence.number]
                assert sequence.pages == books.pages._held[sequence.number]
                assert self.home.setdefault(sequence.number, shard) == shard == sequence.shard
            for sequence in plan.decodes:
                ahead = min(sequence.num_computed + plan.num_steps, sequence.max_length)
                assert sequence.pages is not None
                assert len(sequence.pages.pages) * LIMITS.page_size >= ahead

    def _finish(self, call: CallPlan, ends: set[int]) -> None:
        came = [0] * (len(call.shards) * call.rows_a_shard)
        for row, sequence in call.rows().items():
            room = sequence.max_length - len(sequence.tokens)
            came[row] = min(call.num_steps, max(room, 1)) if self._lives(sequence) else 0
        self.shards.commit(call, came)
        for row, sequence in call.rows().items():
            several = call.num_steps > 1
            if not self._lives(sequence):
                continue
            if several or sequence.num_computed == len(sequence.tokens):
                sequence.tokens += [0] * min(
                    came[row] if several else 1, sequence.max_length - len(sequence.tokens)
                )
            if len(sequence.tokens) >= sequence.max_length or sequence.number in ends:
                self._end(sequence.number)

    def _lives(self, sequence: Sequence) -> bool:
        return self.alive.get(sequence.number) is sequence

    def _end(self, number: int) -> None:
        sequence = self.alive.pop(number)
        self.shards.remove(sequence)
        assert (sequence.slot, sequence.pages) == (None, None)

    @invariant()
    def books_are_whole(self) -> None:
        """In each shard, and no request is in two of them."""
        if not hasattr(self, "shards"):
            return
        owners: list[int] = []
        for shard in self.shards.all:
            slots, pages = shard.scheduler.slots, shard.scheduler.pages
            held: list[Any] = [h.slot for h in slots._held.values()]
            assert sorted([*slots._free, *held]) == list(range(1, LIMITS.max_num_seqs + 1))
            held = [page for h in pages._held.values() for page in h.pages]
            assert sorted([*pages._free, *held]) == list(range(1, self.num_pages + 1))
            assert slots._held.keys() == pages._held.keys()
            owners += slots._held
            owners += [s.number for s in shard.scheduler.waiting]
        owners += [s.number for s in self.shards.waiting]
        assert sorted(owners) == sorted(self.alive)

    def teardown(self) -> None:
        """Nobody starves."""
        left = sum(s.max_length for s in getattr(self, "alive", {}).values())
        for _ in range(left * (1 + len(getattr(self, "alive", {})))):
            if not self.alive:
                break
            self.step(None, set(), 8, set(), False)
        if hasattr(self, "shards"):
            assert not self.shards.has_work


def test_r097_no_slot_or_page_leaves_its_shard() -> None:
    run_state_machine_as_test(
        ShardsMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
