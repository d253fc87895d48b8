"""Softmax attention for training: whole sequences in one call, no pages, no loop.

A training step starts every sequence and keeps no cache, so each segment is one tile of a static
window and attention inside it is dense: scores of all pairs at once, which differentiates and
keeps a GPU busy. The window is what the page table could hold. Calls this form can't serve give
NaN rather than a wrong number: a sequence with a context, or one longer than its window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dense_attention
from pallas_kernels.tiles import put_rows, take_rows, tile_a_segment


def attend_segments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    page_size: int,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Causal attention inside each packed segment.

    Args:
        q: [T, N, H].
        k: [T, Kh, H]; query head n reads key head n * Kh // N.
        v: [T, Kh, H].
        page_size: tokens a page.
        page_table: int32 [P, W]; a first entry of 0 marks a padding segment. W * page_size is
            the window.
        context_lengths: int32 [P], 0.
        cu_seqlens: int32 [P + 1].
        scale: factor of the scores.

    Returns:
        [T, N, H]: zero for rows that do not exist, NaN for segments that have a context or
        exceed the window.

    Raises:
        ValueError: rows are decode rows (no cu_seqlens).
    """
    if cu_seqlens is None:
        raise ValueError("a training step has no decode rows")
    window = page_table.shape[1] * page_size
    tiles = tile_a_segment(cu_seqlens, q.shape[0], window)
    o = dense_attention(take_rows(q, tiles), take_rows(k, tiles), take_rows(v, tiles), scale)
    length = cu_seqlens[1:] - cu_seqlens[:-1]
    fits = (context_lengths == 0) & (length <= window)
    o = put_rows(o, tiles)
    sequence = tiles.row_segment
    o = jnp.where(fits[sequence][:, None, None], o, jnp.nan)
    exists = (jnp.arange(q.shape[0]) < cu_seqlens[-1]) & (page_table[sequence, 0] != 0)
    return jnp.where(exists[:, None, None], o, 0)
