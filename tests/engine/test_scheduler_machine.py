"""Any order of events over ledgers and scheduler, without a model; more than 100,000 operations.

The machine plays the engine (plan, commit, tokens, ends) and its users, with random budgets, cuts,
preemptions and steps a call, and after every operation checks that no slot or page is held twice
or lost, that every handle is the one in force, and that each plan keeps to its budget and, in
exact mode, to the grid. At the end of each run everybody who is left must finish.
"""

from __future__ import annotations

import random
from itertools import count
from typing import Any

import pytest
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

from bailing_jax.engine.limits import DECODE_STEPS
from bailing_jax.engine.pages import PageHandle, PageLedger
from bailing_jax.engine.scheduler import Scheduler, Sequence, StepPlan
from bailing_jax.engine.slots import SlotHandle, SlotLedger

PAGE_SIZE, CHUNK = 4, 8


class World:
    """A scheduler, its requests and what each must be, whatever drives them."""

    def __init__(self, exact: bool, num_slots: int, num_pages: int, max_segments: int) -> None:
        self.exact = exact
        self.slots, self.pages = SlotLedger(num_slots), PageLedger(num_pages, PAGE_SIZE)
        self.scheduler = Scheduler(self.slots, self.pages, CHUNK, max_segments, exact)
        self.alive: dict[int, Sequence] = {}
        self.folded: dict[int, list[int]] = {}  # what a state would have been fed
        self.old: list[SlotHandle | PageHandle] = []
        self.num_planned_on = 0
        self._numbers, self._tokens = count(1), count(1000)

    def submit(self, num_prompt: int, num_new: int, ahead: bool) -> None:
        length = num_prompt + num_new
        if self.pages.pages_for(length) > self.pages.capacity:
            return
        number = next(self._numbers)
        prompt = [next(self._tokens) for _ in range(num_prompt)]
        sequence = Sequence(number, prompt, num_prompt, length, several_steps=ahead)
        self.scheduler.submit(sequence)
        self.alive[number], self.folded[number] = sequence, []

    def cancel(self, number: int) -> None:
        sequence = self.alive.pop(number)
        self.old += [handle for handle in (sequence.slot, sequence.pages) if handle is not None]
        self.scheduler.remove(sequence)
        del self.folded[number]
        assert (sequence.slot, sequence.pages) == (None, None)

    def step(
        self, budget: int | None, cuts: dict[int, int], preempt: set[int], steps: int, luck: int
    ) -> StepPlan:
        """A plan and, where there may be one, the plan made on before its tokens are known."""
        before = {n: s.num_preempted for n, s in self.alive.items()}
        running = {s.number for s in self.scheduler.running}
        plan = self.scheduler.plan(budget=budget, cuts=cuts, preempt=preempt, max_steps=steps)
        for number, sequence in self.alive.items():
            if sequence.num_preempted > before[number]:
                self.folded[number] = []
            elif number in preempt:
                assert number not in running
        self.check(plan, CHUNK if budget is None else budget)
        on = self.scheduler.plan_on(plan, steps)
        if on is not None:
            self.check_on(plan, on)
        self.commit(plan, luck)
        if on is not None:
            self.num_planned_on += 1
            self.check_books()
            self.commit(on, luck + 1 if luck else 0)
        return plan

    def check_on(self, plan: StepPlan, on: StepPlan) -> None:
        """It is for the same rows, with pages for the most that both calls can fold in."""
        assert on.decodes == plan.decodes
        assert not on.segments
        assert not self.scheduler.waiting
        for sequence in on.decodes:
            both = sequence.num_computed + plan.num_steps + on.num_steps
            assert sequence.pages is not None
            assert len(sequence.pages.pages) * PAGE_SIZE >= min(both, sequence.max_length)
        assert any(len(s.tokens) + plan.num_steps < s.max_length for s in on.decodes)
        self.check_books()

    def check(self, plan: StepPlan, budget: int) -> None:
        rows = plan.decode_rows() + plan.segment_rows()
        slots = [row.slot for row in rows]
        pages = [page for row in rows for page in row.pages]
        assert len(set(slots)) == len(slots)
        assert len(set(pages)) == len(pages)
        assert plan.num_prefill_tokens <= budget
        assert len(plan.segments) <= self.scheduler.max_segments
        assert plan.num_steps == 1 or not plan.segments
        for sequence in (*plan.decodes, *(s for s, _ in plan.segments)):
            assert self.alive[sequence.number] is sequence
            assert len(self.folded[sequence.number]) == sequence.num_computed
        for sequence in plan.decodes:
            assert sequence.num_computed >= sequence.num_prompt
            assert plan.num_steps == 1 or sequence.num_computed == len(sequence.tokens) - 1
            ahead = min(sequence.num_computed + plan.num_steps, sequence.max_length)
            assert sequence.pages is not None
            assert len(sequence.pages.pages) * PAGE_SIZE >= ahead
        for sequence, length in plan.segments:
            start, end = sequence.num_computed, sequence.num_computed + length
            assert 0 < end <= len(sequence.tokens)
            if self.exact:
                assert start % CHUNK == 0
                assert end == min(start + CHUNK, sequence.num_prompt)

    def commit(self, plan: StepPlan, luck: int) -> None:
        """Fold what was planned in; every whole sequence gets a token for each step."""
        counts = {}
        for sequence in plan.decodes:
            # Of one that has ended since the plan nothing comes any more.
            room = sequence.max_length - len(sequence.tokens)
            counts[sequence.number] = min(plan.num_steps, room) * (sequence.number in self.alive)
        living = [(s, counts[s.number]) for s in plan.decodes if s.number in self.alive]
        planned = living + list(plan.segments)
        starts = [sequence.num_computed for sequence, _ in planned]
        self.scheduler.commit(plan, counts)
        for (sequence, length), start in zip(planned, starts, strict=True):
            decodes = sequence.number in counts
            if sequence.num_computed >= len(sequence.tokens):
                for _ in range(length if decodes else 1):
                    sequence.tokens.append(next(self._tokens))
            self.folded[sequence.number] += sequence.tokens[start : sequence.num_computed]
            ends = len(sequence.tokens) >= sequence.max_length
            if ends or (decodes and luck and (luck + sequence.number) % 7 == 0):
                self.cancel(sequence.number)

    def check_books(self) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert {s.number for s in (*running, *waiting)} == set(self.alive)
        assert len(running) + len(waiting) == len(self.alive)
        slots = [s.slot for s in running if s.slot is not None]
        pages = [s.pages for s in running if s.pages is not None]
        assert len(slots) == len(pages) == len(running)
        assert all(s.slot is None and s.pages is None for s in waiting)
        assert all(h.owner == s.number for s, h in zip(running, slots, strict=True))
        assert all(h.owner == s.number for s, h in zip(running, pages, strict=True))
        assert self.slots._held == {h.owner: h for h in slots}
        assert self.pages._held == {h.owner: h for h in pages}
        held = [page for handle in pages for page in handle.pages]
        for used, free, capacity in (
            ([h.slot for h in slots], self.slots._free, self.slots.capacity),
            (held, self.pages._free, self.pages.capacity),
        ):
            assert sorted([*used, *free]) == list(range(1, capacity + 1))
        for queue in (running, waiting):
            places = [s.place for s in queue]
            assert places == sorted(places)

    def drain(self) -> None:
        """With no more wishes everybody ends, the oldest first to be sure of it."""
        bound = sum(s.max_length for s in self.alive.values()) * (1 + len(self.alive))
        while self.alive:
            oldest = min(self.alive.values(), key=lambda s: s.place)
            before = (oldest.num_computed, oldest.slot is None)
            self.step(None, {}, set(), DECODE_STEPS, 0)
            self.check_books()
            still = self.alive.get(oldest.number)
            if still is not None and not before[1]:
                assert still.num_computed > before[0]
            bound -= 1
            assert bound > 0, "somebody starves"
        assert self.slots.num_free == self.slots.capacity
        assert self.pages.num_free == self.pages.capacity


class Machine(RuleBasedStateMachine):
    """`World`, driven by hypothesis."""

    world: World

    @initialize(
        exact=st.booleans(),
        num_slots=st.integers(1, 4),
        num_pages=st.integers(3, 14),
        max_segments=st.integers(1, 3),
    )
    def start(self, exact: bool, num_slots: int, num_pages: int, max_segments: int) -> None:
        self.world = World(exact, num_slots, num_pages, max_segments)

    @rule(num_prompt=st.integers(1, 20), num_new=st.integers(1, 20), ahead=st.booleans())
    def submit(self, num_prompt: int, num_new: int, ahead: bool) -> None:
        self.world.submit(num_prompt, num_new, ahead)

    @precondition(lambda self: self.world.alive)
    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        self.world.cancel(sorted(self.world.alive)[which % len(self.world.alive)])

    @rule(
        budget=st.one_of(st.none(), st.integers(0, CHUNK)),
        cut=st.integers(0, 9),
        preempt=st.sets(st.integers(0, 6), max_size=2),
        steps=st.integers(1, DECODE_STEPS),
        luck=st.integers(0, 6),
    )
    def step(
        self, budget: int | None, cut: int, preempt: set[int], steps: int, luck: int
    ) -> None:
        numbers = sorted(self.world.alive)
        cuts = {number: cut for number in numbers[:2] if cut != 9}
        forced = {numbers[i] for i in preempt if i < len(numbers)}
        self.world.step(budget, cuts, forced, steps, luck)

    @precondition(lambda self: self.world.old)
    @rule(which=st.integers(0, 50))
    def give_a_stale_handle_back(self, which: int) -> None:
        handle = self.world.old[which % len(self.world.old)]
        ledger: Any = self.world.slots if isinstance(handle, SlotHandle) else self.world.pages
        with pytest.raises(ValueError, match="is not held"):
            ledger.free(handle)

    @invariant()
    def books(self) -> None:
        if hasattr(self, "world"):
            self.world.check_books()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


def test_r023_any_order_of_events_keeps_the_books() -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=150, stateful_step_count=50, deadline=None)
    )


@pytest.mark.parametrize("exact", [False, True])
def test_r024_a_hundred_thousand_operations_keep_the_books(exact: bool) -> None:
    """The same rules from a plain generator, which is several times faster: 50,000 each."""
    rng = random.Random(f"schedules {exact}")
    done = preempted = several = planned_on = 0
    while done < 50_000:
        sizes = rng.randint(1, 5), rng.randint(3, 20), rng.randint(1, 3)
        world = World(exact, *sizes)
        for _ in range(200):
            done += 1
            what, numbers = rng.random(), sorted(world.alive)
            if what < 0.25:
                world.submit(rng.randint(1, 24), rng.randint(1, 24), rng.random() < 0.8)
            elif what < 0.32 and numbers:
                world.cancel(rng.choice(numbers))
            else:
                budget = rng.choice([None, None, rng.randint(0, CHUNK)])
                cuts = {n: rng.randint(0, 9) for n in numbers if rng.random() < 0.1}
                forced = {n for n in numbers if rng.random() < 0.05}
                plan = world.step(budget, cuts, forced, rng.randint(1, 8), rng.randint(0, 6))
                several += plan.num_steps > 1
            world.check_books()
            preempted += sum(s.num_preempted > 0 for s in world.alive.values())
        world.drain()
        planned_on += world.num_planned_on
    assert min(preempted, several, planned_on) > 500  # what the test is about did happen
