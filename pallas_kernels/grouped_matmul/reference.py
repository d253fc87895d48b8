"""The specification of the expert mixture: every expert computes every row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum


def expert_mlp(x, gate, up, down, expert_ids, weights, exists):
    """See `api.expert_mlp`; float32."""
    hidden = jax.nn.silu(einsum("td,edf->etf", x, gate)) * einsum("td,edf->etf", x, up)
    y = einsum("etf,efd->etd", hidden.astype(x.dtype), down)
    chosen = jax.nn.one_hot(expert_ids, gate.shape[0]) * weights[..., None]
    y = einsum("etd,txe->td", y, chosen)
    return jnp.where(exists[:, None], y, 0)
