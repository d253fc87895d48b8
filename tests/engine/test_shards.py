"""Laws of an engine with several shards, over a model that is only a memory (`echo.py`).

Each shard has a memory of its own, so a slot, page or token of the wrong one gives another answer.
Real models on random schedules: `test_sharded_engine.py` and `scripts/fuzz_schedules.py`.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from echo import LIMITS, VOCAB, Asked, Echo, Failure, ask
from hypothesis import given, settings
from hypothesis import strategies as st
from looped import LoopedPrograms

from bailing_jax import SamplingParams
from bailing_jax.engine.engine import Engine
from bailing_jax.engine.limits import DECODE_STEPS, EngineLimits
from bailing_jax.engine.shards import CallPlan
from bailing_jax.engine.sizes import MAX_PROGRAMS, job_programs
from bailing_jax.sampling_params import resolve
from bailing_jax.state import DecodeState

EXACT = replace(LIMITS, exact=True, small_prefills=(2, 5))
TIGHT = replace(LIMITS, max_num_pages=9)
LONG = replace(LIMITS, max_model_len=80, max_num_pages=40)


@pytest.fixture(autouse=True, params=["1", "0"], ids=["debug", "ahead"])
def _debug(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without debug mode the next call may be on its way before a call's tokens are seen."""
    monkeypatch.setenv("BAILING_DEBUG", request.param)


@pytest.fixture
def _ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAILING_DEBUG", "0")


class World:
    """An engine of several shards, and every call it has planned."""

    def __init__(self, limits: EngineLimits = LIMITS, num_shards: int = 2) -> None:
        self.limits = replace(limits, num_shards=num_shards)
        self.echoes = [Echo(limits) for _ in range(num_shards)]
        programs: Any = LoopedPrograms(self.echoes)
        config: Any = SimpleNamespace(vocab_size=VOCAB)
        spec = limits.state_spec("float32", "float32")
        self.engine = Engine(programs, config, self.limits, spec, lambda _spec: DecodeState(()))
        self.calls: list[CallPlan] = []
        self.layouts: list[Any] = []
        self.recorded: list[Any] = []
        self._watch("_call")
        self._watch("_call_on")

    def _watch(self, name: str) -> None:
        real = getattr(self.engine, name)

        def watched(*args: Any) -> Any:
            made = real(*args)
            if made is not None:
                self.calls.append(made.plan)
                self.layouts.append(made.layout)
                self.recorded.append(_recorded(made))
            return made

        setattr(self.engine, name, watched)

    def ask(self, prompt: list[int], max_tokens: int) -> Asked:
        return ask(self.engine, prompt, max_tokens)[1]

    def shards_of(self, call: CallPlan) -> list[set[int]]:
        """The numbers of the requests in each shard of a call."""
        return [
            {s.number for s in (*plan.decodes, *(s for s, _ in plan.segments))}
            for plan in call.shards
        ]

    def is_idle(self) -> bool:
        """Nobody waits, and no shard lacks a slot or a page."""
        ledgers = [
            ledger
            for shard in self.engine._shards.all
            for ledger in (shard.scheduler.slots, shard.scheduler.pages)
        ]
        free = all(ledger.num_free == ledger.capacity for ledger in ledgers)
        return free and not self.engine.has_work and not self.engine._shards.waiting


def finish(engine: Engine) -> None:
    for _ in range(3_000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("somebody starves")


def _recorded(call: Any) -> Any:
    """All that the processes of a job could disagree about."""
    plan, arrays = call.plan, jax.tree.leaves((call.layout, call.knobs, call.ends))
    who = [
        ([s.number for s in part.decodes], [(s.number, count) for s, count in part.segments])
        for part in plan.shards
    ]
    return plan.size, plan.num_steps, who, [np.asarray(array).tobytes() for array in arrays]


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)
REQUESTS = st.lists(st.tuples(PROMPTS, st.integers(1, 9)), min_size=1, max_size=14)
WISHES = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 8)),
        st.dictionaries(st.integers(1, 9), st.integers(0, 8), max_size=3),
        st.sets(st.integers(1, 9), max_size=2),
        st.integers(1, DECODE_STEPS),
    ),
    max_size=25,
)


@pytest.mark.parametrize("num_shards", [2, 3])
@pytest.mark.parametrize(
    "limits", [LIMITS, TIGHT, EXACT, replace(EXACT, max_num_pages=9)], ids=str
)
@settings(max_examples=12, deadline=None)
@given(requests=REQUESTS, wishes=WISHES)
def test_r022_r080_every_request_gets_the_answer_it_gets_alone(
    limits: EngineLimits,
    num_shards: int,
    requests: list[tuple[list[int], int]],
    wishes: list[tuple[int | None, dict[int, int], set[int], int]],
) -> None:
    """Whatever budgets, cuts and preemptions, and all slots and pages come back to their shard."""
    world = World(limits, num_shards)
    asked = [world.ask(prompt, max_tokens) for prompt, max_tokens in requests]
    for budget, cuts, preempt, max_steps in wishes:
        if world.engine.has_work:
            world.engine.step(budget=budget, cuts=cuts, preempt=preempt, max_steps=max_steps)
    finish(world.engine)
    assert [a.answer for a in asked] == [a.expected() for a in asked]
    assert world.is_idle()


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), PROMPTS, st.integers(1, 60)),
        st.tuples(st.just("stop"), PROMPTS, st.integers(1, 30)),
        st.tuples(st.just("cancel"), st.just([]), st.integers(0, 30)),
        st.tuples(st.just("step"), st.just([]), st.integers(1, 9)),
        st.tuples(st.just("step"), st.just([]), st.integers(1, 9)),
        st.tuples(st.just("fail"), st.just([]), st.integers(0, 9)),
    ),
    min_size=4,
    max_size=40,
)


class Player:
    """Plays events on a world, the same on each."""

    def __init__(self, world: World) -> None:
        self.world, self.engine = world, world.engine
        self.wanted: dict[int, Asked] = {}

    def play(self, what: str, prompt: list[int], number: int) -> None:
        if what == "ask":
            key, asked = ask(self.engine, prompt, number)
            self.wanted[key] = asked
        elif what == "stop":
            self._stop_after(prompt, number)
        elif what == "cancel" and self.wanted:
            key = sorted(self.wanted)[number % len(self.wanted)]
            self.engine.cancel(key)
            self.wanted.pop(key).check_beginning(80)
        elif what == "step" and self.engine.has_work:
            self.engine.step(max_steps=1 + number % DECODE_STEPS, ahead=number != 9)
        elif what == "fail" and self.engine.has_work and number == 0:
            self._fail()

    def _stop_after(self, prompt: list[int], count: int) -> None:
        """A request that its listener ends, which the device can't know."""
        heard: list[int] = []

        def listener(token: int, _entry: dict[int, float] | None) -> bool:
            heard.append(token)
            assert len(heard) <= count
            return len(heard) == count

        params = resolve(SamplingParams(temperature=0.0, max_tokens=60), {}, "")
        self.engine.submit(prompt, params, 0, listener)

    def _fail(self) -> None:
        """A step in which the last shard dies halfway ends every request of every shard."""
        self.world.echoes[-1].fails = True
        try:
            self.engine.step(ahead=False)
        except Failure:
            assert self.world.is_idle()
            self.wanted.clear()
        self.world.echoes[-1].fails = False


@pytest.mark.parametrize("num_shards", [2, 3])
@settings(max_examples=30, deadline=None)
@given(events=EVENTS)
def test_two_processes_come_to_the_same_plans_and_every_answer_is_right(
    num_shards: int, events: list[tuple[str, list[int], int]]
) -> None:
    """Requests come, give way, are cancelled, fail or end as only the host knows, at any time."""
    players = [Player(World(LONG, num_shards)) for _ in range(2)]
    for event in events:
        for player in players:
            player.play(*event)
    one, other = players
    for player in players:
        finish(player.engine)
        answers = [asked.answer for asked in player.wanted.values()]
        assert answers == [asked.expected(80) for asked in player.wanted.values()]
        assert player.world.is_idle()
    assert one.world.recorded == other.world.recorded


def test_requests_are_spread_and_equals_go_to_the_lowest_shard() -> None:
    world = World(LONG, 3)
    for length in (3, 2, 4, 2, 2):
        world.ask([length] * length, 40)
    world.engine.step()
    # 1 to 3 each to an empty shard; then every shard has one row, and the shortest prompt is where
    # the fewest tokens are to come.
    assert world.shards_of(world.calls[-1]) == [{1, 5}, {2, 4}, {3}]
    world.ask([1], 40)
    while world.engine._requests[6].sequence.slot is None:
        world.engine.step()
    assert world.engine._requests[6].sequence.shard == 2


def test_a_newcomer_goes_where_its_prompt_is_computed_first() -> None:
    """The first shard has one long prompt before it, the second three short answers' rows."""
    world = World(replace(LONG, max_num_seqs=4), 2)
    for length in (60, 1, 1, 1, 1):
        world.ask([length] * length, 15)
    world.engine.step()
    assert world.shards_of(world.calls[-1]) == [{1}, {2, 3, 4, 5}]
    world.engine.cancel(5)
    world.ask([2], 4)
    world.engine.step(max_steps=1)
    assert world.engine._requests[6].sequence.shard == 1


def test_nobody_overtakes_whoever_waits_longest() -> None:
    """The first in the queue needs more pages than any shard has free; the second would fit."""
    world = World(replace(LONG, max_num_pages=20), 2)
    for _ in range(2):
        world.ask([1] * 40, 30)
    world.engine.step()
    waits, small = (world.ask([2] * length, 4) for length in (50, 1))
    world.engine.step()
    assert [s.number for s in world.engine._shards.waiting] == [3, 4]
    started: list[int] = []
    while world.engine.has_work:
        world.engine.step()
        held = [s.number for shard in world.engine._shards.all for s in shard.scheduler.running]
        started += [number for number in sorted(held) if number > 2 and number not in started]
    assert started == [3, 4]
    assert (waits.answer, small.answer) == (waits.expected(80), small.expected(80))


def test_r081_whoever_gives_way_comes_back_to_its_shard() -> None:
    world = World(LONG, 2)
    asked = [world.ask([i] * 3, 30) for i in range(4)]
    world.engine.step()
    shards = {n: r.sequence.shard for n, r in world.engine._requests.items()}
    assert sorted(shards.values()) == [0, 0, 1, 1]
    for number in (2, 4, 1, 3):
        world.engine.step(preempt={number}, max_steps=2)
    finish(world.engine)
    for call in world.calls:
        for shard, numbers in enumerate(world.shards_of(call)):
            assert all(shards[number] == shard for number in numbers)
    assert [a.answer for a in asked] == [a.expected(80) for a in asked]


def test_all_shards_run_the_size_that_the_fullest_needs() -> None:
    world = World(replace(LONG, small_prefills=(2,)), 2)
    for i in range(4):
        world.ask([i] * 2, 30)
    world.engine.step()
    assert world.calls[-1].size == (3, 8, 3)  # two prompts of two tokens in each shard
    world.engine.step(ahead=False)
    assert world.calls[-1].size == (2, 0, 0)
    world.engine.cancel(3)
    world.engine.step(ahead=False)
    assert world.calls[-1].size == (2, 0, 0)  # the second shard still has two
    for number in (2, 4):
        world.engine.cancel(number)
    world.engine.step(ahead=False)
    assert world.calls[-1].size == (1, 0, 0)  # and is empty now
    world.ask([9], 30)
    world.engine.step(ahead=False)
    # A prompt in the second shard, one that decodes in the first.
    assert world.calls[-1].size == (3, 2, 3)
    plan = world.calls[-1]
    assert [len(p.decodes) for p in plan.shards] == [1, 0]
    assert [len(p.segments) for p in plan.shards] == [0, 1]


def test_r095_an_idle_shard_takes_part_with_padding_only() -> None:
    world = World(LONG, 3)
    memories = [(echo.slots.copy(), echo.pages.copy()) for echo in world.echoes]
    world.ask([1, 2, 3], 12)
    finish(world.engine)
    for layout in world.layouts:
        for name in ("decode_slots", "decode_pages", "segment_slots", "segment_pages"):
            assert not np.asarray(getattr(layout, name))[1:].any(), name
        assert not np.asarray(layout.cu_seqlens)[1:].any()
    for echo, (slots, pages) in list(zip(world.echoes, memories, strict=True))[1:]:
        np.testing.assert_array_equal(echo.slots, slots)
        np.testing.assert_array_equal(echo.pages, pages)


@pytest.mark.parametrize("most", [(40, 4), (4, 40)])
def test_as_many_steps_a_call_as_every_busy_shard_allows(most: tuple[int, int]) -> None:
    world = World(LONG, 3)
    for i in range(2):
        world.ask([i] * 2, most[i])
    world.engine.step(ahead=False)
    # One token each is known; one has 3 to come, the third shard has nobody.
    world.engine.step(ahead=False)
    assert (world.calls[-1].num_steps, world.echoes[2].decode_steps) == (3, [3])
    world.engine.step(ahead=False)
    assert world.calls[-1].num_steps == 8
    # Somebody whose tokens the host must see holds all of them to one.
    world.ask([5, 6], 20)
    world.engine.step(ahead=False)
    (newest,) = [r for n, r in world.engine._requests.items() if n == 3]
    newest.sequence.several_steps = False
    world.engine.step(ahead=False)
    assert world.calls[-1].num_steps == 1
    world.engine.cancel(3)
    world.engine.step(ahead=False)
    assert world.calls[-1].num_steps == 8


@pytest.mark.usefixtures("_ahead")
def test_r028_a_call_starts_ahead_for_all_shards_or_none() -> None:
    world = World(LONG, 2)
    asked = [world.ask([i] * 2, (60, 60, 20)[i]) for i in range(3)]
    world.engine.step()
    world.engine.step()
    assert world.engine._ahead is not None
    # The first shard's requests end as only the host knows; the other's goes on.
    for number, request in list(world.engine._requests.items()):
        if request.sequence.shard == 0:
            world.engine.cancel(number)
    world.engine.step()
    assert world.engine._ahead is None
    world.engine.step()
    assert world.engine._ahead is not None
    # Who comes now is not kept out by calls that follow each other.
    _, late = ask(world.engine, [7], 3)
    for _ in range(3):
        world.engine.step()
    assert late.answer
    finish(world.engine)
    assert asked[1].answer == asked[1].expected(80)
    assert late.answer == late.expected(80)


def test_r082_in_exact_mode_a_call_has_the_size_of_its_own_pieces() -> None:
    """Shards whose pieces need another size take part in that call with padding."""
    world = World(EXACT, 2)
    for length in (8, 1, 5, 2):
        world.ask([length] * length, 6)
    world.engine.step()
    sizes = [call.size for call in world.calls]
    assert sizes == [(0, 2, 3), (0, 8, 3)]
    assert [sorted(map(len, world.shards_of(call))) for call in world.calls] == [[0, 1], [0, 1]]
    finish(world.engine)
    assert {call.size for call in world.calls} <= {(3, 0, 0), (0, 2, 3), (0, 5, 3), (0, 8, 3)}
    for echo in world.echoes:
        for rows, counts in echo.pieces:
            assert all(rows == next(r for r in (2, 5, 8) if r >= c) for c in counts)


def test_cancelling_takes_requests_out_of_queue_and_shard() -> None:
    world = World(LIMITS, 2)
    asked = [world.ask([i] * 3, 20) for i in range(9)]
    world.engine.step()
    assert [s.number for s in world.engine._shards.waiting] == [7, 8, 9]
    for number in (8, 1, 4):
        world.engine.cancel(number)
    world.engine.step()
    assert not world.engine._shards.waiting
    finish(world.engine)
    assert world.is_idle()
    for i in (1, 2, 4, 5, 6, 8):
        assert asked[i].answer == asked[i].expected()


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([1] * 30, "never fit")])
def test_r032_what_fits_no_shard_is_refused_at_once(prompt: list[int], message: str) -> None:
    world = World(replace(LIMITS, max_num_pages=3), 2)
    with pytest.raises(ValueError, match=message):
        world.ask(prompt, 20)
    assert world.is_idle()


def test_there_are_no_more_programs_than_for_one_shard() -> None:
    limits = replace(LONG, max_num_seqs=33, small_prefills=(2, 4))
    world = World(limits, 3)
    for size in job_programs(limits):
        world.engine._compile(size, refines=False)
    compiled = world.echoes[0].compiled
    assert compiled == {tuple(size) for size in job_programs(limits)}
    assert len(compiled) <= MAX_PROGRAMS
    rng = np.random.default_rng(0)
    for _ in range(60):
        world.ask(rng.integers(0, VOCAB, int(rng.integers(1, 30))).tolist(), 12)
        if rng.random() < 0.5:
            world.engine.step()
    finish(world.engine)
    assert all(cast(Any, echo).ran <= compiled for echo in world.echoes)
