"""Choosing tokens: one jitted function for the rows of a step, each with its own parameters.

Order: penalties and bias, temperature, top-k, top-p, min-p, draw. Random numbers are keyed by the
request's seed and the token's position, never by step, row or neighbours. Log probabilities are
those of the model itself, before any of this. Penalties are counted anew from the tokens so far, so
they too depend on nothing else. The repetition penalty looks at prompt and answer; the presence
and frequency penalties, as in OpenAI's interface, at the answer only.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bailing_jax.sampling_params import SamplingParams


class Choice:
    """What one row asks for: resolved parameters, the tokens so far, a seed.

    The first `num_prompt` tokens are the prompt's, the others the answer's.
    """

    def __init__(
        self, params: SamplingParams, tokens: Sequence[int], seed: int, *, num_prompt: int
    ) -> None:
        self.params = params
        self.tokens = tokens
        self.seed = seed
        self.num_prompt = num_prompt

    @property
    def is_edited(self) -> bool:
        """Whether its logits are anything but the model's."""
        p = self.params
        penalties = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return bool(penalties or p.logit_bias)

    def bias(self) -> dict[int, float]:
        """What is added to the logits of single tokens."""
        bias = dict(self.params.logit_bias or {})
        presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
        if presence or frequency:
            for token, count in Counter(self.tokens[self.num_prompt :]).items():
                off = (presence or 0) + (frequency or 0) * count
                bias[token] = bias.get(token, 0.0) - off
        return bias


def sample(logits: jax.Array, rows: Sequence[int], choices: Sequence[Choice]) -> np.ndarray:
    """Pick a token for each of the given rows of logits [B, vocab]; int32 [len(rows)]."""
    if not rows:
        return np.zeros(0, np.int32)
    edits = _edits(logits.shape, rows, choices)
    if edits is not None:
        logits = _edit(logits, *edits)
    if all(choice.params.temperature == 0 for choice in choices):
        return np.asarray(_greedy(logits))[list(rows)]
    size = logits.shape[0]
    knobs = {
        name: _column(size, rows, [getattr(c.params, name) for c in choices], dtype)
        for name, dtype in (
            ("temperature", np.float32),
            ("top_k", np.int32),
            ("top_p", np.float32),
            ("min_p", np.float32),
        )
    }
    seeds = np.zeros((size, 2), np.uint32)
    seeds[list(rows)] = [(c.seed & 0xFFFFFFFF, c.seed >> 32) for c in choices]
    positions = _column(size, rows, [len(c.tokens) for c in choices], np.int32)
    return np.asarray(_draw(logits, seeds=seeds, positions=positions, **knobs))[list(rows)]


def logprobs(
    logits: jax.Array, rows: Sequence[int], chosen: Sequence[int], counts: Sequence[int | None]
) -> list[dict[int, float] | None]:
    """For each row that asks, {token id: log probability} of the chosen token and the best."""
    wanted = [count for count in counts if count is not None]
    if not wanted:
        return [None] * len(rows)
    best_ids, best, table = (
        np.asarray(x) for x in _best(logits, min(max(*wanted, 1), logits.shape[1]))
    )
    found: list[dict[int, float] | None] = []
    for row, token, count in zip(rows, chosen, counts, strict=True):
        if count is None:
            found.append(None)
            continue
        entry = {int(token): float(table[row, token])}
        for i, value in zip(best_ids[row, :count], best[row, :count], strict=True):
            entry.setdefault(int(i), float(value))
        found.append(entry)
    return found


def _column(size: int, rows: Sequence[int], values: Sequence[object], dtype: type) -> np.ndarray:
    column = np.zeros(size, dtype)
    column[list(rows)] = values
    return column


def _edits(
    shape: tuple[int, ...], rows: Sequence[int], choices: Sequence[Choice]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Dense repetition penalty and bias [B, vocab], or None when no row asks for any."""
    if not any(choice.is_edited for choice in choices):
        return None
    penalty, bias = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    for row, choice in zip(rows, choices, strict=True):
        penalty[row, list(set(choice.tokens))] = choice.params.repetition_penalty
        for token, value in choice.bias().items():
            bias[row, token] = value
    return penalty, bias


@jax.jit
def _edit(logits: jax.Array, penalty: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.where(logits > 0, logits / penalty, logits * penalty) + bias


@jax.jit
def _greedy(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _best(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    table = jax.nn.log_softmax(logits)
    values, ids = jax.lax.top_k(table, count)
    return ids, values, table


@jax.jit
def _draw(
    logits: jax.Array,
    *,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """A token a row; rows of temperature 0 take the best."""
    return jax.vmap(_draw_row)(logits, temperature, top_k, top_p, min_p, seeds, positions)


def _draw_row(logits, temperature, top_k, top_p, min_p, seed, position):
    vocab = logits.shape[0]
    # The best becomes 0: no temperature, however small, makes an infinity of it.
    scaled = (logits - logits.max()) / jnp.where(temperature > 0, temperature, 1)
    order = jnp.argsort(-scaled, stable=True)
    ranked = scaled[order]
    ranked = jnp.where(jnp.arange(vocab) < jnp.where(top_k > 0, top_k, vocab), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    # A token stays while the tokens better than it hold less than top_p.
    before = jnp.cumsum(probability) - probability
    kept = (before < top_p) & (probability >= min_p * probability[0])
    ranked = jnp.where(kept | (jnp.arange(vocab) == 0), ranked, -jnp.inf)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), position)
    drawn = order[jax.random.categorical(key, ranked)]
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
