"""One decoder layer: h = x + attention(norm(x)),  y = h + mlp(norm(h))."""

from __future__ import annotations

import jax
from flax import nnx

from bailing_jax import plugins
from bailing_jax.batch import BatchLayout
from bailing_jax.config import ModelConfig
from bailing_jax.layer_plan import LayerSpec
from bailing_jax.layers.attention import Attention
from bailing_jax.layers.declare import Scope
from bailing_jax.layers.gqa_attention import GqaAttention
from bailing_jax.layers.lightning_attention import LightningAttention
from bailing_jax.layers.mla_attention import MlaAttention
from bailing_jax.layers.mlp import SwiGLU
from bailing_jax.layers.moe import MoE
from bailing_jax.layers.norms import RMSNorm
from bailing_jax.layers.options import RuntimeOptions

_BUILT_IN = {layer.kind: layer for layer in (LightningAttention, GqaAttention, MlaAttention)}


class DecoderLayer(nnx.Module):
    """x [t, d] and the layer's state -> y [t, d] and the state.

    Holds no layer index: layers of one kind are equal but for their arrays, and share a trace.
    """

    def __init__(
        self, scope: Scope, spec: LayerSpec, config: ModelConfig, options: RuntimeOptions
    ) -> None:
        self.input_layernorm = RMSNorm(scope / "input_layernorm", config.norm_eps)
        self.attention = _attention(scope / "attention", spec, config, options)
        self.post_attention_layernorm = RMSNorm(
            scope / "post_attention_layernorm", config.norm_eps
        )
        mlp = scope / "mlp"
        self.mlp = (
            SwiGLU(mlp, options.parallel)
            if spec.mlp == "dense"
            else MoE(mlp, config.moe, options)
        )

    def __call__(
        self, x: jax.Array, state: jax.Array, layout: BatchLayout, log_decay: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        h, state = self.attend(x, state, layout, log_decay)
        return h + self.mlp(self.post_attention_layernorm(h), layout.exists()), state

    def attend(
        self, x: jax.Array, state: jax.Array, layout: BatchLayout, log_decay: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The first half: x + attention(norm(x))."""
        y, state = self.attention(self.input_layernorm(x), state, layout, log_decay)
        return x + y, state


def _attention(
    scope: Scope, spec: LayerSpec, config: ModelConfig, options: RuntimeOptions
) -> Attention:
    layer = plugins.layer(spec.attention) or _BUILT_IN[spec.attention]
    return layer(scope, config, options)
