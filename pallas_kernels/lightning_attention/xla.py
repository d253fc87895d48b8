"""Lightning attention as matrix work through XLA: any platform, any shape.

Prefill cuts each segment into chunks. Inside a chunk the recurrence is a masked, decayed product
like attention; between chunks only the state travels. With b_i = (i + 1) g inside a chunk:

    o_i = scale * ( sum_{j<=i} exp(b_i - b_j) (q_i . k_j) v_j  +  exp(b_i) S_prev^T q_i )
    S_next = exp(n g) S_prev + sum_j exp((n - 1 - j) g) k_j v_j^T       n valid rows

Every exponent is <= 0, so nothing overflows however fast a head forgets.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum
from pallas_kernels.tiles import Tiles, put_rows, take_rows, tile_segments

# (added, decay, entering, tiles) -> the state before and after every chunk.
JoinChunks = Callable[[jax.Array, jax.Array, jax.Array, Tiles], tuple[jax.Array, jax.Array]]


def lightning_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    cu_seqlens: jax.Array,
    is_fresh: jax.Array,
    scale: float,
    chunk_size: int,
    join: JoinChunks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_prefill`; `join` carries the state from chunk to chunk."""
    tiles = tile_segments(cu_seqlens, q.shape[0], chunk_size)
    q_tile, k_tile, v_tile = (take_rows(x, tiles) for x in (q, k, v))
    old = state[slots]
    entering = jnp.where(is_fresh[:, None, None, None], 0, old.astype(jnp.float32))
    added, decay = _of_chunks(k_tile, v_tile, log_decay, tiles)
    before, after = (join or _one_by_one)(added, decay, entering, tiles)
    o = scale * (
        _within_chunk(q_tile, k_tile, v_tile, log_decay) + _from_before(q_tile, before, log_decay)
    )
    o = put_rows(o.astype(v.dtype), tiles)
    o = jnp.where((slots != 0)[tiles.row_segment][:, None, None], o, 0)
    runs = (cu_seqlens[1:] > cu_seqlens[:-1]) & (slots != 0)
    leaving = after[tiles.last_tile].astype(state.dtype)
    # Segments that do not run write back the bits they found: several pads name slot 0, and
    # they all write the same.
    new = jnp.where(runs[:, None, None, None], leaving, old)
    return o, state.at[slots].set(new, mode="promise_in_bounds")


def _within_chunk(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> jax.Array:
    """What tokens of a chunk read from its own tokens: [n, C, N, V] float32."""
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])[None, :]
    decay = jnp.exp(log_decay[:, None, None] * jnp.maximum(distance, 0))
    decay = jnp.where(distance >= 0, decay, 0)
    scores = einsum("ginh,gjnh->gnij", q, k) * decay
    return einsum("gnij,gjnv->ginv", scores, v.astype(jnp.float32))


def _from_before(q: jax.Array, before: jax.Array, log_decay: jax.Array) -> jax.Array:
    """What tokens of a chunk read from the state before it: [n, C, N, V] float32."""
    age = jnp.arange(1, q.shape[1] + 1)
    decay = jnp.exp(age[:, None] * log_decay)
    return einsum("ginh,gnhv->ginv", q.astype(jnp.float32), before) * decay[:, :, None]


def _of_chunks(
    k: jax.Array, v: jax.Array, log_decay: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """What each chunk adds to the state [n, N, K, V] and leaves of it [n, N, 1, 1], float32."""
    left = jnp.maximum(tiles.length[:, None] - 1 - jnp.arange(k.shape[1]), 0)
    k = k * jnp.exp(left[:, :, None] * log_decay)[..., None]
    added = einsum("gjnk,gjnv->gnkv", k, v.astype(jnp.float32))
    return added, jnp.exp(tiles.length[:, None] * log_decay)[:, :, None, None]


def _one_by_one(
    added: jax.Array, decay: jax.Array, entering: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """The state before and after every chunk, each [n, N, K, V] float32, in one pass."""

    def chunk(state, tile):
        added, decay, is_first, entering_segment = tile
        before = jnp.where(is_first, entering[entering_segment], state)
        after = decay * before + added
        return after, (before, after)

    start = jnp.zeros(entering.shape[1:], jnp.float32)
    _, states = jax.lax.scan(chunk, start, (added, decay, tiles.is_first, tiles.segment))
    return states


def lightning_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_decode`."""
    old = state[slots]
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    before = old.astype(jnp.float32)
    # exp(g) S as S + (exp(g) - 1) S: a slow head's exp(g) would err the same way every token.
    new = before + jnp.expm1(log_decay)[:, None, None] * before
    new = new + wide[1][..., :, None] * wide[2][..., None, :]
    o = scale * einsum("bnkv,bnk->bnv", new, wide[0])
    runs = slots != 0
    # Pad rows write back what slot 0 holds, all of them the same bits.
    state = state.at[slots].set(
        jnp.where(runs[:, None, None, None], new.astype(state.dtype), old),
        mode="promise_in_bounds",
    )
    return jnp.where(runs[:, None, None], o, 0).astype(v.dtype), state
