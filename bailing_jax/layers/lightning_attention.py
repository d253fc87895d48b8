"""Lightning attention: a linear recurrence with a constant decay a head.

    q, k, v = x W_qkv;   q, k normed a head, then roped
    S_t = exp(g) S_{t-1} + k_t v_t^T,   o_t = d^-0.5 S_t^T q_t
    y = ( groupnorm(o) * sigmoid(x W_g) ) W_dense

Every head has its own key and value head. The log decay g [n] comes in as an array, so that all
layers of this kind share one trace.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bailing_jax.batch import BatchLayout, Region, RunRegion
from bailing_jax.config import ModelConfig
from bailing_jax.layers.attention import Attention
from bailing_jax.layers.declare import Scope
from bailing_jax.layers.linear import Linear
from bailing_jax.layers.norms import RMSNorm
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.layers.rope import half_split_angles, rotate_half_split
from bailing_jax.params import present
from bailing_jax.state import TENSOR_AXES
from pallas_kernels import choose_fused_decode, lightning_decode, lightning_prefill


class LightningAttention(Attention):
    """x [t, d], state [slots, n, h, h] -> y [t, d], state."""

    kind = "lightning"
    tensor_axis = TENSOR_AXES["lightning"]

    def __init__(self, scope: Scope, config: ModelConfig, options: RuntimeOptions) -> None:
        attention, norm_eps = present(config.lightning), config.norm_eps
        self.query_key_value = Linear(scope / "query_key_value")
        if attention.use_qk_norm:
            self.query_layernorm = RMSNorm(scope / "query_layernorm", norm_eps)
            self.key_layernorm = RMSNorm(scope / "key_layernorm", norm_eps)
        self.g_proj = Linear(scope / "g_proj")
        self.g_norm = RMSNorm(
            scope / "g_norm", norm_eps, attention.num_norm_groups, options.parallel
        )
        self.dense = Linear(scope / "dense", options.parallel)
        self.config = attention
        self.options = options

    def __call__(
        self, x: jax.Array, state: jax.Array, layout: BatchLayout, log_decay: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        qkv = self._project(x)
        fused = self._fused_decode(qkv, state, layout, log_decay)
        if fused is None:

            def recur(region, state, q, k, v):
                return self._recur(region, state, q, k, v, log_decay)

            q, k, v = self._normed_and_roped(qkv, layout.positions)
            o, state = layout.by_region(recur, state, q, k, v)
        else:
            o, state = layout.by_region(fused, state, qkv, layout.positions)
        gate = jax.nn.sigmoid(self.g_proj(x).astype(jnp.float32)).astype(x.dtype)
        o = self.g_norm(o.astype(x.dtype).reshape(x.shape[0], -1)) * gate
        return self.dense(o), state

    def _project(self, x: jax.Array) -> jax.Array:
        """[t, 3, n, h]."""
        config = self.config
        qkv = self.query_key_value(x).reshape(-1, 3, config.num_heads, config.head_dim)
        if config.use_silu:
            qkv = jax.nn.silu(qkv.astype(jnp.float32)).astype(x.dtype)
        return qkv

    def _normed_and_roped(
        self, qkv: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        if config.use_qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        if config.rope is not None:
            dtype = jnp.dtype(self.options.rotated_dtype)
            q = rotate_half_split(q, positions, config.rope, dtype)
            k = rotate_half_split(k, positions, config.rope, dtype)
        return q, k, v

    def _fused_decode(
        self, qkv: jax.Array, state: jax.Array, layout: BatchLayout, log_decay: jax.Array
    ) -> RunRegion | None:
        """What takes (region, state, qkv, positions) in one kernel, where there is one.

        Only for steps of decode rows alone: beside a segment norms and RoPE run anyway.
        """
        config, options = self.config, self.options
        if layout.num_prefill or config.use_silu:
            return None
        rope = config.rope
        norms, eps = None, 0.0
        if config.use_qk_norm:
            norms = self.query_layernorm.weight[...], self.key_layernorm.weight[...]
            eps = self.query_layernorm.eps
        dtype = qkv.dtype if rope is None else jnp.dtype(options.rotated_dtype)
        run = choose_fused_decode(
            qkv, log_decay, state, norms=norms or (), rotated_dtype=dtype,
            num_angles=rope.num_dims // 2 if rope else 0,
            implementation=options.kernels, exact=options.exact,
        )  # fmt: skip
        if run is None:
            return None

        def decode(region, state, qkv, positions):
            return run(
                qkv, log_decay, state, slots=region.slots, scale=config.head_dim**-0.5,
                norms=norms, eps=eps, rotated_dtype=dtype,
                angles=half_split_angles(positions, rope) if rope else None,
            )  # fmt: skip

        return decode

    def _recur(
        self,
        region: Region,
        state: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        scale = self.config.head_dim**-0.5
        chosen = {"implementation": self.options.kernels, "exact": self.options.exact}
        if region.cu_seqlens is None or region.is_fresh is None:
            return lightning_decode(
                q, k, v, log_decay, state, slots=region.slots, scale=scale, **chosen
            )
        return lightning_prefill(
            q,
            k,
            v,
            log_decay,
            state,
            slots=region.slots,
            cu_seqlens=region.cu_seqlens,
            is_fresh=region.is_fresh,
            scale=scale,
            **chosen,
        )
