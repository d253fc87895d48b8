"""The dense feed-forward layer: down( silu(gate x) * up x ), no biases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.layers.declare import Scope
from bailing_jax.layers.linear import Linear
from bailing_jax.layers.parallel import ONE, Parallel


class SwiGLU(nnx.Module):
    """x [t, d] -> [t, d]; also the shared experts of a mixture, which sum by themselves.

    Every row is computed: skipping those that do not exist would cost more than it saves.
    """

    def __init__(self, scope: Scope, summed_by: Parallel = ONE) -> None:
        self.gate_proj = Linear(scope / "gate_proj")
        self.up_proj = Linear(scope / "up_proj")
        self.down_proj = Linear(scope / "down_proj", summed_by)

    def __call__(
        self, x: jax.Array, _exists: jax.Array, dtype: jnp.dtype | None = None
    ) -> jax.Array:
        gate = jax.nn.silu(self.gate_proj(x).astype(jnp.float32)).astype(x.dtype)
        return self.down_proj(gate * self.up_proj(x), dtype)
