"""Laws of calls that are started before the tokens of the call before them are seen.

What a call on its way names (slots, pages) is handed out to nobody until that call has ended, and
no token changes, over a model that is only a memory (`echo.py`). Real ones: `test_decode_many.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from echo import LIMITS, VOCAB, Asked, Echo, ask, fail, finish, is_idle, make_engine, no_state
from hypothesis import given, settings
from hypothesis import strategies as st

from bailing_jax import SamplingParams
from bailing_jax.engine.engine import Engine
from bailing_jax.engine.limits import DECODE_STEPS
from bailing_jax.sampling_params import resolve

# Room for answers of several calls, and fewer pages than everybody at full length needs.
LONG = replace(LIMITS, max_model_len=80, max_num_pages=40)


@pytest.fixture(autouse=True)
def _without_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    no_state(monkeypatch)
    monkeypatch.setenv("BAILING_DEBUG", "0")


def slots_and_pages(call: Any) -> tuple[set[int], set[int]]:
    """What a call names on the device, padding left out."""
    slots, pages = call.layout.decode_slots, np.asarray(call.layout.decode_pages)
    return set(slots.tolist()) - {0}, set(pages.reshape(-1).tolist()) - {0}


def watch(engine: Engine) -> list[int]:
    """Let the ledgers refuse whatever a call on its way names; the list grows with each such call.

    The call that runs on is planned (`plan_on`) while the one before it is on its way too.
    """
    on_its_way: list[Any] = []
    chained: list[int] = []
    call, call_on, done = engine._call, engine._call_on, engine._finish
    slots, pages = engine._scheduler.slots, engine._scheduler.pages
    allocate, allocate_pages, grow = slots.allocate, pages.allocate, pages.grow

    def starts(plan: Any) -> Any:
        on_its_way.append(call(plan))
        return on_its_way[-1]

    def starts_on(before: Any, max_steps: int) -> Any:
        found = call_on(before, max_steps)
        if found is not None:
            on_its_way.append(found)
            chained.append(found.plan.num_steps)
        return found

    def finishes(call: Any) -> None:
        # It has ended once its tokens are there, which is the first thing waited for.
        np.array(call.result.tokens)
        on_its_way[:] = [other for other in on_its_way if other is not call]
        done(call)

    def is_free(slots: set[int], pages: set[int]) -> None:
        for call in on_its_way:
            named = slots_and_pages(call)
            assert not named[0] & slots
            assert not named[1] & pages

    def hands_out(owner: int) -> Any:
        handle = allocate(owner)
        is_free({handle.slot}, set())
        return handle

    def hands_out_pages(owner: int, count: int) -> Any:
        handle = allocate_pages(owner, count)
        is_free(set(), set(handle.pages))
        return handle

    def hands_out_more(handle: Any, count: int) -> Any:
        grown = grow(handle, count)
        is_free(set(), set(grown.pages[len(handle.pages) :]))
        return grown

    engine._call, engine._call_on, engine._finish = starts, starts_on, finishes  # type: ignore[method-assign]
    slots.allocate, pages.allocate, pages.grow = hands_out, hands_out_pages, hands_out_more  # type: ignore[method-assign]
    return chained


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), PROMPTS, st.integers(1, 60)),
        st.tuples(st.just("stop"), PROMPTS, st.integers(1, 30)),
        st.tuples(st.just("cancel"), st.just([]), st.integers(0, 30)),
        st.tuples(st.just("step"), st.just([]), st.integers(1, 9)),
        st.tuples(st.just("step"), st.just([]), st.integers(1, 9)),
        st.tuples(st.just("wish"), st.just([]), st.integers(0, 9)),
    ),
    min_size=4,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS)
def test_r028_what_a_running_call_names_is_handed_out_to_nobody(
    events: list[tuple[str, list[int], int]],
) -> None:
    """Requests come, give way, are cancelled or end as only the host knows, at any time."""
    engine = make_engine(Echo(LONG))
    watch(engine)
    wanted: dict[int, Asked] = {}
    for what, prompt, number in events:
        if what == "ask":
            key, asked = ask(engine, prompt, number)
            wanted[key] = asked
        elif what == "stop":
            stop_after(engine, prompt, number)
        elif what == "cancel" and wanted:
            key = sorted(wanted)[number % len(wanted)]
            engine.cancel(key)
            wanted.pop(key).check_beginning(80)
        elif what == "step" and engine.has_work:
            engine.step(max_steps=1 + number % DECODE_STEPS, ahead=number != 9)
        elif what == "wish" and engine.has_work:
            engine.step(preempt=set(list(wanted)[:number]), budget=number % 9)
    finish(engine)
    assert [a.answer for a in wanted.values()] == [a.expected(80) for a in wanted.values()]
    assert is_idle(engine)


def stop_after(engine: Engine, prompt: list[int], count: int) -> None:
    """A request that its listener ends, which the device can't know."""
    heard: list[int] = []

    def listener(token: int, _entry: dict[int, float] | None) -> bool:
        heard.append(token)
        assert len(heard) <= count
        return len(heard) == count

    params = resolve(SamplingParams(temperature=0.0, max_tokens=60), {}, "")
    engine.submit(prompt, params, 0, listener)


def test_while_nobody_waits_each_call_starts_before_the_one_before_is_read() -> None:
    engine = make_engine(Echo(LONG))
    chained = watch(engine)
    asked = [ask(engine, [i] * 2, 40 - i)[1] for i in range(3)]
    engine.step()
    # After the step with the prompts, each step starts the next call too.
    for step in range(1, 4):
        engine.step()
        assert engine._ahead is not None
        assert len(chained) == step
        assert [len(a.answer) for a in asked] == [1 + 8 * step] * 3
    # Who comes now gets in after the call that is on its way, not later.
    _, last = ask(engine, [9], 3)
    for _ in range(2):
        engine.step()
    assert engine._ahead is None
    finish(engine)
    assert [len(a.answer) for a in asked] == [40, 39, 38]
    assert len(last.answer) == 3
    assert is_idle(engine)


def test_r028_a_call_that_fails_takes_the_one_behind_it_along() -> None:
    echo = Echo(LONG)
    engine = make_engine(echo)
    for i in range(3):
        ask(engine, [i] * 3, 60)
    for _ in range(3):
        engine.step()
    assert engine._ahead is not None
    fail(engine, echo)
    assert engine._ahead is None
    assert is_idle(engine)
    _, asked = ask(engine, [1, 2, 3], 20)
    finish(engine)
    assert len(asked.answer) == 20


@pytest.mark.parametrize(
    "why", ["debug", "host", "waiting", "not wanted"], ids=lambda why: why.replace(" ", "-")
)
def test_no_call_starts_ahead_where_the_host_must_see_tokens_first(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAILING_DEBUG", "1" if why == "debug" else "0")
    engine = make_engine(Echo(LONG))
    chained = watch(engine)
    for i in range(4 if why == "waiting" else 3):
        ask(engine, [i], 20)
    if why == "host":
        for request in engine._requests.values():
            request.sequence.several_steps = False
    while len(engine._requests) > 3 or (engine.has_work and why != "waiting"):
        engine.step(ahead=why != "not wanted")
    assert not chained
    finish(engine)
