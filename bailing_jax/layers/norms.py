"""RMSNorm, and the grouped norm of lightning attention.

    y = w * round( x32 / sqrt(mean(x32^2) + eps) )

Statistics are float32; the normalised value is rounded to the input dtype before the weight
multiplies, as the publishers do. The grouped norm takes the mean over each of `groups`
contiguous parts of the last axis (the config's `group_norm_size` counts groups). Where a group
lies on several devices, `groups` counts the parts here and the mean is over all of a group's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.layers.declare import Scope
from bailing_jax.layers.parallel import ONE, Parallel


class RMSNorm(nnx.Module):
    """x [..., width] -> same shape and dtype."""

    def __init__(
        self, scope: Scope, eps: float, groups: int = 1, shared_by: Parallel = ONE
    ) -> None:
        self.weight = scope.param("weight")
        self.eps = eps
        self.groups = groups
        self.shared_by = shared_by

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        mean = self.shared_by.mean_over_groups(mean)
        y = (wide * jax.lax.rsqrt(mean + self.eps)).reshape(x.shape)
        return self.weight[...] * y.astype(x.dtype)
