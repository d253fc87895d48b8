"""Laws of the scheduler, without a model: who runs, in which part of the step, and that all end.

`Clients` plays engine and users and keeps its own book of what every request holds; each plan is
checked against that book. A "token" is a number counted up, so rows can be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.scheduler import Scheduler, Sequence, StepPlan
from bailing_jax.engine.slots import SlotLedger

PAGE_SIZE = 4


@dataclass
class Client:
    """What a request ought to hold."""

    sequence: Sequence
    tokens: list[int]
    num_prompt: int
    folded: int = 0
    given_way: int = 0

    @property
    def decodes(self) -> bool:
        return len(self.tokens) > self.num_prompt and self.folded == len(self.tokens) - 1


def pages_of(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def can_grow(sequence: Sequence) -> bool:
    assert sequence.pages is not None
    return len(sequence.pages.pages) < pages_of(sequence.max_length)


class Clients:
    """A scheduler and its requests in order of arrival."""

    def __init__(
        self, num_slots: int = 3, num_pages: int = 12, budget: int = 8, max_segments: int = 2
    ) -> None:
        self.slots, self.pages = SlotLedger(num_slots), PageLedger(num_pages, PAGE_SIZE)
        self.scheduler = Scheduler(self.slots, self.pages, budget, max_segments)
        self.alive: dict[int, Client] = {}
        self.ended: list[int] = []
        self._tokens = count(1000)

    def submit(self, num_prompt: int, num_new: int) -> int:
        number = len(self.alive) + len(self.ended) + 1
        prompt = [next(self._tokens) for _ in range(num_prompt)]
        sequence = Sequence(number, list(prompt), num_prompt, num_prompt + num_new)
        self.scheduler.submit(sequence)
        self.alive[number] = Client(sequence, prompt, num_prompt)
        return number

    def remove(self, number: int) -> None:
        client = self.alive.pop(number)
        self.scheduler.remove(client.sequence)
        self.ended.append(number)
        # R025: nothing that is over keeps a handle.
        assert client.sequence.slot is None
        assert client.sequence.pages is None

    def step(self) -> StepPlan:
        """One step: plan, check, fold, append a token to whoever is whole, end who is full."""
        plan = self.scheduler.plan()
        for client in self.alive.values():
            if client.sequence.num_preempted > client.given_way:
                client.given_way, client.folded = client.sequence.num_preempted, 0
        self.check(plan)
        self.scheduler.commit(plan)
        for sequence in plan.decodes:
            self.alive[sequence.number].folded += 1
        for sequence, length in plan.segments:
            self.alive[sequence.number].folded += length
        for number, client in list(self.alive.items()):
            if client.folded == len(client.tokens):
                token = next(self._tokens)
                client.tokens.append(token)
                client.sequence.tokens.append(token)
                if len(client.tokens) >= client.sequence.max_length:
                    self.remove(number)
        return plan

    def run(self) -> list[StepPlan]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
        return plans

    def check(self, plan: StepPlan) -> None:
        self.check_order(plan)
        self.check_rows(plan)
        running = [c.sequence for c in self.alive.values() if c.sequence.slot is not None]
        assert self.slots.num_free == self.slots.capacity - len(running)
        held = sum(len(s.pages.pages) for s in running if s.pages is not None)
        assert self.pages.num_free == self.pages.capacity - held

    def check_order(self, plan: StepPlan) -> None:
        """First come, first served; decoding never waits; the budget goes to the oldest."""
        alive = [c.sequence for c in self.alive.values()]
        running = [s for s in alive if s.slot is not None]
        assert running == alive[: len(running)]
        if len(running) < len(alive):
            need = pages_of(len(alive[len(running)].tokens) + 1) + sum(map(can_grow, running))
            assert not self.slots.num_free or need > self.pages.num_free
        decoding = [s for s in running if self.alive[s.number].decodes]
        if decoding != list(plan.decodes):  # the youngest stands still for want of a page
            assert decoding.pop() is running[-1]
            assert decoding == list(plan.decodes)
            assert not self.pages.num_free
        filling = [s for s in running if not self.alive[s.number].decodes]
        served = [s for s, _ in plan.segments]
        assert served == filling[: len(served)]
        left = [len(s.tokens) - self.alive[s.number].folded for s in filling]
        budget = self.scheduler.prefill_chunk
        assert len(served) <= self.scheduler.max_segments
        assert plan.num_prefill_tokens <= budget
        # Only the last segment is cut, and only by the budget; nobody is left out needlessly.
        for (_, length), want in zip(plan.segments[:-1], left, strict=False):
            assert length == want
        if plan.num_prefill_tokens < budget:
            assert [n for _, n in plan.segments] == left[: self.scheduler.max_segments]

    def check_rows(self, plan: StepPlan) -> None:
        """Rows say what the book says, and no slot or page occurs twice."""
        rows = plan.decode_rows() + plan.segment_rows()
        sequences = [*plan.decodes, *(s for s, _ in plan.segments)]
        slots = [row.slot for row in rows]
        pages = [page for row in rows for page in row.pages]
        assert len(set(slots)) == len(slots)
        assert len(set(pages)) == len(pages)
        assert min([*slots, *pages], default=1) >= 1
        for row, sequence in zip(rows, sequences, strict=True):
            client = self.alive[sequence.number]
            end = row.context + len(row.tokens)
            assert row.tokens
            assert row.context == client.folded
            assert row.tokens == client.tokens[row.context : end]
            assert len(row.pages) * PAGE_SIZE >= end
        for row in plan.decode_rows():
            assert row.context >= 1
            assert len(row.tokens) == 1


def shape(plan: StepPlan) -> tuple[list[int], list[tuple[int, int]]]:
    return [s.number for s in plan.decodes], [(s.number, n) for s, n in plan.segments]


# Order and budget.


def test_requests_are_served_in_order_of_arrival() -> None:
    clients = Clients(num_slots=2)
    for _ in range(5):
        clients.submit(3, 2)
    clients.run()
    assert clients.ended == [1, 2, 3, 4, 5]


def test_decoding_goes_first_and_the_rest_of_the_budget_prefills() -> None:
    clients = Clients(num_slots=3, budget=8)
    clients.submit(3, 9)
    clients.step()
    clients.submit(20, 2)
    assert shape(clients.step()) == ([1], [(2, 8)])
    clients.submit(2, 2)
    assert shape(clients.step()) == ([1], [(2, 8)])
    assert shape(clients.step()) == ([1], [(2, 4), (3, 2)])
    assert shape(clients.step()) == ([1, 2, 3], [])


def test_several_short_prompts_share_a_step_up_to_the_segment_limit() -> None:
    clients = Clients(num_slots=5, num_pages=50, budget=100, max_segments=2)
    for _ in range(5):
        clients.submit(3, 4)
    assert shape(clients.step()) == ([], [(1, 3), (2, 3)])
    assert shape(clients.step()) == ([1, 2], [(3, 3), (4, 3)])
    assert shape(clients.step()) == ([1, 2, 3, 4], [(5, 3)])


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17, 25])
@pytest.mark.parametrize("others", [0, 1])
def test_r013_prompts_about_as_long_as_the_budget_are_cut_at_the_budget(
    length: int, others: int
) -> None:
    """Also the last token of 9, 17 and 25, alone in its step, is prefill with context."""
    clients = Clients(num_slots=2, num_pages=20, budget=8)
    for _ in range(others):
        clients.submit(2, 30)
        clients.step()
    number = clients.submit(length, 2)
    cuts = []
    while not clients.alive[number].decodes:
        ((_, cut),) = clients.step().segments
        cuts.append(cut)
    assert cuts == [8] * (length // 8) + [length % 8] * (length % 8 > 0)


def test_r012_one_token_prompts_are_segments() -> None:
    clients = Clients(num_slots=3, max_segments=3)
    clients.submit(1, 3)
    assert shape(clients.step()) == ([], [(1, 1)])
    clients.submit(1, 3)
    clients.submit(1, 1)
    assert shape(clients.step()) == ([1], [(2, 1), (3, 1)])
    assert shape(clients.step()) == ([1, 2], [])


def test_r012_one_token_of_budget_for_a_new_prompt_is_a_fresh_segment() -> None:
    clients = Clients(num_slots=2, budget=8)
    clients.submit(7, 2)
    clients.submit(5, 2)
    plan = clients.scheduler.plan()
    assert shape(plan) == ([], [(1, 7), (2, 1)])
    assert [row.context for row in plan.segment_rows()] == [0, 0]


# Admission.


def test_r032_admission_counts_slots() -> None:
    clients = Clients(num_slots=2, num_pages=100)
    for _ in range(3):
        clients.submit(2, 3)
    assert shape(clients.step()) == ([], [(1, 2), (2, 2)])
    assert [c.sequence.slot is None for c in clients.alive.values()] == [False, False, True]
    clients.remove(1)
    assert shape(clients.step()) == ([2], [(3, 2)])


def test_r032_admission_counts_pages_of_the_tokens_and_one_to_grow_for_each() -> None:
    clients = Clients(num_slots=3, num_pages=5)
    clients.submit(3, 8)  # 4 tokens with the next: 1 page, and it will want another
    clients.submit(12, 3)  # 13: 4 pages, 3 are free beside that one
    clients.submit(1, 1)  # would fit, but must not overtake
    assert shape(clients.step()) == ([], [(1, 3)])
    clients.remove(1)
    assert shape(clients.step()) == ([], [(2, 8)])
    assert shape(clients.step()) == ([], [(2, 4), (3, 1)])


# Running out of pages.


def test_the_youngest_stands_still_rather_than_drive_out_an_older_one() -> None:
    """Three that grow to 4 pages each in a pool of 7; all are 5 tokens long to begin with."""
    clients = Clients(num_slots=3, num_pages=7, budget=16, max_segments=3)
    for _ in range(3):
        clients.submit(5, 11)
    assert shape(clients.step()) == ([], [(1, 5), (2, 5)])  # the third must leave room to grow
    one, two, three = (client.sequence for client in clients.alive.values())
    for _ in range(6):
        clients.step()
    assert [s.num_preempted for s in (one, two, three)] == [0, 0, 0]
    while one.num_computed < 12:
        clients.step()
    clients.step()  # the first wants its fourth page, and so does the second
    assert shape(clients.step()) == ([1], [])
    assert (len(one.pages.pages), len(two.pages.pages)) == (4, 3)  # pyright: ignore
    clients.run()
    assert clients.ended == [1, 2, 3]


def test_r083_the_oldest_never_gives_way() -> None:
    """Both run on 3 of 6 pages when the first wants its fourth: the second has to go."""
    clients = Clients(num_slots=2, num_pages=6, budget=16)
    for _ in range(2):
        clients.submit(5, 11)
    clients.step()
    one, two = (client.sequence for client in clients.alive.values())
    clients.run()
    assert (one.num_preempted, two.num_preempted) == (0, 1)
    assert clients.ended == [1, 2]


def test_r081_a_resumed_request_computes_prompt_and_answer_again() -> None:
    clients = Clients(num_slots=2, num_pages=20, budget=8)
    number = clients.submit(6, 9)
    for _ in range(4):
        clients.step()
    sequence = clients.alive[number].sequence
    assert (len(sequence.tokens), sequence.num_computed) == (10, 9)
    assert shape(clients.scheduler.plan(preempt=[number])) == ([], [(number, 8)])
    assert (sequence.num_computed, sequence.num_preempted) == (0, 1)


def test_one_that_fits_alone_ends_however_many_others_there_are() -> None:
    clients = Clients(num_slots=4, num_pages=5, budget=6, max_segments=4)
    for _ in range(12):
        clients.submit(4, 16)  # 20 tokens: all 5 pages
    clients.run()
    assert clients.ended == list(range(1, 13))


def test_r028_several_steps_are_planned_only_with_their_pages() -> None:
    clients = Clients(num_slots=2, num_pages=6, budget=8)
    first = clients.submit(4, 12)
    clients.step()
    scheduler, sequence = clients.scheduler, clients.alive[first].sequence
    assert scheduler.plan(max_steps=8).num_steps == 8
    assert sequence.pages is not None
    assert len(sequence.pages.pages) == 3  # 4 + 8 tokens
    clients.submit(4, 12)
    assert scheduler.plan(max_steps=8).num_steps == 1  # somebody prefills
    clients.step()
    clients.step()
    steps = scheduler.plan(max_steps=8).num_steps
    held = [len(c.sequence.pages.pages) for c in clients.alive.values()]  # pyright: ignore
    assert steps == 4
    assert held == [3, 3]


def test_what_the_host_must_see_runs_one_step_at_a_time() -> None:
    clients = Clients()
    clients.alive[clients.submit(4, 12)].sequence.several_steps = False
    clients.step()
    assert clients.scheduler.plan(max_steps=8).num_steps == 1


@pytest.mark.parametrize(("num_prompt", "fits"), [(11, True), (12, True), (13, False)])
def test_r032_what_never_fits_is_refused_at_once(num_prompt: int, fits: bool) -> None:
    """4 pages of 4 tokens, 4 of them for the answer."""
    clients = Clients(num_pages=4)
    if fits:
        clients.submit(num_prompt, 4)
        clients.run()
        assert clients.ended == [1]
        return
    with pytest.raises(ValueError, match="never fit"):
        clients.submit(num_prompt, 4)
    assert not clients.scheduler.has_work


def test_a_request_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Clients().submit(0, 3)


def test_a_plan_cannot_run_for_a_request_that_is_over() -> None:
    clients = Clients()
    number = clients.submit(3, 3)
    plan = clients.scheduler.plan()
    clients.remove(number)
    with pytest.raises(ValueError, match="without slot or pages"):
        plan.segment_rows()


# Removal at any moment.


@pytest.mark.parametrize("steps", range(6))
def test_r024_removing_at_any_step_gives_slot_and_pages_back(steps: int) -> None:
    """Waiting, admitted, half prefilled, prefilled, decoding."""
    clients = Clients(num_slots=1, budget=4)
    clients.submit(10, 5)
    waiting = clients.submit(10, 5)
    for _ in range(steps):
        clients.step()
    clients.remove(waiting)
    clients.remove(1)
    assert (clients.slots.num_free, clients.pages.num_free) == (1, 12)
    assert not clients.scheduler.has_work


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 20), st.integers(1, 9)),
        st.tuples(st.just("remove"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 3), st.just(0)),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    events=EVENTS,
    num_slots=st.integers(1, 4),
    num_pages=st.integers(8, 20),
    budget=st.integers(1, 12),
    max_segments=st.integers(1, 4),
)
def test_r033_any_arrivals_and_departures_keep_the_books(
    events: list[tuple[str, int, int]],
    num_slots: int,
    num_pages: int,
    budget: int,
    max_segments: int,
) -> None:
    """R079, R084, R085: whoever leaves when, nothing leaks, and the rest runs to its end (I16)."""
    clients = Clients(num_slots, num_pages, budget, max_segments)
    sent = 0
    for what, number, new in events:
        if what == "submit":
            clients.submit(number, new)
            sent += 1
        elif what == "remove" and clients.alive:
            clients.remove(sorted(clients.alive)[number % len(clients.alive)])
        elif what == "step":
            for _ in range(number):
                clients.step()
    # Every step folds a token of somebody; some of them twice, whose pages were taken.
    left = sum(c.sequence.max_length for c in clients.alive.values())
    for _ in range(left * (1 + len(clients.alive))):
        clients.step()
    assert not clients.scheduler.has_work
    assert sorted(clients.ended) == list(range(1, sent + 1))
    assert (clients.slots.num_free, clients.pages.num_free) == (num_slots, num_pages)


def test_an_idle_scheduler_plans_nothing() -> None:
    assert Clients().step() == StepPlan((), ())
