"""Laws of the sampler: the right set, the right frequencies, and nobody else's business.

`distribution` is the definition in float64, token by token; draws of 1024 seeds are held against
it. All seeds are fixed, so a test that passes once always passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bailing_jax.engine import sampler
from bailing_jax.engine.sampler import Choice
from bailing_jax.sampling_params import SamplingParams, resolve

VOCAB, DRAWS = 13, 1024
# Neighbours differ by 0.03 or more; two pairs tie.
LOGITS = np.array([0.4, -1.1, 2.0, 0.4, 1.3, -0.2, 0.9, 2.4, -3.0, 1.7, -0.2, 0.1, 0.6], np.float32)
TOKENS = [2, 8, 8, 4, 8, 7, 8, 4]
NUM_PROMPT = 3  # the answer is 4, 8, 7, 8, 4


PICK, REFINE = jax.jit(sampler.pick), jax.jit(sampler.refine)


def positions_and_knobs(
    size: int, rows: Sequence[int], choices: Sequence[Choice]
) -> tuple[np.ndarray, sampler.Knobs]:
    positions = np.zeros(size, np.int32)
    positions[list(rows)] = [len(c.tokens) for c in choices]
    return positions, sampler.knobs(size, rows, [(c.params, c.seed) for c in choices])


def sample(logits: jax.Array, rows: Sequence[int], choices: Sequence[Choice]) -> np.ndarray:
    """A token for each of the given rows, as the engine gets it."""
    positions, knobs = positions_and_knobs(logits.shape[0], rows, choices)
    tokens = PICK(logits, knobs, positions)
    if any(sampler.is_edited(c.params) for c in choices):
        edits = sampler.edits(logits.shape, rows, choices)
        tokens = REFINE(logits, tokens, edits, knobs, positions).tokens
    return np.asarray(tokens)[list(rows)]


def logprobs(
    logits: jax.Array, rows: Sequence[int], chosen: Sequence[int], counts: Sequence[int | None]
) -> list[dict[int, float] | None]:
    tokens = np.zeros(logits.shape[0], np.int32)
    tokens[list(rows)] = chosen
    positions, knobs = positions_and_knobs(logits.shape[0], (), ())
    edits = sampler.edits(logits.shape, (), ())
    return sampler.logprobs(REFINE(logits, tokens, edits, knobs, positions), rows, counts)


def params(**fields: Any) -> SamplingParams:
    return resolve(SamplingParams(**{"temperature": 1.0, **fields}), {}, "")


def choice(p: SamplingParams, tokens: Sequence[int], seed: int) -> Choice:
    return Choice(p, tokens, seed, num_prompt=NUM_PROMPT)


def distribution(logits: np.ndarray, p: SamplingParams, tokens: Sequence[int]) -> np.ndarray:
    """float64 [vocab]: how often each token should come."""
    scores = logits.astype(np.float64)
    answer = list(tokens)[NUM_PROMPT:]
    for token in set(tokens):
        penalty = p.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in range(len(scores)):
        occurred = answer.count(token)
        scores[token] -= p.frequency_penalty * occurred + p.presence_penalty * (occurred > 0)
    for token, value in (p.logit_bias or {}).items():
        scores[token] += value
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if p.temperature == 0:
        return np.eye(len(scores))[order[0]]
    weights = np.exp((scores - scores.max()) / p.temperature)
    kept = order[: p.top_k or None]
    best, total, before = weights[kept[0]], weights[kept].sum(), 0.0
    allowed = np.zeros(len(scores), bool)
    for token in kept:
        if before < p.top_p and weights[token] >= p.min_p * best:
            allowed[token] = True
        before += weights[token] / total
    return np.where(allowed, weights, 0) / weights[allowed].sum()


def draws(
    p: SamplingParams, tokens: Sequence[int] = TOKENS, logits: np.ndarray = LOGITS
) -> np.ndarray:
    """How often each token came under seeds 0 to 1023."""
    rows = jnp.asarray(np.tile(logits, (DRAWS, 1)))
    got = sample(rows, range(DRAWS), [choice(p, tokens, seed) for seed in range(DRAWS)])
    return np.bincount(got, minlength=VOCAB)


def check_frequencies(counts: np.ndarray, expected: np.ndarray) -> None:
    """Nothing outside the allowed set, and a chi-square a fair sampler stays below."""
    assert counts[expected == 0].sum() == 0
    wanted = counts.sum() * expected
    often, rare = wanted >= 8, (wanted > 0) & (wanted < 8)
    got = np.append(counts[often], counts[rare].sum())
    want = np.append(wanted[often], wanted[rare].sum())
    square = ((got - want) ** 2 / np.maximum(want, 1)).sum()
    assert square < len(got) + 5 * np.sqrt(2 * len(got))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 7.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 10},  # cuts between the tied tokens 5 and 10
        {"top_k": 7},  # and between 0 and 3
        {"top_k": 500},
        {"top_p": 0.02},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.4},
        {"presence_penalty": 1.2},
        {"presence_penalty": -2},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.4},
        {"presence_penalty": 2.0, "frequency_penalty": -1.0},  # 4 occurred twice: they cancel
        {"presence_penalty": 0.5, "frequency_penalty": 1.5, "repetition_penalty": 1.8},
        {"frequency_penalty": 2.0, "logit_bias": {8: 4.0, 1: 3.0}, "top_k": 5},
        {"presence_penalty": 1.1, "temperature": 0.0, "logit_bias": {4: 1.0}},
        {"logit_bias": {1: 4.0, 7: -2.0, 12: 1e9}},
        {"logit_bias": {2: -1e9, 7: -1e9}},
        {"logit_bias": {2: 1.5}, "repetition_penalty": 2.5, "temperature": 1.4},
        {"top_k": 8, "top_p": 0.85, "min_p": 0.1, "temperature": 1.7},
        {"top_k": 5, "top_p": 0.7},  # of what top_k left, not of the whole
        {"top_p": 0.8, "temperature": 2.5, "repetition_penalty": 1.3, "logit_bias": {0: 1.0}},
    ],
    ids=str,
)
def test_every_parameter_gives_the_defined_frequencies(fields: dict[str, Any]) -> None:
    p = params(**fields)
    check_frequencies(draws(p), distribution(LOGITS, p, TOKENS))


@settings(max_examples=40, deadline=None)
@given(
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.2, 5),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-4, 4), max_size=4),
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
)
def test_any_parameters_together_allow_exactly_the_defined_set(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    tokens: list[int],
    seed: int,
) -> None:
    logits = 2 * np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
    fields = {
        "temperature": temperature,
        "top_k": top_k,
        "repetition_penalty": penalty,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    p = params(**fields, top_p=top_p, min_p=min_p, logit_bias=bias)
    expected = distribution(logits, p, tokens)
    for nudge in (-1e-4, 1e-4):  # a token on the edge may fall to either side
        near = params(
            **fields,
            top_p=min(max(top_p + nudge, 1e-4), 1.0),
            min_p=min(max(min_p + nudge, 0.0), 1.0),
            logit_bias=bias,
        )
        assume(((distribution(logits, near, tokens) > 0) == (expected > 0)).all())
    counts = draws(p, tokens, logits)
    assert counts[expected == 0].sum() == 0
    # A chance of 0.97 ** 1024 for each.
    assert (counts[expected > 0.03] > 0).all()


def test_greedy_takes_the_best_and_of_equals_the_first(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((9, VOCAB)).astype(np.float32)
    logits[4] = LOGITS
    logits[4, [3, 9]] = 5.0
    got = sample(jnp.asarray(logits), range(9), [choice(params(temperature=0.0), [1], 0)] * 9)
    np.testing.assert_array_equal(got, logits.argmax(1))
    assert got[4] == 3
    some = sample(jnp.asarray(logits), [7, 4], [choice(params(temperature=0.0), [1], 0)] * 2)
    assert some.tolist() == [got[7], 3]


def test_top_p_reached_exactly_takes_no_further_token() -> None:
    logits = np.full(VOCAB, -1e9, np.float32)
    logits[[1, 5, 6, 11]] = 0.5  # a quarter each
    assert np.flatnonzero(draws(params(top_p=0.5), TOKENS, logits)).tolist() == [1, 5]
    assert np.flatnonzero(draws(params(top_p=0.51), TOKENS, logits)).tolist() == [1, 5, 6]


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1.2e-38, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """Also where dividing the logits themselves would give several infinities."""
    assert draws(params(temperature=temperature), TOKENS, 10 * LOGITS)[LOGITS.argmax()] == DRAWS


def test_greedy_rows_stay_greedy_beside_rows_that_draw() -> None:
    logits = jnp.asarray(np.tile(LOGITS, (DRAWS, 1)))
    greedy, hot = params(temperature=0.0), params(temperature=100.0)
    choices = [choice(hot if i % 2 else greedy, TOKENS, i) for i in range(DRAWS)]
    got = sample(logits, range(DRAWS), choices)
    assert set(got[::2]) == {int(LOGITS.argmax())}
    assert set(got[1::2]) == set(range(VOCAB))


@pytest.mark.parametrize("penalty", [1e-30, 1e30])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_extreme_values_do_not_become_nan(penalty: float, temperature: float) -> None:
    logits = np.append(LOGITS[:-1], np.float32(0))
    p = params(repetition_penalty=penalty, temperature=temperature, logit_bias={5: 1e30, 6: -1e30})
    tokens = [4, 8, 12]
    counts = draws(p, tokens, logits)
    assert counts[distribution(logits, p, tokens) > 0].sum() == DRAWS


# Presence and frequency penalties, against counts in numpy.


def penalised(logits: np.ndarray, answers: Sequence[Sequence[int]], p: np.ndarray) -> np.ndarray:
    """float64 [rows, vocab]: the definition, with `p` [rows, 2] of presence and frequency."""
    counts = np.stack([np.bincount(a, minlength=logits.shape[1]) for a in answers])
    return logits - p[:, :1] * (counts > 0) - p[:, 1:] * counts


def random_rows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[Choice]]:
    """40 rows over 60 tokens; answers of the best tokens, so that penalties turn the greedy one."""
    logits = rng.standard_normal((40, 60)).astype(np.float32)
    best = np.argsort(-logits, axis=1)[:, :5]
    penalties = rng.uniform(-2, 2, (40, 2)).round(2)
    penalties[::5, 0] = penalties[1::5, 1] = 0  # one of them alone
    penalties[3] = 0  # and none
    prompts = [rng.integers(0, 60, 1 + i % 4).tolist() for i in range(40)]
    answers = [rng.choice(best[i], i % 12).tolist() for i in range(40)]
    choices = [
        Choice(
            params(temperature=0.0, presence_penalty=presence, frequency_penalty=frequency),
            prompt + answer,
            0,
            num_prompt=len(prompt),
        )
        for prompt, answer, (presence, frequency) in zip(
            prompts, answers, penalties.tolist(), strict=True
        )
    ]
    return logits, penalised(logits, answers, penalties), choices


def test_penalties_are_the_counts_of_the_answer_times_themselves(rng: np.random.Generator) -> None:
    logits, want, choices = random_rows(rng)
    ordered = np.sort(want, axis=1)
    assert (ordered[:, -1] - ordered[:, -2]).min() > 1e-5  # no tie that rounding could turn
    got = sample(jnp.asarray(logits), range(40), choices)
    np.testing.assert_array_equal(got, want.argmax(1))
    assert (got != logits.argmax(1)).sum() > 15


def test_the_prompt_is_not_penalised() -> None:
    p = params(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    rows = jnp.asarray(LOGITS[None])
    for tokens, want in (([7, 7, 7], 7), ([7, 7, 7, 2], 7), ([2, 2, 2, 7], 2), ([7, 2, 1, 7], 2)):
        assert sample(rows, [0], [Choice(p, tokens, 0, num_prompt=3)]).tolist() == [want]


@pytest.mark.parametrize("size", [1, 7, 40])
def test_rows_may_be_permuted_batched_and_begun_again(
    rng: np.random.Generator, size: int
) -> None:
    """A row's token is that of the row alone, at any place, in any company, at any time.

    A request that lost its place and comes back brings its tokens and nothing else: the penalties
    come out the same although the sampler has seen others in between.
    """
    logits, _, choices = random_rows(rng)
    alone = [picked(logits[i : i + 1], [0], [choices[i]])[0] for i in range(40)]
    order = rng.permutation(40)
    for start in range(0, 40, size):
        chosen = order[start : start + size]
        got = picked(logits[chosen], range(len(chosen)), [choices[i] for i in chosen])
        assert [got[row] for row in range(len(chosen))] == [alone[i] for i in chosen]


# Whose random numbers.


def picked(batch: np.ndarray, rows: Sequence[int], choices: Sequence[Choice]) -> dict[int, int]:
    """What each of the rows got."""
    return dict(zip(rows, sample(jnp.asarray(batch), rows, choices).tolist(), strict=True))


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_r090_a_draw_does_not_depend_on_row_neighbours_or_batch(
    rng: np.random.Generator, num_rows: int
) -> None:
    """Neighbours with penalties, biases, other seeds, or nobody at all (NaN) in their rows."""
    logits = rng.standard_normal((40, 500)).astype(np.float32)
    p = params(temperature=1.5, top_k=300, top_p=0.97, min_p=0.001)
    mine = [choice(p, [1] * (3 + i), 77 + i) for i in range(40)]
    wide = rng.standard_normal((40, 500)).astype(np.float32)
    alone = [picked(logits[i : i + 1], [0], [mine[i]])[0] for i in range(40)]
    # With temperature 1.5 over 500 tokens, other random numbers would give other tokens.
    assert len(set(alone)) > 25
    other = params(
        temperature=0.7, repetition_penalty=3.0, presence_penalty=2.0, logit_bias={3: 9.0}
    )
    for i in range(40):
        row = i % num_rows
        batch = wide[:num_rows].copy()
        batch[row] = logits[i]
        said = [2, 3, 3, 4, 4]
        neighbours = {r: choice(other, said, 1000 + i + r) for r in range(num_rows) if r != row}
        neighbours.pop((row + 1) % num_rows, None)  # a padding row
        batch[[r for r in range(num_rows) if r != row and r not in neighbours]] = np.nan
        rows = [*neighbours, row]
        assert picked(batch, rows, [*neighbours.values(), mine[i]])[row] == alone[i]


def sequence_of(seeds: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """1024 draws among 13 equal tokens."""
    choices = [
        choice(params(), [0] * length, seed) for seed, length in zip(seeds, lengths, strict=True)
    ]
    return sample(jnp.zeros((DRAWS, VOCAB), jnp.float32), range(DRAWS), choices)


HERE = [5] * DRAWS
SEEDS = range(DRAWS)


@pytest.mark.parametrize(
    ("seeds", "lengths"),
    [
        (SEEDS, HERE),
        ([s + 1 for s in SEEDS], HERE),
        ([s + 2**32 for s in SEEDS], HERE),  # only the high word differs
        ([s << 32 for s in SEEDS], HERE),
        ([2**64 - 1 - s for s in SEEDS], HERE),
        (SEEDS, [6] * DRAWS),
        ([9] * DRAWS, range(1, DRAWS + 1)),
        ([10] * DRAWS, range(1, DRAWS + 1)),
        ([9 + 2**63] * DRAWS, range(1, DRAWS + 1)),
    ],
)
def test_seed_and_position_each_give_fresh_numbers(
    seeds: Sequence[int], lengths: Sequence[int]
) -> None:
    """Each series is uniform, and independent of the first and of itself one later."""
    series, first = sequence_of(seeds, lengths), sequence_of(SEEDS, HERE)
    uniform = np.full(VOCAB, 1 / VOCAB)
    check_frequencies(np.bincount(series, minlength=VOCAB), uniform)
    if (list(seeds), list(lengths)) != (list(SEEDS), HERE):
        check_frequencies(np.bincount((series - first) % VOCAB, minlength=VOCAB), uniform)
    steps = (series[1:] - series[:-1]) % VOCAB
    check_frequencies(np.bincount(steps, minlength=VOCAB), uniform)
    np.testing.assert_array_equal(series, sequence_of(seeds, lengths))


# Log probabilities.


def test_logprobs_are_the_log_softmax_of_the_raw_logits(rng: np.random.Generator) -> None:
    logits = (3 * rng.standard_normal((5, VOCAB))).astype(np.float32)
    wide = logits.astype(np.float64)
    want = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    rows, chosen, counts = [3, 0, 4, 1], [2, 7, 0, 12], [2, None, 0, 20]
    got = logprobs(jnp.asarray(logits), rows, chosen, counts)
    assert got[1] is None
    for row, token, count, entry in zip(rows, chosen, counts, got, strict=True):
        if count is None or entry is None:
            assert entry is None
            continue
        best = np.argsort(-want[row])[:count].tolist()
        assert set(entry) == {token, *best}
        assert [i for i in entry if i in best and i != token] == [i for i in best if i != token]
        for i, value in entry.items():
            np.testing.assert_allclose(value, want[row, i], atol=2e-6)
    assert logprobs(jnp.asarray(logits), rows, chosen, [None] * 4) == [None] * 4


def test_no_rows_no_tokens() -> None:
    assert sample(jnp.zeros((2, VOCAB)), [], []).shape == (0,)
    assert logprobs(jnp.zeros((2, VOCAB)), [], [], []) == []
