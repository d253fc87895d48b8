"""Multi-head latent attention, absorbed: attention happens in the latent space of the cache.

    c | k_rope = x W_kva;   c = norm(c);   the cache of a token is [c, rope(k_rope)]
    q_nope | q_rope = x W_q   (or through a low rank with a norm between)
    score = scale * ( (q_nope W_UK) . c  +  rope(q_rope) . k_rope )
    y = ( softmax(score) c W_UV ) W_dense

W_UK and W_UV are the key and the value half of kv_b_proj. Mathematically this equals attention
with materialised keys and values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.batch import BatchLayout
from bailing_jax.config import ModelConfig
from bailing_jax.layers.attention import Attention
from bailing_jax.layers.declare import Scope
from bailing_jax.layers.linear import Linear
from bailing_jax.layers.norms import RMSNorm
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.layers.rope import mla_score_factor, rotate_interleaved
from bailing_jax.params import present
from bailing_jax.state import TENSOR_AXES
from pallas_kernels import latent_attention
from pallas_kernels.compat import einsum

# The published code builds the two inner norms without passing the model's epsilon.
_INNER_EPS = 1e-6


class UpProjection(nnx.Module):
    """kv_b_proj in its two halves: key_weight [n, h, r] and value_weight [n, r, j]."""

    def __init__(self, scope: Scope) -> None:
        self.key_weight = scope.param("key_weight")
        self.value_weight = scope.param("value_weight")


class MlaAttention(Attention):
    """x [t, d], pages [pages, size, L] -> y [t, d], pages; L is r + p, or more: zeros."""

    kind = "mla"
    tensor_axis = TENSOR_AXES["mla"]

    def __init__(self, scope: Scope, config: ModelConfig, options: RuntimeOptions) -> None:
        attention = present(config.mla)
        if attention.q_lora_rank is None:
            self.q_proj = Linear(scope / "q_proj")
        else:
            self.q_a_proj = Linear(scope / "q_a_proj")
            self.q_a_layernorm = RMSNorm(scope / "q_a_layernorm", _INNER_EPS)
            self.q_b_proj = Linear(scope / "q_b_proj")
        self.kv_a_proj_with_mqa = Linear(scope / "kv_a_proj_with_mqa")
        self.kv_a_layernorm = RMSNorm(scope / "kv_a_layernorm", _INNER_EPS)
        self.kv_b_proj = UpProjection(scope / "kv_b_proj")
        self.dense = Linear(scope / "dense", options.parallel)
        self.config = attention
        self.options = options

    def __call__(
        self, x: jax.Array, pages: jax.Array, layout: BatchLayout, _log_decay: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        config = self.config
        num_zeros = pages.shape[-1] - config.kv_lora_rank - config.rope_dim
        q = self._queries(x, layout.positions, num_zeros)
        latents = self._latents(x, layout.positions, num_zeros)
        scale = (config.nope_dim + config.rope_dim) ** -0.5 * mla_score_factor(config.rope)

        def attend(region, pages, q, latents):
            return latent_attention(
                q,
                latents,
                pages,
                value_dim=config.kv_lora_rank,
                page_table=region.page_table,
                context_lengths=region.context_lengths,
                cu_seqlens=region.cu_seqlens,
                scale=scale,
                implementation=self.options.kernels,
                exact=self.options.exact,
            )

        o, pages = layout.by_region(attend, pages, q, latents)
        o = o.astype(x.dtype)
        o = einsum("tnr,nrj->tnj", o, self.kv_b_proj.value_weight[...]).astype(x.dtype)
        return self.dense(o.reshape(x.shape[0], -1)), pages

    def _queries(self, x: jax.Array, positions: jax.Array, num_zeros: int) -> jax.Array:
        """Queries in latent space, then their roped channels: [t, n, L]."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(x.shape[0], config.num_heads, -1)
        q_nope, q_rope = q[..., : config.nope_dim], q[..., config.nope_dim :]
        dtype = jnp.dtype(self.options.rotated_dtype)
        q_rope = rotate_interleaved(q_rope, positions, config.rope, dtype)
        q_latent = einsum("tnh,nhr->tnr", q_nope, self.kv_b_proj.key_weight[...])
        zeros = jnp.zeros((*q_rope.shape[:-1], num_zeros), x.dtype)
        return jnp.concatenate([q_latent.astype(x.dtype), q_rope.astype(x.dtype), zeros], axis=-1)

    def _latents(self, x: jax.Array, positions: jax.Array, num_zeros: int) -> jax.Array:
        """What the cache keeps of a token: [t, L]."""
        rank = self.config.kv_lora_rank
        projected = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(projected[:, :rank])
        dtype = jnp.dtype(self.options.rotated_dtype)
        key = rotate_interleaved(projected[:, None, rank:], positions, self.config.rope, dtype)
        zeros = jnp.zeros((x.shape[0], num_zeros), x.dtype)
        return jnp.concatenate([latent, key[:, 0].astype(x.dtype), zeros], axis=-1)
