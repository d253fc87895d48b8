"""The specification of paged attention: all pages gathered, one masked float32 softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum
from pallas_kernels.paged_softmax import append


def paged_attention(q, k, v, pages, *, page_table, context_lengths, cu_seqlens, scale):
    """See `api.paged_attention`."""
    pages = append(
        pages, jnp.stack([k, v], axis=2).reshape(q.shape[0], -1),
        page_table=page_table, context_lengths=context_lengths, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    starts = jnp.arange(q.shape[0] + 1) if cu_seqlens is None else cu_seqlens
    row = jnp.arange(q.shape[0])
    sequence = jnp.minimum(jnp.searchsorted(starts[1:], row, side="right"), len(starts) - 2)
    exists = (row < starts[-1]) & (page_table[sequence, 0] != 0)
    position = context_lengths[sequence] + row - starts[sequence]
    tokens = pages[page_table[sequence]].reshape(q.shape[0], -1, k.shape[1], 2, k.shape[2])
    seen = jnp.arange(tokens.shape[1]) <= position[:, None]
    tokens = jnp.where(seen[:, :, None, None, None], tokens, 0).astype(jnp.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (jnp.repeat(tokens[:, :, :, i], group, axis=2) for i in (0, 1))
    scores = scale * einsum("tnh,tsnh->tns", q.astype(jnp.float32), keys)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    o = einsum("tns,tsnv->tnv", weights, values)
    return jnp.where(exists[:, None, None], o, 0).astype(v.dtype), pages
