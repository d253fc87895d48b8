"""Grouped-query softmax attention over pages.

    q, k, v = x W_qkv;   q, k normed a head, then roped on the first channels
    y = softmax( d^-0.5 q k^T + causal ) v W_dense       query head n reads key head n * k / n
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bailing_jax.batch import BatchLayout
from bailing_jax.config import ModelConfig
from bailing_jax.layers.attention import Attention
from bailing_jax.layers.declare import Scope
from bailing_jax.layers.linear import Linear
from bailing_jax.layers.norms import RMSNorm
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.layers.rope import rotate_half_split
from bailing_jax.params import present
from bailing_jax.state import TENSOR_AXES
from pallas_kernels import paged_attention


class GqaAttention(Attention):
    """x [t, d], pages [pages, size, k * 2 * h] -> y [t, d], pages."""

    kind = "gqa"
    tensor_axis = TENSOR_AXES["gqa"]

    def __init__(self, scope: Scope, config: ModelConfig, options: RuntimeOptions) -> None:
        attention, norm_eps = present(config.gqa), config.norm_eps
        self.query_key_value = Linear(scope / "query_key_value")
        if attention.use_qk_norm:
            self.query_layernorm = RMSNorm(scope / "query_layernorm", norm_eps)
            self.key_layernorm = RMSNorm(scope / "key_layernorm", norm_eps)
        self.dense = Linear(scope / "dense", options.parallel)
        self.config = attention
        self.options = options

    def __call__(
        self, x: jax.Array, pages: jax.Array, layout: BatchLayout, _log_decay: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = self.query_key_value(x).reshape(x.shape[0], -1, config.head_dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=1)
        if config.use_qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        dtype = jnp.dtype(self.options.rotated_dtype)
        q = rotate_half_split(q, layout.positions, config.rope, dtype)
        k = rotate_half_split(k, layout.positions, config.rope, dtype)

        def attend(region, pages, q, k, v):
            return paged_attention(
                q,
                k,
                v,
                pages,
                page_table=region.page_table,
                context_lengths=region.context_lengths,
                cu_seqlens=region.cu_seqlens,
                scale=config.head_dim**-0.5,
                implementation=self.options.kernels,
                exact=self.options.exact,
            )

        o, pages = layout.by_region(attend, pages, q, k, v)
        return self.dense(o.astype(x.dtype).reshape(x.shape[0], -1)), pages
