"""Latent attention over pages through XLA: one key head, whose first channels are the value."""

from __future__ import annotations

import jax

from pallas_kernels.paged_softmax import append, attend


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
    fixed_blocks: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.latent_attention`; `fixed_blocks` as in `paged_softmax.attend`."""
    where = {
        "page_table": page_table,
        "context_lengths": context_lengths,
        "cu_seqlens": cu_seqlens,
    }
    pages = append(pages, latents, **where)

    def split(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = tokens[:, :, None]
        return tokens, tokens[..., :value_dim]

    o = attend(q[:, None], pages, split, **where, scale=scale, fixed_blocks=fixed_blocks)
    return o[:, 0].astype(q.dtype), pages
