"""The expert mixture for training: every expert computes every row, chosen or not.

The loop over blocks of `xla` does not differentiate. For the few small experts of a model that
is trained here, dense products cost little more than they save in sorting; the weights of experts
that were not chosen are zero and fold into the hidden layer, so that one product sums them all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum


def expert_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    exists: jax.Array,
) -> jax.Array:
    """See `api.expert_mlp`; float32; memory grows with experts times rows."""
    x = jnp.where(exists[:, None], x, 0)
    chosen = jax.nn.one_hot(expert_ids, gate.shape[0], dtype=jnp.float32)
    share = einsum("txe,tx->te", chosen, jnp.where(exists[:, None], weights, 0))
    hidden = jax.nn.silu(einsum("td,edf->tef", x, gate)) * einsum("td,edf->tef", x, up)
    hidden = (hidden * share[:, :, None]).astype(x.dtype)
    return einsum("tef,efd->td", hidden, down)
