"""Laws of logits that are not finite: the request they belong to ends with an error, and no other.

A model gets there by one token whose embedding is NaN or infinite. A prompt that holds the token
fails in prefill; one whose answer comes to it fails in the step after, which may be in the middle
of a call of several.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import LATENT, LINEAR, VOCAB_SIZE, greedy, is_idle, tiny_llm
from tolerances import TOLERANCES

from bailing_jax import LLM, AsyncEngine, SamplingParams
from bailing_jax.cli.job import run_job
from bailing_jax.engine import sampler
from bailing_jax.engine.limits import DECODE_STEPS
from bailing_jax.engine.sampler import NOT_FINITE
from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, NotFiniteError

pytestmark = pytest.mark.unoptimised

CONFIGS = {"linear": LINEAR, "latent": LATENT}
PROMPTS = [[3, 1, 4], list(range(60, 100)), [7] * 31]
# The first answer's token of this place is made the spoiled one.
PLACE = 5


@pytest.fixture(params=sorted(CONFIGS), scope="module")
def llm(request: pytest.FixtureRequest) -> LLM:
    """Without debug mode, which takes such logits for a fault of the engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAILING_DEBUG", "0")
        return tiny_llm(CONFIGS[request.param])


@pytest.fixture(autouse=True)
def _as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    """Weights as they were, and nothing left behind."""
    if "llm" not in request.fixturenames:
        yield
        return
    llm: LLM = request.getfixturevalue("llm")
    leaves = llm._engine._programs._leaves
    yield
    llm._engine._programs._leaves = leaves
    assert is_idle(llm)
    assert not llm._engine._requests


def spoil(llm: LLM, token: int, value: float = float("nan")) -> None:
    """This token's embedding becomes `value`."""
    programs = llm._engine._programs
    leaves = list(programs._leaves)
    (place,) = [i for i, x in enumerate(leaves) if x.shape[0] == VOCAB_SIZE]
    leaves[place] = leaves[place].at[token].set(value)
    programs._leaves = tuple(leaves)


def answers(llm: LLM, params: SamplingParams, max_steps: int = DECODE_STEPS) -> list[Any]:
    requests = [llm.prepare(prompt, params) for prompt in PROMPTS]
    for request in requests:
        llm.submit(request)
    while llm._engine.has_work:
        llm._engine.step(max_steps=max_steps)
    return [output for request in requests for output in request.output().outputs]


def assert_same(got: Any, want: Any) -> None:
    """The same answer; its log probabilities but for the bits that the number of rows decides."""
    assert replace(got, logprobs=None) == replace(want, logprobs=None)
    for mine, theirs in zip(got.logprobs or (), want.logprobs or (), strict=True):
        assert mine == pytest.approx(theirs, rel=0, abs=TOLERANCES["law_logits"])


def unique_token(found: list[Any]) -> int:
    """The first answer's token at PLACE, or soon after, that occurs nowhere before and beside."""
    mine = found[0].token_ids
    others = {t for tokens in (*PROMPTS, *(o.token_ids for o in found[1:])) for t in tokens}
    return next(t for i, t in enumerate(mine) if i >= PLACE and t not in {*others, *mine[:i]})


@pytest.mark.parametrize(
    ("fields", "max_steps"),
    [({}, 1), ({}, DECODE_STEPS), ({"temperature": 1.3}, DECODE_STEPS), ({"logprobs": 2}, 1)],
    ids=["single-steps", "several-steps", "drawn", "logprobs"],
)
def test_r102_an_answer_that_comes_to_nan_ends_with_an_error_and_no_other_changes(
    llm: LLM, fields: dict[str, Any], max_steps: int
) -> None:
    params = SamplingParams(
        **{"max_tokens": 30, "temperature": 0.0, "seed": 3, "ignore_eos": True, **fields}
    )
    want = answers(llm, params, max_steps)
    token = unique_token(want)
    for value in (float("nan"), float("inf")):
        spoil(llm, token, value)
        got = answers(llm, params, max_steps)
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            assert_same(mine, theirs)
        failed = got[0]
        assert failed.finish_reason == "error"
        count = want[0].token_ids.index(token) + 1
        assert failed.token_ids == want[0].token_ids[:count]
        assert "not finite" in failed.error
        assert f"{count} generated" in failed.error
        if fields.get("logprobs"):
            assert len(failed.logprobs) == count


def test_r102_a_prompt_that_gives_nan_ends_with_an_error_and_no_other_changes(llm: LLM) -> None:
    """In its first piece or in its last, beside prompts and answers of others."""
    params = greedy(12, ignore_eos=True)
    want = answers(llm, params)
    for prompt in ([5, 301, 6], [301, *[8] * 30], [*[9] * 40, 301]):
        spoil(llm, 301)
        bad = llm.prepare(prompt, params)
        requests = [llm.prepare(other, params) for other in PROMPTS]
        for request in (requests[0], bad, *requests[1:]):
            llm.submit(request)
        while llm._engine.has_work:
            llm.step()
        assert [request.output().outputs[0] for request in requests] == want
        (output,) = bad.output().outputs
        assert (output.finish_reason, output.token_ids) == ("error", [])
        assert f"{len(prompt)} prompt" in str(output.error)
        # Slot and pages that are full of NaN now serve the next ones.
        assert answers(llm, params) == want


def test_a_penalty_or_bias_changes_nothing_about_it(llm: LLM) -> None:
    spoil(llm, 301)
    for fields in ({"repetition_penalty": 1.4}, {"logit_bias": {7: -100.0}}, {"logprobs": 1}):
        (output,) = llm.generate([5, 301], greedy(4, **fields))[0].outputs
        assert (output.finish_reason, output.token_ids) == ("error", [])


def test_one_of_several_answers_fails_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, seed=11, n=3, ignore_eos=True)
    (want,) = llm.generate([4, 4], params)
    first, *others = (output.token_ids for output in want.outputs)
    token = next(t for t in first[2:-1] if not any(t in other for other in others))
    spoil(llm, token)
    (got,) = llm.generate([4, 4], params)
    assert [output.finish_reason for output in got.outputs] == ["error", "length", "length"]
    assert [output.token_ids for output in got.outputs[1:]] == others


def test_streams_deliver_what_came_before_and_raise(llm: LLM) -> None:
    params = greedy(30, ignore_eos=True)
    want = answers(llm, params)
    token = unique_token(want)
    spoil(llm, token)
    expected = want[0].token_ids[: want[0].token_ids.index(token) + 1]
    heard: list[int] = []
    with pytest.raises(NotFiniteError, match="not finite"):
        heard.extend(piece.token_id for piece in llm.stream(PROMPTS[0], params))
    assert heard == expected

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            streams = [engine.submit(prompt, params) for prompt in PROMPTS]
            for token in expected:
                assert (await anext(streams[0])).token_id == token
            with pytest.raises(NotFiniteError, match="not finite"):
                await anext(streams[0])
            for stream, output in zip(streams[1:], want[1:], strict=True):
                assert [piece.token_id async for piece in stream] == output.token_ids

    asyncio.run(main())


def test_a_job_says_so_in_the_answers_line_and_goes_on(llm: LLM, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt_ids": [i, i]} for i in range(5)] + [{"prompt_ids": [301], "n": 2}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []

    def job() -> int:
        defaults = {"max_tokens": 4, "seed": 0, "ignore_eos": True}
        # No prompt of texts here, so nobody makes token ids.
        return run_job(lambda: (llm, None), source, output, defaults, said.append)  # pyright: ignore

    assert job() == EXIT_OK
    want = {r["id"]: r for r in map(json.loads, output.read_text().splitlines())}
    output.unlink()
    spoil(llm, 3)
    spoil(llm, 301)
    assert job() == EXIT_FAILURE
    assert said[-1] == "2 of 6 answers ended with an error; their lines say which"
    got = {r["id"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert {i: got[i] for i in (1, 2, 3, 5)} == {i: want[i] for i in (1, 2, 3, 5)}
    for answer in (got[4], *got[6]["outputs"]):
        assert (answer["finish_reason"], answer["token_ids"]) == ("error", [])
        assert "not finite" in answer["error"]
    # They count as answered: the same command has nothing left to do.
    assert job() == EXIT_OK


PICK, REFINE = jax.jit(sampler.pick), jax.jit(sampler.refine)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("vocab", [7, 300])
def test_only_rows_without_a_choice_pick_nothing(
    drawn: bool, vocab: int, rng: np.random.Generator
) -> None:
    """A token ruled out by -infinity is no error; NaN anywhere, +infinity or no token at all is."""
    nan, inf = np.nan, np.inf
    logits = rng.standard_normal((9, vocab)).astype(np.float32)
    logits[1, 0] = logits[2, -1] = nan
    logits[3, vocab // 2] = inf
    logits[4] = -inf
    logits[5, :-1] = -inf
    logits[6, 3], logits[6, 4] = nan, inf
    logits[7, 3], logits[7, 4] = -nan, -inf
    logits[8, ::2] = -inf
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    rows = list(range(9)) if drawn else []
    knobs = sampler.knobs(9, rows, [(params, 5)] * len(rows))
    positions = np.arange(9, dtype=np.int32)
    clean = np.where(np.isnan(logits) | (logits == inf), 0, logits)
    want = np.array(PICK(jnp.asarray(clean), knobs, positions))
    want[[1, 2, 3, 4, 6, 7]] = NOT_FINITE
    got = PICK(jnp.asarray(logits), knobs, positions)
    np.testing.assert_array_equal(got, want)
    assert want[5] == vocab - 1
    assert want[8] % 2 == 1
    # Nor does the program beside the step find a token there.
    edits = sampler.edits(logits.shape, (), ())._replace(is_edited=np.ones(9, bool))
    refined = REFINE(logits, np.zeros(9, np.int32), edits, knobs, positions)
    np.testing.assert_array_equal(refined.tokens, want)
