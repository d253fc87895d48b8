"""Laws of the engine over a model that is only a memory: every token depends on all before it.

`Echo` keeps in each slot a hash of the tokens folded into it, and in each page the tokens
themselves, and makes the next token from both. One slot too late, twice, stale or swapped, and a
request answers something else than it does alone, which `alone` computes without any engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bailing_jax.batch import BatchLayout, Region
from bailing_jax.config import ModelConfig
from bailing_jax.engine import engine as engine_module
from bailing_jax.engine.engine import Engine, EngineLimits
from bailing_jax.sampling_params import SamplingParams, resolve
from bailing_jax.state import DecodeState

VOCAB, PAGE_SIZE = 61, 4
LIMITS = EngineLimits(max_num_seqs=3, max_model_len=26, prefill_chunk=8, page_size=PAGE_SIZE)
GREEDY = resolve(SamplingParams(temperature=0.0), {}, "")


def fold(memory: int, token: int) -> int:
    return (memory * 31 + token + 7) % 1_000_003


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """The answer by the definition: greedy, no end but the budget and the longest length."""
    tokens = list(prompt)
    for _ in range(min(max_tokens, LIMITS.max_model_len - len(prompt))):
        memory = 0
        for token in tokens:
            memory = fold(memory, token)
        tokens.append((memory + sum(tokens)) % VOCAB)
    return tokens[len(prompt) :]


class Failure(BaseException):
    """Like KeyboardInterrupt, it is no Exception."""


class Echo:
    """Stands where the compiled programs stand; slots and pages hold garbage to begin with."""

    def __init__(self, limits: EngineLimits = LIMITS) -> None:
        self.limits, self.spec = limits, limits.state_spec("float32", "float32")
        self.slots = np.full(self.spec.num_slots, 999, np.int64)
        self.pages = np.full((self.spec.num_pages, PAGE_SIZE), 998, np.int64)
        self.compiled: set[tuple[int, int, int]] = set()
        self.ran: set[tuple[int, int, int]] = set()
        self.fails = False

    def step(self, state: DecodeState, layout: BatchLayout) -> tuple[np.ndarray, DecodeState]:
        self.ran.add(size(layout))
        logits = np.zeros((layout.logit_rows.shape[0], VOCAB), np.float32)
        ends = layout.num_decode + np.asarray(layout.cu_seqlens)
        decodes, segments = layout.decode_region(), layout.prefill_region()
        everyone = [(decodes, i, i, i + 1) for i in range(layout.num_decode)]
        everyone += [(segments, i, *ends[i : i + 2]) for i in range(len(ends) - 1)]
        for output, (region, i, start, end) in enumerate(everyone):
            if region.slots[i] != 0 and start < end:
                assert layout.logit_rows[output] == end - 1
                heard = self._hear(region, i, layout.tokens[start:end], layout.positions[start:end])
                logits[output, heard % VOCAB] = 1
        if self.fails:  # after the state has changed, as a compiled step would
            raise Failure
        return logits, state

    def _hear(self, region: Region, i: int, tokens: Any, positions: Any) -> int:
        """Fold the tokens in; what slot and pages hold then decides the next token."""
        slot, pages = int(region.slots[i]), np.asarray(region.page_table)[i]
        assert positions[0] == region.context_lengths[i]
        fresh = region.is_fresh is not None and bool(region.is_fresh[i])
        memory = 0 if fresh else int(self.slots[slot])
        for token, position in zip(tokens.tolist(), positions.tolist(), strict=True):
            memory = fold(memory, token)
            self.pages[pages[position // PAGE_SIZE], position % PAGE_SIZE] = token
        self.slots[slot] = memory
        return memory + int(self.pages[pages].reshape(-1)[: positions[-1] + 1].sum())

    def compile_step(self, state: DecodeState, layout: BatchLayout) -> None:
        self.compiled.add(size(layout))

    def has_step(self, layout: BatchLayout) -> bool:
        return size(layout) in self.compiled | self.ran


def size(layout: BatchLayout) -> tuple[int, int, int]:
    return layout.num_decode, layout.num_prefill, layout.segment_slots.shape[0]


@pytest.fixture(autouse=True)
def _no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "allocate", lambda _config, _spec: DecodeState(()))


def make_engine(echo: Echo) -> Engine:
    config = cast(ModelConfig, SimpleNamespace(vocab_size=VOCAB))
    return Engine(cast(Any, echo), config, echo.limits, echo.spec)


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    answer: list[int] = field(default_factory=list)

    def expected(self) -> list[int]:
        return alone(self.prompt, self.max_tokens)

    def check_beginning(self) -> None:
        assert self.answer == self.expected()[: len(self.answer)]


def ask(engine: Engine, prompt: list[int], max_tokens: int) -> tuple[int, Asked]:
    asked = Asked(prompt, max_tokens)

    def on_token(token: int, _logprobs: dict[int, float] | None) -> bool:
        asked.answer.append(token)
        return len(asked.answer) == max_tokens

    params = resolve(SamplingParams(temperature=0.0, max_tokens=max_tokens), {}, "")
    return engine.submit(prompt, params, 0, on_token), asked


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def fail(engine: Engine, echo: Echo) -> None:
    """A step that dies halfway."""
    echo.fails = True
    with pytest.raises(Failure):
        engine.step()
    echo.fails = False


def is_idle(engine: Engine) -> bool:
    """Nobody holds a slot or a page."""
    scheduler = engine._scheduler
    return (
        not engine.has_work
        and scheduler.slots.num_free == scheduler.slots.capacity
        and scheduler.pages.num_free == scheduler.pages.capacity
    )


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
        engine.step()
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
        engine.step()
    finish(engine)
    assert echo.ran == {(1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 8, 3)}


def test_a_program_is_announced_before_the_first_step_that_needs_it() -> None:
    echo = Echo()
    engine, told = make_engine(echo), list[str]()

    def on_compile(words: str) -> None:
        told.append(words)
        assert len(echo.ran) == len(told) - 1

    engine.on_compile = on_compile
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
