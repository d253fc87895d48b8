"""A model that is only a memory: every token depends on all before it.

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

from bailing_jax.batch import BatchLayout, Region
from bailing_jax.config import ModelConfig
from bailing_jax.engine import engine as engine_module
from bailing_jax.engine.engine import Engine
from bailing_jax.engine.limits import DECODE_STEPS, EngineLimits
from bailing_jax.engine.programs import NOTHING, Behind, Ends, StepResult
from bailing_jax.engine.sampler import Knobs
from bailing_jax.sampling_params import SamplingParams, resolve
from bailing_jax.state import DecodeState

VOCAB, PAGE_SIZE = 61, 4
LIMITS = EngineLimits(max_num_seqs=3, max_model_len=26, prefill_chunk=8, page_size=PAGE_SIZE)


def fold(memory: int, token: int) -> int:
    return (memory * 31 + token + 7) % 1_000_003


def alone(
    prompt: list[int], max_tokens: int, max_model_len: int = LIMITS.max_model_len
) -> list[int]:
    """The answer by the definition: greedy, no end but the budget and the longest length."""
    tokens = list(prompt)
    for _ in range(min(max_tokens, max_model_len - len(prompt))):
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
        self.decode_steps: list[int] = []
        # Of each call that prefills: its rows, and the tokens of its segments.
        self.pieces: list[tuple[int, list[int]]] = []
        self.fails = False

    def step(
        self,
        state: DecodeState,
        layout: BatchLayout,
        knobs: Knobs,
        ends: Ends | None = None,
        num_steps: int = 1,
    ) -> StepResult:
        self.ran.add(size(layout))
        assert knobs.temperature.shape == layout.logit_rows.shape
        assert (ends is None) == (layout.num_prefill > 0)
        behind = None
        if layout.num_prefill:
            counts = np.diff(layout.cu_seqlens)
            self.pieces.append((layout.num_prefill, counts[counts > 0].tolist()))
        if ends is None:
            tokens = self._one_step(layout)[None]
        else:
            tokens, behind = self._decode(layout, ends, num_steps)
        if self.fails:  # after the state has changed, as a compiled step would
            raise Failure
        logits = np.zeros((tokens.shape[1], VOCAB), np.float32)
        return StepResult(cast(Any, tokens), cast(Any, logits), state, behind)

    def _decode(
        self, layout: BatchLayout, ends: Ends, num_steps: int
    ) -> tuple[np.ndarray, Behind]:
        """The loop on the device, by its description."""
        self.decode_steps.append(num_steps)
        tokens = np.full((DECODE_STEPS, layout.num_decode), NOTHING)
        room = np.array(ends.room)
        for i in range(num_steps):
            here = replace(
                layout,
                positions=layout.decode_contexts,
                decode_slots=np.where(room > 0, layout.decode_slots, 0),
            )
            tokens[i] = np.where(room > 0, self._one_step(here), NOTHING)
            stops = (tokens[i][:, None] == ends.stop_ids).any(1)
            room = np.where((room > 0) & ~stops, room - 1, 0)
            layout = replace(
                layout,
                tokens=np.where(room > 0, tokens[i], 0),
                decode_contexts=layout.decode_contexts + 1,
            )
        return tokens, Behind(*cast(Any, (layout.tokens, layout.decode_contexts, room)))

    def _one_step(self, layout: BatchLayout) -> np.ndarray:
        picked = np.zeros(layout.logit_rows.shape[0], np.int64)
        ends = layout.num_decode + np.asarray(layout.cu_seqlens)
        decodes, segments = layout.decode_region(), layout.prefill_region()
        everyone = [(decodes, i, i, i + 1) for i in range(layout.num_decode)]
        everyone += [(segments, i, *ends[i : i + 2]) for i in range(len(ends) - 1)]
        for output, (region, i, start, end) in enumerate(everyone):
            if region.slots[i] != 0 and start < end:
                assert layout.logit_rows[output] == end - 1
                heard = self._hear(region, i, layout.tokens[start:end], layout.positions[start:end])
                picked[output] = heard % VOCAB
        return picked

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


def no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines allocate nothing."""
    monkeypatch.setattr(engine_module, "allocate", lambda _config, _spec: DecodeState(()))


def make_engine(echo: Echo) -> Engine:
    config = cast(ModelConfig, SimpleNamespace(vocab_size=VOCAB))
    return Engine(cast(Any, echo), config, echo.limits, echo.spec)


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    answer: list[int] = field(default_factory=list)

    def expected(self, max_model_len: int = LIMITS.max_model_len) -> list[int]:
        return alone(self.prompt, self.max_tokens, max_model_len)

    def check_beginning(self, max_model_len: int = LIMITS.max_model_len) -> None:
        assert self.answer == self.expected(max_model_len)[: len(self.answer)]


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
