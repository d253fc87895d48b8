"""Choosing tokens: on the device, a row with its own parameters, without variants to compile.

Order: penalties and bias, temperature, top-k, top-p, min-p, draw. Random numbers are keyed by the
request's seed and the token's position, never by step, row or neighbours. Log probabilities are
those of the model itself, before any of this. Penalties are counted anew from the tokens so far, so
they too depend on nothing else. The repetition penalty looks at prompt and answer; the presence
and frequency penalties, as in OpenAI's interface, at the answer only.

`pick` is part of every step program and looks at the knobs at run time: greedy rows cost an argmax,
and candidates are cut only where some row asks for it. `refine` is a small program beside the step,
run where a row brings penalties, a bias or wants log probabilities, which the host prepares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bailing_jax.engine.candidates import candidates
from bailing_jax.sampling_params import MAX_LOGPROBS, SamplingParams

# In place of a token: the row's logits are not numbers to choose from. Not -1, which pads stop ids.
NOT_FINITE = -2


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

    def bias(self) -> dict[int, float]:
        """What is added to the logits of single tokens."""
        bias = dict(self.params.logit_bias or {})
        presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
        if presence or frequency:
            for token, count in Counter(self.tokens[self.num_prompt :]).items():
                off = (presence or 0) + (frequency or 0) * count
                bias[token] = bias.get(token, 0.0) - off
        return bias


def is_edited(params: SamplingParams) -> bool:
    """Whether logits are anything but the model's before they are drawn from."""
    penalties = (
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )
    return bool(penalties or params.logit_bias)


def needs_host(params: SamplingParams) -> bool:
    """Whether the host has something to do for every token: `refine` runs for this request."""
    return params.logprobs is not None or is_edited(params)


class Knobs(NamedTuple):
    """The parameters of B rows, as arrays.

    Attributes:
        temperature: float32 [B], 0 for greedy rows and rows nobody wants.
        top_k: int32 [B], 0 or less for all.
        top_p: float32 [B].
        min_p: float32 [B].
        seeds: uint32 [B, 2], high and low word.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seeds: np.ndarray


def knobs(size: int, rows: Sequence[int], choices: Sequence[tuple[SamplingParams, int]]) -> Knobs:
    """The parameters and seeds of the given rows; the other rows of `size` are greedy."""
    out = Knobs(
        np.zeros(size, np.float32),
        np.zeros(size, np.int32),
        np.ones(size, np.float32),
        np.zeros(size, np.float32),
        np.zeros((size, 2), np.uint32),
    )
    for row, (params, seed) in zip(rows, choices, strict=True):
        if params.temperature:
            out.temperature[row] = params.temperature
            out.top_k[row] = params.top_k
            out.top_p[row] = params.top_p
            out.min_p[row] = params.min_p
            out.seeds[row] = seed >> 32, seed & 0xFFFFFFFF
    return out


def pick(logits: jax.Array, knobs: Knobs, positions: jax.Array) -> jax.Array:
    """A token int32 [B] of logits [B, vocab] for each row's position; part of a program.

    NOT_FINITE for a row that holds NaN or +infinity, or nothing but -infinity; a single -infinity
    only rules its token out.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = jnp.asarray(knobs.temperature) > 0
    tokens = jax.lax.cond(
        draws.any(),
        lambda: jnp.where(draws, _draw(logits, knobs, positions), best),
        lambda: best,
    )
    # argmax takes a NaN for the largest, so the best logit tells of every one in its row.
    largest = jnp.take_along_axis(logits, best[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(largest), tokens, NOT_FINITE)


class Edits(NamedTuple):
    """What the host says about the logits of B rows.

    Attributes:
        is_edited: bool [B]; other rows keep the token they have.
        penalty: float32 [B, vocab], divides positive and multiplies negative logits.
        bias: float32 [B, vocab], added.
    """

    is_edited: np.ndarray
    penalty: np.ndarray
    bias: np.ndarray


def edits(shape: tuple[int, ...], rows: Sequence[int], choices: Sequence[Choice]) -> Edits:
    """The edits of the given rows of logits of this shape; the others have none."""
    found = Edits(np.zeros(shape[0], bool), np.ones(shape, np.float32), np.zeros(shape, np.float32))
    for row, choice in zip(rows, choices, strict=True):
        if is_edited(choice.params):
            found.is_edited[row] = True
            found.penalty[row, list(set(choice.tokens))] = choice.params.repetition_penalty
            for token, value in choice.bias().items():
                found.bias[row, token] = value
    return found


class Refined(NamedTuple):
    """Tokens int32 [B], their log probabilities [B], and the best ids and values [B, 20]."""

    tokens: jax.Array
    chosen: jax.Array
    best_ids: jax.Array
    best: jax.Array


def refine(
    logits: jax.Array, tokens: jax.Array, edits: Edits, knobs: Knobs, positions: jax.Array
) -> Refined:
    """New tokens for the edited rows, and everybody's log probabilities; a program.

    Only edited rows take a token from here, and never from the step: whose token comes from which
    program depends on the request alone.
    """
    edited = jnp.where(logits > 0, logits / edits.penalty, logits * edits.penalty) + edits.bias
    tokens = jnp.where(edits.is_edited, pick(edited, knobs, positions), tokens)
    table = jax.nn.log_softmax(logits)
    values, ids = jax.lax.top_k(table, min(MAX_LOGPROBS, logits.shape[1]))
    chosen = jnp.take_along_axis(table, jnp.maximum(tokens, 0)[:, None], axis=1)[:, 0]
    return Refined(tokens, chosen, ids, values)


def logprobs(
    refined: Refined, rows: Sequence[int], counts: Sequence[int | None]
) -> list[dict[int, float] | None]:
    """For each row that asks, {token id: log probability} of the chosen token and the best."""
    tokens, chosen, best_ids, best = (np.asarray(x) for x in refined)
    found: list[dict[int, float] | None] = []
    for row, count in zip(rows, counts, strict=True):
        if count is None:
            found.append(None)
            continue
        entry = {int(tokens[row]): float(chosen[row])}
        for i, value in zip(best_ids[row, :count], best[row, :count], strict=True):
            entry.setdefault(int(i), float(value))
        found.append(entry)
    return found


def _draw(logits: jax.Array, knobs: Knobs, positions: jax.Array) -> jax.Array:
    """A token a row; rows of temperature 0 give something nobody reads."""
    temperature, top_k, top_p, min_p, seeds = (jnp.asarray(x) for x in knobs)
    # The best becomes 0: no temperature, however small, makes an infinity of it.
    heat = jnp.where(temperature > 0, temperature, 1)[:, None]
    scaled = (logits - logits.max(axis=1, keepdims=True)) / heat
    # The noise belongs to token ids, not ranks, so that a row that cuts nothing draws the same
    # token whether or not a neighbour cuts.
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(seeds, positions, logits.shape[1])
    cuts = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    kept = jax.lax.cond(
        cuts.any(),
        lambda: candidates(scaled, top_k, top_p, min_p) | ~cuts[:, None],
        lambda: jnp.ones(scaled.shape, bool),
    )
    return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _noise(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise [vocab] of one request at one position; the seed is the generator's key."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)
