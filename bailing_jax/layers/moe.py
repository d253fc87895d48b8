"""The mixture of experts: a group-limited sigmoid router, routed experts, shared experts.

    s = sigmoid(x W)     s' = s + bias                      the bias only selects
    group score = sum of its two largest s';  keep the best groups, the rest is -inf
    ids = top-k of s';   w = s[ids] / (sum + 1e-20) * scaling factor
    y = sum_i w_i expert_i(x) + shared(x)

Everything up to the weights is float32. Equal scores go to the lower expert id.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.config import Moe
from bailing_jax.layers.declare import Scope
from bailing_jax.layers.expert_exchange import exchange
from bailing_jax.layers.mlp import SwiGLU
from bailing_jax.layers.options import RuntimeOptions
from pallas_kernels import expert_mlp
from pallas_kernels.compat import einsum
from pallas_kernels.top_k import top_k_ids


class Router(nnx.Module):
    """x [t, d] -> expert ids int32 [t, x] and weights float32 [t, x], best first."""

    def __init__(self, scope: Scope, config: Moe) -> None:
        self.weight = scope.param("weight")
        self.expert_bias = scope.param("expert_bias")
        self.config = config

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.choose(self.scores(x))

    def scores(self, x: jax.Array) -> jax.Array:
        """Each expert's affinity to each row, float32 [t, e] in (0, 1)."""
        return jax.nn.sigmoid(einsum("td,de->te", x.astype(jnp.float32), self.weight[...]))

    def choose(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Expert ids and weights of scores [t, e]."""
        config = self.config
        biased = self._keep_best_groups(scores + self.expert_bias[...])
        ids = top_k_ids(biased, config.num_experts_per_token)
        weights = jnp.take_along_axis(scores, ids, axis=1)
        if config.num_experts_per_token > 1:
            weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
        return ids, weights * config.scaling_factor

    def _keep_best_groups(self, biased: jax.Array) -> jax.Array:
        config = self.config
        if config.num_kept_groups == config.num_groups:
            return biased
        grouped = biased.reshape(biased.shape[0], config.num_groups, -1)
        best_two, _ = jax.lax.top_k(grouped, 2)
        _, kept = jax.lax.top_k(best_two.sum(-1), config.num_kept_groups)
        keep = jax.nn.one_hot(kept, config.num_groups, dtype=jnp.bool_).any(axis=1)
        return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(biased.shape)


class Experts(nnx.Module):
    """The stacked weights of all routed experts: gate and up [e, d, f], down [e, f, d]."""

    def __init__(self, scope: Scope) -> None:
        self.gate_proj = _Stacked(scope / "gate_proj")
        self.up_proj = _Stacked(scope / "up_proj")
        self.down_proj = _Stacked(scope / "down_proj")


class _Stacked(nnx.Module):
    def __init__(self, scope: Scope) -> None:
        self.weight = scope.param("weight")


class MoE(nnx.Module):
    """x [t, d] -> [t, d]; rows that do not exist give zero from the routed experts."""

    def __init__(self, scope: Scope, config: Moe, options: RuntimeOptions) -> None:
        self.gate = Router(scope / "gate", config)
        self.experts = Experts(scope / "experts")
        self.shared_experts = SwiGLU(scope / "shared_experts") if config.shared_width else None
        self.options = options

    def __call__(self, x: jax.Array, exists: jax.Array) -> jax.Array:
        return self.mix(x, exists, *self.gate(x))

    def mix(
        self, x: jax.Array, exists: jax.Array, ids: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """The experts `ids` [t, x], weighted, and the shared ones."""
        parallel, num_here = self.options.parallel, self.experts.gate_proj.weight.shape[0]
        dtype = parallel.partial_dtype(x.dtype)
        y = exchange(parallel, self._routed, num_here, x, ids, weights, exists).astype(dtype)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x, exists, dtype)
        return parallel.sum_over_tensor(y).astype(x.dtype)

    def _routed(
        self, x: jax.Array, ids: jax.Array, weights: jax.Array, exists: jax.Array
    ) -> jax.Array:
        """What the experts on this device make of rows, in float32 if others add to it."""
        experts, parallel = self.experts, self.options.parallel
        is_whole = parallel.expert == parallel.tensor == 1
        return expert_mlp(
            x,
            experts.gate_proj.weight[...],
            experts.up_proj.weight[...],
            experts.down_proj.weight[...],
            ids,
            weights,
            exists,
            implementation=self.options.kernels,
            exact=self.options.exact,
            dtype=x.dtype if is_whole else jnp.float32,
        )
