"""Which layer is what, and how fast each lightning head forgets. numpy only.

The plan is data computed once: the model, the state, the converter and the planner read it and
none of them asks again. Layer indices are 0-based and count every kind of layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bailing_jax.config import ModelConfig

AttentionKind = Literal["lightning", "gqa", "mla"]
MlpKind = Literal["dense", "moe"]


@dataclass(frozen=True)
class LayerSpec:
    """The kinds of one decoder layer."""

    attention: AttentionKind
    mlp: MlpKind


def layer_plan(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """One LayerSpec a layer.

    With groups of G layers, layer l is a softmax layer iff (l + 1) % G == 0 or it lies in an
    incomplete last group (l >= (L // G) * G); without groups every layer is.
    """
    softmax: AttentionKind = "gqa" if config.gqa is not None else "mla"
    group, layers = config.layer_group_size, config.num_layers

    def attention(layer: int) -> AttentionKind:
        if group is None or (layer + 1) % group == 0 or layer >= layers // group * group:
            return softmax
        return "lightning"

    return tuple(
        LayerSpec(attention(layer), "dense" if layer < config.num_dense_layers else "moe")
        for layer in range(layers)
    )


def slopes(num_heads: int) -> np.ndarray:
    """ALiBi slopes, float64 [num_heads]; a head count that is no power of two interleaves two."""
    power = 2 ** (num_heads.bit_length() - 1)
    first = _power_of_two_slopes(power)
    return np.concatenate([first, _power_of_two_slopes(2 * power)[0::2][: num_heads - power]])


def _power_of_two_slopes(num_heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


def decay_table(config: ModelConfig) -> np.ndarray:
    """Log decay a token of every layer and head, float32 [num_layers, num_heads], all <= 0.

    g = -slope_h * (1 - (l - offset) / (L - 1) + 1e-5). The offset is `decay_layer_offset`:
    published implementations disagree about it (0: vLLM, SGLang; 1: the Hugging Face file).
    Rows of softmax layers are filled too and used by nobody. One layer has factor 1 + 1e-5.

    Raises:
        ValueError: the config has no lightning layers.
    """
    if config.lightning is None:
        raise ValueError(f"{config.architecture} has no lightning attention")
    layers = np.arange(config.num_layers, dtype=np.float64)
    if config.num_layers > 1:
        factor = 1 - (layers - config.decay_layer_offset) / (config.num_layers - 1) + 1e-5
    else:
        factor = np.full(1, 1 + 1e-5)
    return (-factor[:, None] * slopes(config.lightning.num_heads)).astype(np.float32)
