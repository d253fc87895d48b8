"""Laws of several decode steps in one call: same tokens, same state, and nobody else's business."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import LATENT, LINEAR, NUM_SEQS, is_idle, latent_llm, linear_llm, tiny_llm

from bailing_jax import LLM, SamplingParams
from bailing_jax.batch import pack
from bailing_jax.engine import sampler
from bailing_jax.engine.limits import DECODE_STEPS
from bailing_jax.engine.programs import NOTHING, no_ends
from bailing_jax.row import Row
from bailing_jax.state import DecodeState

MODELS = {"linear": linear_llm, "latent": latent_llm}
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.2, "seed": 5},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 2**40},
]


@pytest.fixture(params=sorted(MODELS))
def llm(request: pytest.FixtureRequest) -> LLM:
    return MODELS[request.param]()


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], max_steps: int) -> Any:
    """All answers, with no more than so many steps a call."""
    requests = [llm.prepare(*pair) for pair in zip(prompts, params, strict=True)]
    for request in requests:
        llm.submit(request)
    while llm._engine.has_work:
        llm._engine.step(max_steps=max_steps)
    assert is_idle(llm)
    return [output for request in requests for output in request.output().outputs]


def test_r082_several_steps_give_the_tokens_of_single_ones(llm: LLM) -> None:
    """Staggered ends, drawn and greedy rows, also at the edge of a page (64 tokens)."""
    prompts = [[3, 1, 4], list(range(60)), [7] * 31]
    params = [
        SamplingParams(max_tokens=n, ignore_eos=True, **fields)
        for n, fields in zip((30, 25, 11), PARAMS, strict=True)
    ]
    want = run(llm, prompts, params, 1)
    assert [len(output.token_ids) for output in want] == [30, 25, 11]
    for max_steps in (2, 5, DECODE_STEPS):
        assert run(llm, prompts, params, max_steps) == want


def test_stops_within_a_call_end_the_answer_there(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=40, ignore_eos=True, **fields) for fields in PARAMS]
    prompts = [[5, 6], [8] * 20, [9, 1, 1]]
    free = run(llm, prompts, params, 1)
    stops = [output.token_ids[8 + i] for i, output in enumerate(free)]
    many = [[stop, *range(300, 312)][:: 1 if i else -1] for i, stop in enumerate(stops)]
    for ids in ([[stop] for stop in stops], many):
        stopped = [
            SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=s, **fields)
            for s, fields in zip(ids, PARAMS, strict=True)
        ]
        for max_steps in (1, DECODE_STEPS):
            got = run(llm, prompts, stopped, max_steps)
            for output, all_of, mine in zip(got, free, ids, strict=True):
                end = next(i for i, t in enumerate(all_of.token_ids) if t in mine)
                assert output.token_ids == all_of.token_ids[: end + 1]
                assert output.finish_reason == "stop"


def leaves(state: DecodeState) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in state.layers]


def test_r022_a_row_that_has_ended_writes_no_slot_and_no_page(llm: LLM) -> None:
    """One row may take 2 tokens, one all 6, one is padding; single calls of the rows say what."""
    engine = llm._engine
    programs, page_size = engine._programs, engine._limits.page_size
    width = engine._limits.pages_a_sequence
    rows = [Row([11], 1, [1, 2], 60), Row([12], 3, [4, 5], 61)]
    knobs = sampler.knobs(NUM_SEQS, (), ())
    rng = np.random.default_rng(3)

    def state() -> DecodeState:
        return DecodeState(tuple(np.array(leaf) for leaf in start))  # pyright: ignore

    def call(state: DecodeState, rows: list[Row], room: list[int], steps: int) -> Any:
        layout = pack(
            rows, [], num_decode=NUM_SEQS, num_prefill=0, num_segments=0,
            page_size=page_size, pages_a_sequence=width,
        )  # fmt: skip
        ends = no_ends(NUM_SEQS)
        ends.room[: len(room)] = room
        return programs.step(state, layout, knobs, ends, steps)

    start = [0.1 * rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in
             leaves(engine._state)]  # fmt: skip
    for leaf in start:
        leaf[0] = 0
    together = call(state(), rows, [2, 6], 6)
    tokens = np.array(together.tokens)
    assert (tokens[:, 0] >= 0).tolist() == [True] * 2 + [False] * (DECODE_STEPS - 2)
    assert (tokens[:, 1] >= 0).tolist() == [True] * 6 + [False] * (DECODE_STEPS - 6)
    assert (tokens[:, 2] == NOTHING).all()
    first = call(state(), rows, [2, 2], 2)
    after_two = leaves(first.state)
    second = call(first.state, [Row([int(tokens[1, 1])], 3, [4, 5], 63)], [4], 4)
    for one, other in zip(leaves(together.state), leaves(second.state), strict=True):
        assert not one[0].any()
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    # The first row's slot and pages are those it left after its two tokens, bit for bit.
    for one, other in zip(leaves(together.state), after_two, strict=True):
        np.testing.assert_array_equal(one[1], other[1])


# The next call is on its way before a call's tokens are seen.


@pytest.fixture(scope="module", params=sorted(MODELS))
def exact_llm(request: pytest.FixtureRequest) -> LLM:
    """Without debug mode, which waits for every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAILING_DEBUG", "0")
        return tiny_llm(LATENT if request.param == "latent" else LINEAR, batch_invariant=True)


def run_ahead(llm: LLM, ahead: bool, last: int) -> tuple[list[Any], list[bytes], int]:
    """Answers, what the slots hold at the end, and the calls started ahead.

    The second request is cancelled with its token number `last`, which the device can't know; what
    its own slot holds then is left out.
    """
    engine = llm._engine
    requests = []
    for i, length in enumerate((3, 17, 32)):
        fields = {"temperature": 0.8 * (i % 2), "seed": i, "stop_token_ids": [30 + i, 77]}
        params = SamplingParams(max_tokens=(30, 50, 46)[i], ignore_eos=True, **fields)
        requests.append(llm.prepare([5 + i] * length, params))
    heard: list[int] = []

    def cancels(piece: Any) -> None:
        heard.append(piece.token_id)
        if len(heard) == last:
            llm.cancel(requests[1])

    for i, request in enumerate(requests):
        llm.submit(request, cancels if i == 1 else None)
    started = 0
    sequences = [engine._requests[request.numbers[0]].sequence for request in requests]
    engine.step(ahead=ahead)
    places = [0, *(s.slot.slot for s in (sequences[0], sequences[2]) if s.slot)]
    while engine.has_work:
        engine.step(ahead=ahead)
        started += engine._ahead is not None
    assert is_idle(llm)
    slots = [np.array(leaf) for leaf in engine._state.layers if leaf.shape[0] == NUM_SEQS + 1]
    assert slots
    states = [leaf[slot].tobytes() for leaf in slots for slot in places]
    return [request.output() for request in requests], states, started


@pytest.mark.parametrize("last", [21, 99])
def test_r082_calls_started_ahead_change_no_bit(exact_llm: LLM, last: int) -> None:
    """Neither of the tokens nor of the states, with stops that the device knows too."""
    want, states, started = run_ahead(exact_llm, False, last)
    assert started == 0
    got, others, started = run_ahead(exact_llm, True, last)
    assert started > 2
    assert got == want
    assert [*map(hash, others)] == [*map(hash, states)]


def test_the_program_beside_the_step_is_announced_too(exact_llm: LLM) -> None:
    """Where nobody warmed up, the first request with log probabilities compiles it."""
    told: list[str] = []
    exact_llm.watch_compiling(told.append)
    for _ in range(2):
        exact_llm.generate([1, 2], SamplingParams(max_tokens=2, temperature=0.0, logprobs=1))
    exact_llm.watch_compiling(None)
    beside = [words for words in told if "penalties" in words]
    assert beside == [f"penalties and log probabilities of {NUM_SEQS} rows"]
