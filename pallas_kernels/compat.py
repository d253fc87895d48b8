"""The one place that knows about differences between jax versions, and about precision.

Supported: jax 0.10.2 and newer. Matmul precision is always set here, never inherited from a
global default: float32 operands are multiplied in float32, narrower ones in one pass with
float32 accumulation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 result and explicit precision."""
    wide = any(x.dtype == jnp.float32 for x in operands)
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    return jnp.einsum(formula, *operands, precision=precision, preferred_element_type=jnp.float32)
