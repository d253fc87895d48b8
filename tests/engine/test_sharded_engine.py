"""A real model in an engine of several shards: debug mode, log probabilities, NaN, scoring.

The shards run one after the other on one device (`looped.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from looped import looped_engine, looped_scorer
from tiny_models import VOCAB_SIZE, greedy, linear_llm
from tolerances import TOLERANCES

from bailing_jax import SamplingParams
from bailing_jax.engine import debug
from bailing_jax.engine.calls import Call
from bailing_jax.engine.engine import Engine
from bailing_jax.engine.invariants import InvariantError
from bailing_jax.engine.shards import CallPlan
from bailing_jax.errors import NotFiniteError, UserError
from bailing_jax.state import DecodeState

pytestmark = pytest.mark.unoptimised

SHARDS = 2
# Two of them make less than a chunk, so that they go to the shards in turns.
PROMPTS = [[3, 1, 4], [1, 5] * 4, [9, 2, 6], [5] * 7]


def engine_of() -> Engine:
    llm = linear_llm()
    limits = replace(llm.limits, num_shards=SHARDS)
    return looped_engine(llm._engine._programs, llm.config, limits)


class Heard:
    """What one request is told, until it has so many tokens."""

    def __init__(self, engine: Engine, prompt: list[int], most: int, **fields: Any) -> None:
        params = linear_llm()._resolved(greedy(most, ignore_eos=True, **fields))
        self.tokens: list[int] = []
        self.entries: list[dict[int, float] | None] = []
        self.errors: list[Exception] = []
        self.number = engine.submit(prompt, params, 0, self._on_token, on_error=self.errors.append)

    def _on_token(self, token: int, entry: dict[int, float] | None) -> bool:
        self.tokens.append(token)
        self.entries.append(entry)
        return False


def finish(engine: Engine) -> None:
    for _ in range(200):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("somebody starves")


def alone(prompt: list[int], most: int, **fields: Any) -> Any:
    (output,) = linear_llm().generate([prompt], greedy(most, ignore_eos=True, **fields))
    return output.outputs[0]


def slots(engine: Engine, shard: int) -> np.ndarray:
    """The first layer's slots of a shard."""
    leaf = np.asarray(engine._state.layers[0])
    return leaf.reshape(SHARDS, -1, *leaf.shape[1:])[shard]


def test_r020_r097_what_a_shard_frees_is_poisoned_there_and_nowhere_else() -> None:
    """Requests 1 and 2 have the same slot number, each in its shard."""
    engine = engine_of()
    heard = [Heard(engine, prompt, 12) for prompt in PROMPTS[:2]]
    engine.step(max_steps=1)
    sequences = [engine._requests[h.number].sequence for h in heard]
    (one, two) = [s.slot.slot for s in sequences if s.slot is not None]
    assert one == two
    assert [s.shard for s in sequences] == [0, 1]
    engine.cancel(heard[0].number)
    engine.step(max_steps=1)
    assert np.isnan(slots(engine, 0)[1:]).all()
    assert np.isfinite(slots(engine, 1)[two]).all()
    for shard in range(SHARDS):
        assert not slots(engine, shard)[0].any()
    finish(engine)
    assert heard[1].tokens == alone(PROMPTS[1], 12).token_ids


@pytest.mark.parametrize("place", ["owner's", "null", "idle"])
def test_r097_debug_mode_names_a_write_into_another_shards_state(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = engine_of()
    heard = [Heard(engine, prompt, 12) for prompt in PROMPTS[:2]]
    engine.step(max_steps=1)
    if place == "idle":
        engine.cancel(heard[1].number)
    spoiled = {"owner's": 2, "null": 0, "idle": 1}[place]
    programs: Any = engine._programs
    real = programs.step

    def step(*args: Any) -> Any:
        result = real(*args)
        leaves = [np.array(leaf) for leaf in result.state.layers]
        leaves[0].reshape(SHARDS, -1, *leaves[0].shape[1:])[1, spoiled] = 3
        return result._replace(state=DecodeState(tuple(leaves)))  # pyright: ignore

    monkeypatch.setattr(programs, "step", step)
    with pytest.raises(InvariantError, match=r"^I8" if place == "null" else r"^I4"):
        engine.step(max_steps=1)


def test_r010_each_shards_rows_get_their_own_penalties_and_log_probabilities() -> None:
    """In the second shard only, and beside others that want none."""
    engine = engine_of()
    wishes: list[dict[str, Any]] = [
        {}, {"logprobs": 3, "repetition_penalty": 1.3}, {"logprobs": 2}, {"logit_bias": {7: 4.0}},
    ]  # fmt: skip
    heard = [Heard(engine, p, 9, **w) for p, w in zip(PROMPTS, wishes, strict=True)]
    engine.step()
    assert [engine._requests[h.number].sequence.shard for h in heard] == [0, 1, 0, 1]
    finish(engine)
    for got, prompt, fields in zip(heard, PROMPTS, wishes, strict=True):
        want = alone(prompt, 9, **fields)
        assert got.tokens == want.token_ids
        for mine, theirs in zip(got.entries, want.logprobs or [None] * 9, strict=True):
            assert mine == (theirs and pytest.approx(theirs, rel=0, abs=TOLERANCES["law_logits"]))


@pytest.fixture
def nan_token() -> Iterator[int]:
    """The embedding of a token that nobody else uses is NaN."""
    programs: Any = linear_llm()._engine._programs
    leaves, token = programs._leaves, 300
    (place,) = [i for i, x in enumerate(leaves) if x.shape[0] == VOCAB_SIZE]
    spoiled = leaves[place].at[token].set(float("nan"))
    programs._leaves = (*leaves[:place], spoiled, *leaves[place + 1 :])
    yield token
    programs._leaves = leaves


def test_r102_nan_in_one_shard_ends_that_request_alone(
    monkeypatch: pytest.MonkeyPatch, nan_token: int
) -> None:
    monkeypatch.setenv("BAILING_DEBUG", "0")
    engine = engine_of()
    prompts = [*PROMPTS[:3], [8, nan_token, 8]]
    heard = [Heard(engine, prompt, 7) for prompt in prompts]
    finish(engine)
    assert [len(h.tokens) for h in heard] == [7, 7, 7, 0]
    assert [[type(e) for e in h.errors] for h in heard] == [[], [], [], [NotFiniteError]]
    assert not any(shard.scheduler.running for shard in engine._shards.all)


def test_r024_what_a_listener_raises_ends_its_request_in_its_shard() -> None:
    engine = engine_of()
    heard = [Heard(engine, prompt, 6) for prompt in PROMPTS]

    def fails(_token: int, _entry: object) -> bool:
        raise OSError("gone")

    params, errors = linear_llm()._resolved(SamplingParams(max_tokens=5)), list[Exception]()
    engine.submit([1, 2], params, 0, fails, on_error=errors.append)
    finish(engine)
    assert [str(e) for e in errors] == ["gone"]
    assert [len(h.tokens) for h in heard] == [6] * 4
    for shard in engine._shards.all:
        assert shard.scheduler.slots.num_free == shard.scheduler.slots.capacity


@pytest.mark.parametrize("method", ["logits", "hidden_states", "token_logprobs"])
def test_the_first_shard_scores(method: str) -> None:
    llm = linear_llm()
    ids = np.random.default_rng(3).integers(0, VOCAB_SIZE, 41).tolist()
    scorer = looped_scorer(
        llm._engine._programs, llm.config, llm._engine._spec, llm.limits.prefill_chunk, SHARDS
    )
    np.testing.assert_array_equal(getattr(scorer, method)(ids), getattr(llm, method)(ids))
    for layer, state in llm.recurrent_states(ids).items():
        np.testing.assert_array_equal(scorer.recurrent_states(ids)[layer], state)


def test_debug_mode_is_refused_where_no_process_sees_the_whole_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jax.process_count", lambda: 4)
    with pytest.raises(UserError, match=r"BAILING_DEBUG.*4 processes"):
        engine_of()
    monkeypatch.setenv(debug.VARIABLE, "0")
    engine_of()


def test_states_come_apart_and_together_again() -> None:
    rng = np.random.default_rng(0)
    leaves = (rng.random((6, 2)), rng.random((9, 4, 2)))
    state: Any = DecodeState(leaves)  # pyright: ignore
    parts = debug.apart(state, 3)
    np.testing.assert_array_equal(parts[2].layers[0], leaves[0][4:])
    np.testing.assert_array_equal(parts[1].layers[1], leaves[1][3:6])
    for got, want in zip(debug.together(parts, state).layers, leaves, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_call_of_several_shards_is_what_each_would_be_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows are numbered through, shard by shard, in tokens, knobs and ends."""
    monkeypatch.setenv("BAILING_DEBUG", "0")
    engine = engine_of()
    seen: list[Call] = []
    real = engine._call

    def call(plan: CallPlan) -> Call:
        seen.append(real(plan))
        return seen[-1]

    monkeypatch.setattr(engine, "_call", call)
    for i, prompt in enumerate(PROMPTS):
        params = linear_llm()._resolved(
            SamplingParams(max_tokens=9 + i, temperature=0.5 + i, stop_token_ids=[i], seed=i)
        )
        engine.submit(prompt, params, 70 + i, lambda _t, _e: False, stop_ids=[20 + i])
    finish(engine)
    made = next(c for c in seen if c.ends is not None and len(c.plan.rows()) == len(PROMPTS))
    width = made.plan.rows_a_shard
    assert made.ends is not None
    for row, sequence in made.plan.rows().items():
        shard, place, index = row // width, row % width, sequence.number - 1
        assert (shard, place) == (index % 2, index // 2)
        assert made.knobs.seeds[shard, place].tolist() == [0, 70 + index]
        assert made.knobs.temperature[shard, place] == np.float32(0.5 + index)
        assert made.ends.stop_ids[shard, place, :2].tolist() == [20 + index, -1]
        np.testing.assert_array_equal(
            made.tokens()[:, row], np.asarray(made.result.tokens)[shard, :, place]
        )
