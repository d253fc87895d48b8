"""Laws of scoring: however a text is cut, its logits, states and probabilities are the same."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from random_checkpoints import random_tensors
from tiny_models import LINEAR, SEED, VOCAB_SIZE, greedy, linear_llm, tiny_llm
from tolerances import TOLERANCES

from bailing_jax import LLM
from bailing_jax.engine import scoring
from bailing_jax.errors import EXIT_DOES_NOT_FIT, UserError

pytestmark = pytest.mark.unoptimised

LAYERS, WIDTH = LINEAR["num_hidden_layers"], LINEAR["hidden_size"]
METHODS = ("logits", "hidden_states", "token_logprobs", "recurrent_states")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm(prefill_chunk=512)


@pytest.fixture(scope="module")
def narrow() -> LLM:
    """The same model in chunks of 7."""
    return tiny_llm(prefill_chunk=7)


def text(rng: np.random.Generator, length: int = 61) -> list[int]:
    return rng.integers(0, VOCAB_SIZE, length).tolist()


def score(llm: LLM, method: str, ids: Any) -> Any:
    return getattr(llm, method)(ids)


def test_shapes_and_types(llm: LLM, rng: np.random.Generator) -> None:
    for length in (1, 2, 61):
        ids = text(rng, length)
        results = {
            "logits": (length, VOCAB_SIZE),
            "hidden_states": (LAYERS + 1, length, WIDTH),
            "token_logprobs": (length - 1,),
        }
        for method, shape in results.items():
            got = score(llm, method, ids)
            assert type(got) is np.ndarray
            assert (got.shape, got.dtype) == (shape, np.float32)
            assert np.isfinite(got).all()
        states = llm.recurrent_states(ids)
        assert sorted(states) == [0]  # the only lightning layer of this plan
        assert states[0].shape == (3, 16, 16)
        assert states[0].dtype == np.float32


def test_r045_chunks_of_7_or_512_score_alike(
    llm: LLM, narrow: LLM, rng: np.random.Generator
) -> None:
    for length in (6, 7, 8, 61):
        ids = text(rng, length)
        for method in METHODS[:3]:
            np.testing.assert_allclose(
                score(narrow, method, ids),
                score(llm, method, ids),
                rtol=0,
                atol=TOLERANCES["law_logits"],
            )
        for layer, state in llm.recurrent_states(ids).items():
            atol = np.abs(state).max() * TOLERANCES["law_state"]
            np.testing.assert_allclose(narrow.recurrent_states(ids)[layer], state, atol=atol)


def test_token_logprobs_are_the_log_softmax_of_the_logits(
    llm: LLM, rng: np.random.Generator
) -> None:
    ids = text(rng)
    logits = llm.logits(ids).astype(np.float64)[:-1]
    want = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    got = llm.token_logprobs(ids)
    np.testing.assert_allclose(got, want[range(60), ids[1:]], rtol=0, atol=TOLERANCES["law_logits"])
    assert got.max() < 0


def test_what_comes_later_changes_nothing_before(llm: LLM, rng: np.random.Generator) -> None:
    """Same program, same rows: bit for bit."""
    ids, other = text(rng), text(rng)
    mixed = ids[:40] + other[40:]
    np.testing.assert_array_equal(llm.logits(mixed)[:40], llm.logits(ids)[:40])
    np.testing.assert_array_equal(llm.hidden_states(mixed)[:, :40], llm.hidden_states(ids)[:, :40])
    assert (np.abs(llm.logits(mixed)[40:] - llm.logits(ids)[40:]).max(1) > 1e-3).all()


def test_hidden_states_begin_with_the_embedding_and_end_before_the_norm(
    llm: LLM, rng: np.random.Generator
) -> None:
    ids = text(rng)
    weights = {name: w.astype(np.float64) for name, w in random_tensors(LINEAR, SEED).items()}
    hidden = llm.hidden_states(ids).astype(np.float64)
    np.testing.assert_array_equal(hidden[0], weights["model.word_embeddings.weight"][ids])
    normed = hidden[-1] / np.sqrt((hidden[-1] ** 2).mean(1, keepdims=True) + LINEAR["rms_norm_eps"])
    want = normed * weights["model.norm.weight"] @ weights["lm_head.weight"].T
    np.testing.assert_allclose(llm.logits(ids), want, rtol=0, atol=TOLERANCES["law_logits"])


def test_r020_scoring_twice_and_in_between_gives_the_same_bits(
    llm: LLM, rng: np.random.Generator
) -> None:
    ids = text(rng)
    first = {method: score(llm, method, ids) for method in METHODS[:3]}
    llm.logits(text(rng, 30))
    for method, want in first.items():
        np.testing.assert_array_equal(score(llm, method, ids), want)
    np.testing.assert_array_equal(llm.logits(np.array(ids)), first["logits"])


def test_scoring_beside_an_open_stream_disturbs_neither() -> None:
    shared = linear_llm()
    want = list(shared.stream([1, 2, 3], greedy(6, ignore_eos=True)))
    logits = shared.logits([5, 6, 7])
    stream = shared.stream([1, 2, 3], greedy(6, ignore_eos=True))
    pieces = [next(stream), next(stream)]
    np.testing.assert_array_equal(shared.logits([5, 6, 7]), logits)
    assert pieces + list(stream) == want


def test_texts_longer_than_max_model_len_can_be_scored(
    narrow: LLM, rng: np.random.Generator
) -> None:
    ids = text(rng, 150)
    assert narrow.limits.max_model_len < 150
    got = narrow.token_logprobs(ids)
    assert got.shape == (149,)
    np.testing.assert_allclose(
        got[:60], narrow.token_logprobs(ids[:61]), rtol=0, atol=TOLERANCES["law_logits"]
    )


@pytest.mark.parametrize(
    ("method", "tokens", "size"),
    [("logits", 2**30 // VOCAB_SIZE + 1, "4.0"), ("hidden_states", 7_500_000, "4.0")],
)
def test_results_above_4_gib_are_refused_before_anything_is_allocated(
    llm: LLM, method: str, tokens: int, size: str
) -> None:
    ids = [1] * tokens
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"are {size} GiB; the limit is 4 GiB") as caught:
        score(llm, method, ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.exit_code == EXIT_DOES_NOT_FIT
    assert peak < 2**29  # a copy of the ids


def test_the_limit_itself_is_allowed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(scoring, "MAX_RESULT_BYTES", 4 * VOCAB_SIZE * 61)
    assert llm.logits(text(rng)).shape == (61, VOCAB_SIZE)
    with pytest.raises(UserError, match="the limit is"):
        llm.logits(text(rng, 62))
    assert llm.token_logprobs(text(rng, 62)).shape == (61,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "token_ids: empty"),
        ([1, VOCAB_SIZE], f"token_ids: token id {VOCAB_SIZE}; allowed: 0 to {VOCAB_SIZE - 1}"),
        ([-1], "token_ids: token id -1"),
        ("text", "token_ids = 'text'; allowed: a list of token ids"),
        ([1.0], r"token_ids = \[1\.0\]; allowed: a list of token ids"),
        ([[1, 2]], r"token_ids = \[\[1, 2\]\]; allowed"),
        (None, "token_ids = None; allowed"),
    ],
)
def test_bad_ids_are_refused(llm: LLM, method: str, ids: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(llm, method, ids)
