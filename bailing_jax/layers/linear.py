"""Linear layers: y = x W (+ b), W stored [in, out]."""

from __future__ import annotations

import jax
from flax import nnx

from bailing_jax.layers.declare import Scope
from pallas_kernels.compat import einsum


class Linear(nnx.Module):
    """y = x W + b; x [t, in], y [t, out] in x's dtype, accumulated in float32."""

    def __init__(self, scope: Scope) -> None:
        self.weight = scope.param("weight")
        self.bias = scope.optional("bias")

    def __call__(self, x: jax.Array) -> jax.Array:
        y = einsum("ti,io->to", x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table [vocab, embed]; the tied output head is its transpose."""

    def __init__(self, scope: Scope) -> None:
        self.weight = scope.param("weight")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.weight[...][tokens]

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits float32 [t, vocab] of x [t, embed]."""
        return einsum("td,vd->tv", x, self.weight[...])
