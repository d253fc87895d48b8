"""Grouped-query attention for training: dense inside each segment, pages untouched."""

from __future__ import annotations

import jax

from pallas_kernels.packed_softmax import attend_segments


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    *,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention` for the arguments and `attend_segments` for the limits."""
    o = attend_segments(
        q,
        k,
        v,
        page_size=pages.shape[1],
        page_table=page_table,
        context_lengths=context_lengths,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
    return o.astype(v.dtype), pages
