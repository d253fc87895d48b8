"""Latent attention for training: dense inside each segment, pages untouched."""

from __future__ import annotations

import jax

from pallas_kernels.packed_softmax import attend_segments


def latent_attention(
    q: jax.Array,
    latents: jax.Array,
    pages: jax.Array,
    *,
    value_dim: int,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.latent_attention` for the arguments and `attend_segments` for the limits."""
    tokens = latents[:, None]
    o = attend_segments(
        q,
        tokens,
        # Whole latents as values: fused kernels want keys and values of one width.
        tokens,
        page_size=pages.shape[1],
        page_table=page_table,
        context_lengths=context_lengths,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
    return o[..., :value_dim], pages
