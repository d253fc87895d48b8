"""Chunked prefill for training: the chunks of `xla`, their states joined by a parallel scan.

A training step packs hundreds of segments; going through their chunks one by one would leave a
GPU idle. A chunk maps the state S to a S + b, and maps compose associatively:

    (a1, b1) then (a2, b2)  =  (a1 a2, a2 b1 + b2),  or (a1 a2, b2) where the second opens a segment

Opening is a select, not a factor of zero, so that not even NaN crosses into a segment.
Differentiated as it stands.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_attention.xla import of_chunks, output, put_back
from pallas_kernels.tiles import Tiles, take_rows, tile_segments


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
    q_tile, k_tile, v_tile = (take_rows(x, tiles) for x in (q, k, v))
    old = state[slots]
    entering = jnp.where(is_fresh[:, None, None, None], 0, old.astype(jnp.float32))
    added, decay = of_chunks(k_tile, v_tile, log_decay, tiles)
    before, after = _in_parallel(added, decay, entering, tiles)
    o = output(q_tile, k_tile, v_tile, before, log_decay, scale).astype(v.dtype)
    return put_back(o, after[tiles.last_tile], old, state, slots, cu_seqlens, tiles)


def _in_parallel(
    added: jax.Array, decay: jax.Array, entering: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """The state before and after every chunk, each [n, N, K, V] float32."""
    opens = tiles.is_first[:, None, None, None]
    entering = entering[tiles.segment]

    def then(first, second):
        opened, a, b = second
        joined = jnp.where(opened, b, a * first[2] + b)
        return first[0] | opened, first[1] * a, joined

    maps = opens, decay, added + jnp.where(opens, decay * entering, 0)
    _, _, after = jax.lax.associative_scan(then, maps)
    earlier = jnp.concatenate([jnp.zeros_like(after[:1]), after[:-1]])
    return jnp.where(opens, entering, earlier), after
