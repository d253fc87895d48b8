"""What an attention layer declares: parameters, what it remembers, how it is made and called.

    layer = Layer(scope, config, options)
    y, state = layer(x, state, layout, log_decay)

A layer from outside (`bailing_jax.plugins`) keeps to the same interface and may inherit any of it.
"""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import nnx

from bailing_jax.config import ModelConfig
from bailing_jax.params import Param, built_in_parameters
from bailing_jax.state import StateSpec, built_in_leaf


class Attention(nnx.Module):
    """x [t, d], its state and the step -> y [t, d], state."""

    # The attention kind of the layer plan.
    kind: ClassVar[str]
    # The axis of its state along which `tensor` devices divide it, None for none. Whoever has it
    # sums over those devices what each adds to y.
    tensor_axis: ClassVar[int | None]

    @classmethod
    def parameters(cls, config: ModelConfig, path: str) -> tuple[Param, ...]:
        """Every parameter below `path`, with the checkpoint tensors it is made of."""
        return built_in_parameters(cls.kind, config, path)

    @classmethod
    def state_spec(cls, config: ModelConfig, spec: StateSpec) -> jax.ShapeDtypeStruct:
        """Shape and dtype of its leaf of the DecodeState: slots or pages first."""
        return built_in_leaf(cls.kind, config, spec)
