"""Laws of the engine over a model that is only a memory (`echo.py`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from echo import (
    LIMITS,
    VOCAB,
    Asked,
    Echo,
    Failure,
    alone,
    ask,
    fail,
    finish,
    is_idle,
    make_engine,
    no_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bailing_jax.engine.limits import DECODE_STEPS, EngineLimits
from bailing_jax.sampling_params import SamplingParams, resolve

GREEDY = resolve(SamplingParams(temperature=0.0), {}, "")

_no_state = pytest.fixture(autouse=True)(no_state)


@pytest.fixture(autouse=True, params=["1", "0"], ids=["debug", "ahead"])
def _debug(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without debug mode the next call may be on its way before a call's tokens are seen."""
    monkeypatch.setenv("BAILING_DEBUG", request.param)


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)
REQUESTS = st.lists(st.tuples(PROMPTS, st.integers(1, 9)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS)
def test_r022_every_request_gets_the_answer_it_gets_alone(
    requests: list[tuple[list[int], int]],
) -> None:
    """More requests than slots, lengths all mixed, finishes staggered (R010, R012, R013, R033)."""
    engine = make_engine(Echo())
    asked = [ask(engine, prompt, max_tokens)[1] for prompt, max_tokens in requests]
    finish(engine)
    assert [a.answer for a in asked] == [a.expected() for a in asked]
    assert is_idle(engine)


# Where the wishes of a test take the engine; few pages, so that requests give way by themselves.
TIGHT = replace(LIMITS, max_num_pages=9)
EXACT = replace(LIMITS, exact=True, small_prefills=(2, 5))
TIGHT_EXACT = replace(EXACT, max_num_pages=9)
WISHES = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 8)),
        st.dictionaries(st.integers(1, 9), st.integers(0, 8), max_size=3),
        st.sets(st.integers(1, 9), max_size=2),
        st.integers(1, DECODE_STEPS),
    ),
    max_size=25,
)


@pytest.mark.parametrize("limits", [LIMITS, TIGHT, EXACT, TIGHT_EXACT], ids=str)
@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, wishes=WISHES)
def test_r080_whatever_budgets_cuts_and_preemptions_the_answer_is_the_one_alone(
    limits: EngineLimits,
    requests: list[tuple[list[int], int]],
    wishes: list[tuple[int | None, dict[int, int], set[int], int]],
) -> None:
    """R079-R084: state and pages are recomputed together, from prompt and answer so far."""
    engine = make_engine(Echo(limits))
    asked = [ask(engine, prompt, max_tokens)[1] for prompt, max_tokens in requests]
    for budget, cuts, preempt, max_steps in wishes:
        if engine.has_work:
            engine.step(budget=budget, cuts=cuts, preempt=preempt, max_steps=max_steps)
    finish(engine)
    assert [a.answer for a in asked] == [a.expected() for a in asked]
    assert is_idle(engine)


def test_exact_mode_runs_a_prefill_of_the_pieces_own_size_and_one_decode() -> None:
    echo = Echo(TIGHT_EXACT)
    engine = make_engine(echo)
    for length in range(1, 20):
        ask(engine, [length] * length, 1 + length % 7)
        engine.step(max_steps=1)
    finish(engine)
    assert echo.ran == {(0, 2, 3), (0, 5, 3), (0, 8, 3), (3, 0, 0)}
    assert {(rows, count) for rows, counts in echo.pieces for count in counts} == {
        (next(rows for rows in (2, 5, 8) if rows >= count), count) for count in range(1, 9)
    }
    # Those that need the same size share a call where they fit.
    for length in (3, 1, 1):
        ask(engine, [length] * length, 2)
    finish(engine)
    assert echo.pieces[-2:] == [(5, [3]), (2, [1, 1])]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), PROMPTS, st.integers(1, 9)),
        st.tuples(st.just("ask"), PROMPTS, st.integers(1, 9)),
        st.tuples(st.just("cancel"), st.just([]), st.integers(0, 30)),
        st.tuples(st.just("step"), st.just([]), st.integers(1, 4)),
        st.tuples(st.just("fail"), st.just([]), st.just(0)),
    ),
    min_size=6,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(events=EVENTS)
def test_r086_whoever_leaves_or_fails_the_others_get_their_answers(
    events: list[tuple[str, list[int], int]],
) -> None:
    """Requests come, go at any step, and a step fails now and then (R024, R079, R084-R090)."""
    echo = Echo()
    engine = make_engine(echo)
    wanted: dict[int, Asked] = {}
    for what, prompt, number in events:
        if what == "ask":
            key, asked = ask(engine, prompt, number)
            wanted[key] = asked
        elif what == "cancel" and wanted:
            key = sorted(wanted)[number % len(wanted)]
            engine.cancel(key)
            wanted.pop(key).check_beginning()
            assert not engine.is_unfinished(key)
        elif what == "step":
            for _ in range(number * engine.has_work):
                engine.step()
        elif what == "fail" and engine.has_work:
            fail(engine, echo)
            lost = [key for key, asked in wanted.items() if asked.answer != asked.expected()]
            for key in lost:
                wanted.pop(key).check_beginning()
    finish(engine)
    assert [a.answer for a in wanted.values()] == [a.expected() for a in wanted.values()]
    assert is_idle(engine)


def test_r028_a_failed_step_ends_every_request_and_the_next_ones_are_right() -> None:
    echo = Echo()
    engine = make_engine(echo)
    keys = [ask(engine, [i] * (4 + i), 9)[0] for i in range(5)]
    for _ in range(3):
        engine.step(max_steps=1)
    assert all(engine.is_unfinished(key) for key in keys)
    fail(engine, echo)
    assert not any(engine.is_unfinished(key) for key in keys)
    assert is_idle(engine)
    _, asked = ask(engine, [1, 2, 3], 5)
    finish(engine)
    assert asked.answer == asked.expected()


def test_a_listener_that_raises_ends_every_request() -> None:
    """What it was told is lost, so no request may go on as if it had been heard."""
    engine = make_engine(Echo())

    def listener(_token: int, _logprobs: dict[int, float] | None) -> bool:
        raise Failure

    first, _ = ask(engine, [3], 4)
    engine.submit([1, 2], GREEDY, 0, listener)
    with pytest.raises(Failure):
        engine.step()
    assert not engine.is_unfinished(first)
    assert is_idle(engine)


def test_r025_a_listeners_error_ends_its_own_request_and_no_other() -> None:
    engine = make_engine(Echo())
    errors: list[Exception] = []
    heard: list[int] = []

    def listener(token: int, _logprobs: dict[int, float] | None) -> bool:
        heard.append(token)
        if len(heard) == 3:
            raise OSError("the reader went away")
        return False

    _, first = ask(engine, [3], 9)
    params = replace(GREEDY, max_tokens=9)
    number = engine.submit([1, 2], params, 0, listener, on_error=errors.append)
    _, last = ask(engine, [4, 4], 9)
    finish(engine)
    assert [str(error) for error in errors] == ["the reader went away"]
    assert len(heard) == 3
    assert not engine.is_unfinished(number)
    assert (first.answer, last.answer) == (first.expected(), last.expected())
    assert is_idle(engine)


def test_a_listener_may_cancel_anybody() -> None:
    """Also in the middle of a call that decoded several tokens of both."""
    engine = make_engine(Echo())
    other, cancelled = ask(engine, [7, 7], 12)
    heard: list[int] = []

    def listener(token: int, _logprobs: dict[int, float] | None) -> bool:
        heard.append(token)
        if len(heard) == 4:
            engine.cancel(other)
        return len(heard) == 12

    engine.submit([1, 2], replace(GREEDY, max_tokens=12), 0, listener)
    finish(engine)
    assert len(heard) == 12
    assert len(cancelled.answer) in (3, 4)
    cancelled.check_beginning()
    assert is_idle(engine)


# Several steps in one call.


def test_several_steps_run_in_one_call_when_nobody_waits() -> None:
    echo = Echo()
    engine = make_engine(echo)
    asked = [ask(engine, [i] * 3, 1 + DECODE_STEPS + i)[1] for i in range(3)]
    finish(engine)
    assert echo.decode_steps == [DECODE_STEPS, 2]
    assert [a.answer for a in asked] == [a.expected() for a in asked]


def test_while_others_wait_no_row_idles_at_its_end() -> None:
    echo = Echo()
    engine = make_engine(echo)
    asked = [ask(engine, [i], 5 + i)[1] for i in range(4)]
    engine.step()
    engine.step()
    assert echo.decode_steps == [4]
    finish(engine)
    assert [a.answer for a in asked] == [a.expected() for a in asked]


@pytest.mark.parametrize("known", [True, False])
def test_tokens_behind_a_stop_are_dropped(known: bool) -> None:
    """Whether the device knows the stop or only the listener does (as with stop strings)."""
    want = alone([5, 6], 20)
    stop = want[4]
    for max_steps in (1, 3, DECODE_STEPS):
        engine = make_engine(Echo())
        heard: list[int] = []

        def listener(token: int, _logprobs: dict[int, float] | None, heard=heard) -> bool:
            heard.append(token)
            return token == stop

        params = replace(GREEDY, max_tokens=20)
        engine.submit([5, 6], params, 0, listener, stop_ids={stop} if known else ())
        _, other = ask(engine, [9], 20)
        while engine.has_work:
            engine.step(max_steps=max_steps)
        assert heard == want[: want.index(stop) + 1]
        assert other.answer == other.expected()


def test_r026_the_pool_is_whole_after_every_burst() -> None:
    engine = make_engine(Echo())
    for burst in range(20):
        asked = [ask(engine, [burst, i], 1 + i)[1] for i in range(5)]
        finish(engine)
        assert [a.answer for a in asked] == [a.expected() for a in asked]
        assert is_idle(engine)


def test_r014_any_traffic_runs_few_programs() -> None:
    echo = Echo()
    engine = make_engine(echo)
    for length in range(1, 20):
        for _ in range(1 + length % 4):
            ask(engine, [length] * length, 1 + length % 7)
        engine.step(max_steps=1)
    finish(engine)
    ask(engine, [1], 3)
    finish(engine)
    assert echo.ran == {(1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 8, 3)}


def test_a_program_is_announced_before_the_first_step_that_needs_it() -> None:
    echo = Echo()
    engine, told = make_engine(echo), list[str]()

    def on_compile(words: str) -> None:
        told.append(words)
        assert len(echo.ran) == len(told) - 1

    compiled: list[int] = []
    engine.on_compile = on_compile
    engine.on_compiled = lambda: compiled.append(len(echo.ran))
    for lengths in ([3], [11, 2, 5], [3]):
        for length in lengths:
            ask(engine, [4] * length, 5)
        finish(engine)
    in_words = {
        f"{d} decode row{'s' * (d > 1)}" + f", {t} prefill rows" * bool(t) for d, t, _ in echo.ran
    }
    assert set(told) == in_words
    assert len(told) == len(echo.ran)
    assert "1 decode row" in told
    # And again before it runs.
    assert compiled == list(range(len(told)))


@pytest.mark.parametrize("chunk", [8, 300])
@pytest.mark.parametrize("length", [1, 8, 9, 17, 300, 301, 390])
@pytest.mark.parametrize("max_tokens", [1, 4])
def test_warm_up_compiles_exactly_what_the_request_runs(
    chunk: int, length: int, max_tokens: int
) -> None:
    echo = Echo(replace(LIMITS, prefill_chunk=chunk, max_model_len=400))
    engine = make_engine(echo)
    engine.warm_up(length, replace(GREEDY, max_tokens=max_tokens))
    assert echo.ran == set()
    ask(engine, [5] * length, max_tokens)
    finish(engine)
    assert echo.ran == echo.compiled


def test_cancelling_what_is_over_or_unknown_changes_nothing() -> None:
    engine = make_engine(Echo())
    first, asked = ask(engine, [1, 2], 1)
    engine.step()
    second, other = ask(engine, [3], 3)
    engine.step()
    engine.cancel(first)
    engine.cancel(1234)
    finish(engine)
    assert (asked.answer, other.answer) == (asked.expected(), other.expected())
    assert first != second
