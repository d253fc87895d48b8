"""Laws of the engine over a model that is only a memory: every token depends on all before it.

`Echo` keeps in each slot a hash of the tokens folded into it, and in each page the tokens
themselves, and makes the next token from both. One slot too late, twice, stale or swapped, and a
request answers something else than it does alone, which `alone` computes without any engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from bailing_jax.state import DecodeState, StateSpec

VOCAB, PAGE_SIZE = 61, 4
LIMITS = EngineLimits(max_num_seqs=3, max_model_len=26, prefill_chunk=8, page_size=PAGE_SIZE)
SPEC = LIMITS.state_spec("float32", "float32")
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


class Echo:
    """Stands where the compiled programs stand; slots and pages hold garbage to begin with."""

    def __init__(self) -> None:
        self.slots = np.full(SPEC.num_slots, 999, np.int64)
        self.pages = np.full((SPEC.num_pages, PAGE_SIZE), 998, np.int64)
        self.calls = 0
        self.sizes: set[tuple[int, int, int]] = set()
        self.on_call: Callable[[int], None] = lambda _call: None

    def step(self, state: DecodeState, layout: BatchLayout) -> tuple[np.ndarray, DecodeState]:
        self.calls += 1
        self.sizes.add((layout.num_decode, layout.num_prefill, layout.segment_slots.shape[0]))
        logits = np.zeros((layout.logit_rows.shape[0], VOCAB), np.float32)
        tokens, positions = np.asarray(layout.tokens), np.asarray(layout.positions)
        wants = [(i, [i]) for i in range(layout.num_decode)]
        ends = layout.num_decode + np.asarray(layout.cu_seqlens)
        wants += [
            (layout.num_decode + i, list(range(ends[i], ends[i + 1]))) for i in range(len(ends) - 1)
        ]
        regions = [layout.decode_region(), layout.prefill_region()]
        places = [
            (region, i) for region in regions for i in range(len(np.asarray(region.slots)))
        ]
        for (region, i), (row, mine) in zip(places, wants, strict=True):
            if region.slots[i] != 0 and mine:
                heard = self._hear(region, i, tokens[mine].tolist(), positions[mine].tolist())
                logits[row, heard % VOCAB] = 1
        # As a compiled step does: the state is taken before anything can go wrong.
        self.on_call(self.calls)
        return logits, state

    def _hear(self, region: Region, i: int, tokens: list[int], positions: list[int]) -> int:
        slot, pages = int(region.slots[i]), np.asarray(region.page_table)[i]
        assert positions[0] == region.context_lengths[i]
        fresh = region.is_fresh is not None and bool(region.is_fresh[i])
        memory = 0 if fresh else int(self.slots[slot])
        for token, position in zip(tokens, positions, strict=True):
            memory = fold(memory, token)
            self.pages[pages[position // PAGE_SIZE], position % PAGE_SIZE] = token
        self.slots[slot] = memory
        return memory + int(self.pages[pages].reshape(-1)[: positions[-1] + 1].sum())

    def compile_step(self, state: DecodeState, layout: BatchLayout) -> None:
        self.sizes.add((layout.num_decode, layout.num_prefill, layout.segment_slots.shape[0]))


@pytest.fixture(autouse=True)
def _no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "allocate", lambda _config, _spec: DecodeState(()))


def make_engine(echo: Echo) -> Engine:
    config = cast(ModelConfig, SimpleNamespace(vocab_size=VOCAB))
    return Engine(cast(Any, echo), config, LIMITS, SPEC)


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    answer: list[int] = field(default_factory=list)

    def expected(self) -> list[int]:
        return alone(self.prompt, self.max_tokens)


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
        st.tuples(st.just("cancel"), st.just([]), st.integers(0, 30)),
        st.tuples(st.just("step"), st.just([]), st.integers(1, 4)),
        st.tuples(st.just("fail"), st.just([]), st.integers(1, 2)),
    ),
    min_size=6,
    max_size=40,
)


class Failure(BaseException):
    """Like KeyboardInterrupt, it is no Exception."""


@settings(max_examples=80, deadline=None)
@given(events=EVENTS)
def test_r086_whoever_leaves_or_fails_the_others_get_their_answers(
    events: list[tuple[str, list[int], int]],
) -> None:
    """Requests come, go at any step, and a step fails now and then (R024, R079, R084-R089)."""
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
            heard = len(wanted[key].answer)
            assert wanted.pop(key).expected()[:heard] == asked_answer(asked_of=None, heard=heard)
        elif what == "step":
            for _ in range(number):
                if engine.has_work:
                    engine.step()
    finish(engine)
    assert is_idle(engine)
