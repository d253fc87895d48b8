"""Which tokens a row may still be given after top-k, top-p and min-p, without sorting them.

Tokens stand in an order: the better logit first, of equals the smaller id. Each cut keeps a prefix
of it, and where a prefix ends is found by halving: first among all float32 values, then, if several
tokens have the value at the edge, among their ids. Every round is a sum over the row. The prefixes
are a sort's, which takes five times as long on a CPU at a vocabulary of 157,184, and a TPU's
compiler two minutes (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# As an int32, the bits of the magnitude of what a token lacks to the best are in the order of that
# magnitude. Of infinity:
_WORST = 0x7F800000


def candidates(
    scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """bool [B, vocab]: the tokens each row may be given; the best is always among them.

    Args:
        scaled: float32 [B, vocab], logits over temperature less the row's best: none above 0.
            -infinity rules a token out. Rows of NaN give something nobody reads.
        top_k: int32 [B]: so many tokens; 0 or less: all.
        top_p: float32 [B] in (0, 1]: of those, as few as hold this share of their probability.
        min_p: float32 [B] in [0, 1]: of those, none less likely than this times the best.
    """
    lack = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)
    possible = scaled > -jnp.inf
    one = jnp.ones(scaled.shape, jnp.float32)
    # Counts are exact in float32: a vocabulary has less than 2 ** 24 tokens.
    kept = possible & _prefix(lack, one, top_k.astype(jnp.float32), top_k > 0)
    weight = jnp.where(kept, jnp.exp(scaled), 0)
    kept &= _prefix(lack, weight, top_p * weight.sum(axis=1), top_p < 1)
    return kept & (weight >= min_p[:, None])


def _prefix(lack: jax.Array, weight: jax.Array, target: jax.Array, cuts: jax.Array) -> jax.Array:
    """bool [B, vocab]: the shortest prefix that weighs `target` or more; all where not `cuts`.

    Rounding can't break the search: with none below 0, a sum over more tokens is never less.
    """

    def reaches(inside: jax.Array) -> jax.Array:
        return jnp.where(inside, weight, 0).sum(axis=1) >= target

    def before(edge: jax.Array, token: jax.Array) -> jax.Array:
        # Ids are counted where they are used: kept, they would be one more array of this size.
        ids = jax.lax.broadcasted_iota(jnp.int32, lack.shape, 1)
        return (lack < edge) | ((lack == edge) & (ids <= token[:, None]))

    edge = _least(lambda value: reaches(lack <= value[:, None]), _WORST, cuts)[:, None]
    ties = cuts & ((lack == edge).sum(axis=1) > 1)
    last = _least(lambda token: reaches(before(edge, token)), lack.shape[1] - 1, ties)
    return before(edge, last)


def _least(is_enough: Callable[[jax.Array], jax.Array], most: int, wanted: jax.Array) -> jax.Array:
    """int32 [B]: the least of 0 to `most` that is enough, or `most`; `most` where not `wanted`.

    Where no row wants one, nothing is searched. The number of rounds is fixed: a loop that looks
    whether it is done would have a GPU ask the host in every round.
    """
    high = jnp.full(wanted.shape, most, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = is_enough(middle)
        is_open = low < high
        return (
            jnp.where(is_open & ~enough, middle + 1, low),
            jnp.where(is_open & enough, middle, high),
        )

    def search() -> jax.Array:
        low = jnp.where(wanted, 0, high)
        return jax.lax.fori_loop(0, most.bit_length(), halve, (low, high))[1]

    return jax.lax.cond(wanted.any(), search, lambda: high)
