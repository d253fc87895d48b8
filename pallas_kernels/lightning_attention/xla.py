"""Lightning attention as matrix work through XLA: any platform, any shape.

Prefill cuts each segment into chunks. Inside a chunk the recurrence is a masked, decayed product
like attention; between chunks only the state travels. With b_i = (i + 1) g inside a chunk:

    o_i = scale * ( sum_{j<=i} exp(b_i - b_j) (q_i . k_j) v_j  +  exp(b_i) S_prev^T q_i )
    S_next = exp(n g) S_prev + sum_j exp((n - 1 - j) g) k_j v_j^T       n valid rows

Every exponent is <= 0, so nothing overflows however fast a head forgets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum
from pallas_kernels.tiles import Tiles, fold_used, num_places, put_rows, take_rows, tile_segments


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
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_prefill`."""
    tiles = tile_segments(cu_seqlens, q.shape[0], chunk_size)
    num_segments = slots.shape[0]
    old = state[slots]
    entering = jnp.where(is_fresh[:, None, None, None], 0, old.astype(jnp.float32))

    def some_chunks(first: jax.Array, here: Tiles, carry: tuple[jax.Array, jax.Array, jax.Array]):
        current, leaving, o = carry
        q_tile, k_tile, v_tile = (take_rows(x, here) for x in (q, k, v))
        added, decay = of_chunks(k_tile, v_tile, log_decay, here)
        current, (before, after) = _one_by_one(current, added, decay, entering, here)
        o_tile = output(q_tile, k_tile, v_tile, before, log_decay, scale).astype(v.dtype)
        # A segment's last chunk leaves its state; the others' go behind the end, which is dropped.
        number = first + jnp.arange(here.length.shape[0])
        is_last = (here.length > 0) & (number == tiles.last_tile[here.segment])
        leaving = leaving.at[jnp.where(is_last, here.segment, num_segments)].set(after, mode="drop")
        return current, leaving, jax.lax.dynamic_update_slice_in_dim(o, o_tile, first, 0)

    start = (
        jnp.zeros(state.shape[1:], jnp.float32),
        jnp.zeros((num_segments, *state.shape[1:]), jnp.float32),
        jnp.zeros((num_places(tiles), chunk_size, *v.shape[1:]), v.dtype),
    )
    _, leaving, o = fold_used(some_chunks, tiles, start)
    return put_back(o, leaving, old, state, slots, cu_seqlens, tiles)


def put_back(
    o: jax.Array,
    leaving: jax.Array,
    old: jax.Array,
    state: jax.Array,
    slots: jax.Array,
    cu_seqlens: jax.Array,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array]:
    """Tiles of output as rows, and the pool with the states that leave in their slots."""
    o = put_rows(o, tiles)
    o = jnp.where((slots != 0)[tiles.row_segment][:, None, None], o, 0)
    runs = (cu_seqlens[1:] > cu_seqlens[:-1]) & (slots != 0)
    # Segments that do not run write back the bits they found: several pads name slot 0, and
    # they all write the same.
    new = jnp.where(runs[:, None, None, None], leaving.astype(state.dtype), old)
    return o, state.at[slots].set(new, mode="promise_in_bounds")


def output(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    before: jax.Array,
    log_decay: jax.Array,
    scale: float,
) -> jax.Array:
    """The output of chunks whose states before them are known: [n, C, N, V] float32."""
    return scale * (_within_chunk(q, k, v, log_decay) + _from_before(q, before, log_decay))


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


def of_chunks(
    k: jax.Array, v: jax.Array, log_decay: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """What each chunk adds to the state [n, N, K, V] and leaves of it [n, N, 1, 1], float32."""
    left = jnp.maximum(tiles.length[:, None] - 1 - jnp.arange(k.shape[1]), 0)
    k = k * jnp.exp(left[:, :, None] * log_decay)[..., None]
    added = einsum("gjnk,gjnv->gnkv", k, v.astype(jnp.float32))
    return added, jnp.exp(tiles.length[:, None] * log_decay)[:, :, None, None]


def _one_by_one(
    current: jax.Array, added: jax.Array, decay: jax.Array, entering: jax.Array, tiles: Tiles
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The state behind the last chunk; those before and after every chunk, [n, N, K, V] float32."""

    def chunk(state, tile):
        added, decay, is_first, entering_segment = tile
        before = jnp.where(is_first, entering[entering_segment], state)
        after = decay * before + added
        return after, (before, after)

    return jax.lax.scan(chunk, current, (added, decay, tiles.is_first, tiles.segment))


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
