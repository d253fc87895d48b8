"""The one place that knows about differences between jax versions and platforms.

Supported: jax 0.10.2 and newer. Matmul precision is always set here, never inherited from a
global default: float32 operands are multiplied in float32, narrower ones in one pass with
float32 accumulation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 result and explicit precision."""
    contract = functools.partial(jnp.einsum, formula, preferred_element_type=jnp.float32)
    highest = functools.partial(contract, precision=jax.lax.Precision.HIGHEST)
    if any(x.dtype == jnp.float32 for x in operands):
        return highest(*operands)

    def widened(*narrow: jax.Array) -> jax.Array:
        return highest(*(x.astype(jnp.float32) for x in narrow))

    # XLA's CPU matmul has no narrow operands with a float32 result. Chosen at lowering, so that
    # a program compiled on a CPU host for another machine is that machine's.
    return jax.lax.platform_dependent(
        *operands,
        cpu=widened,
        default=functools.partial(contract, precision=jax.lax.Precision.DEFAULT),
    )
