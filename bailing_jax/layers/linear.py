"""Linear layers: y = x W (+ b), W stored [in, out].

On several devices W is cut along `out`, and each has its columns of y; or along `in`, and y is the
sum of what they all have, made in float32 before anything is rounded. A table is cut by rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.layers.declare import Scope
from bailing_jax.layers.parallel import ONE, Parallel
from pallas_kernels.compat import einsum


class Linear(nnx.Module):
    """y = x W + b; x [t, in], y [t, out] in x's dtype, accumulated in float32.

    `summed_by` names the devices that each have a part of `in`.
    """

    def __init__(self, scope: Scope, summed_by: Parallel = ONE) -> None:
        self.weight = scope.param("weight")
        self.bias = scope.optional("bias")
        self.summed_by = summed_by

    def __call__(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        y = self.summed_by.sum_over_tensor(einsum("ti,io->to", x, self.weight[...]))
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype if dtype is None else dtype)


class Embedding(nnx.Module):
    """Rows of a table [vocab, embed]; the tied output head is its transpose."""

    def __init__(self, scope: Scope, parallel: Parallel = ONE) -> None:
        self.weight = scope.param("weight")
        self.parallel = parallel

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.weight[...]
        if self.parallel.tensor == 1:
            return table[tokens]
        here = tokens - self.parallel.tensor_index() * table.shape[0]
        is_here = (here >= 0) & (here < table.shape[0])
        rows = jnp.where(is_here[:, None], table[jnp.where(is_here, here, 0)], 0)
        return self.parallel.sum_over_tensor(rows)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits float32 [t, vocab] of x [t, embed]; on several devices, of their rows."""
        return einsum("td,vd->tv", x, self.weight[...])
