"""Grouped-query attention over pages through XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_softmax import append, attend


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
    fixed_blocks: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`; `fixed_blocks` as in `paged_softmax.attend`."""
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    where = {
        "page_table": page_table,
        "context_lengths": context_lengths,
        "cu_seqlens": cu_seqlens,
    }
    pages = append(pages, jnp.stack([k, v], axis=2).reshape(rows, -1), **where)
    q = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)

    def split(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = tokens.reshape(*tokens.shape[:2], kv_heads, 2, head_dim)
        return tokens[:, :, :, 0], tokens[:, :, :, 1]

    o = attend(
        q,
        pages,
        split,
        **where,
        scale=scale,
        fixed_blocks=fixed_blocks,
    )
    return o.reshape(rows, heads, head_dim).astype(v.dtype), pages
