"""The routed experts of one layer: the public function and its checks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference, train, xla

dispatch.register(
    "expert_mlp",
    "xla",
    xla.expert_mlp,
    exact=functools.partial(xla.expert_mlp, one_path=True),
)
for _name, _module in (("reference", reference), ("train", train)):
    dispatch.register("expert_mlp", _name, _module.expert_mlp)


def expert_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    exists: jax.Array,
    *,
    implementation: str = "auto",
    exact: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """y_t = sum_i w_ti down_e(silu(gate_e x_t) * up_e x_t), e = expert_ids[t, i].

    Args:
        x: [T, d].
        gate: [e, d, f].
        up: [e, d, f].
        down: [e, f, d].
        expert_ids: int32 [T, x], distinct in a row; e names an expert that is not here, any number
            of times: such a choice costs nothing and adds nothing.
        weights: float32 [T, x].
        exists: bool [T]; other rows cost nothing and give zero, whatever they hold.
        implementation: "auto" or a registered name.
        exact: a row's bits depend on nothing but itself and the static number of rows.
        dtype: of the result, x's by default: sums of a part of the experts go on in float32.

    Returns:
        [T, d], accumulated in float32.

    Raises:
        ValueError: shapes do not fit, or no implementation can run.
    """
    rows, d = x.shape
    if not rows:
        raise ValueError("no rows: leave the call out")
    experts, _, f = gate.shape
    if gate.shape != (experts, d, f) or up.shape != gate.shape or down.shape != (experts, f, d):
        raise ValueError(f"x {x.shape}, gate {gate.shape}, up {up.shape}, down {down.shape}")
    if expert_ids.shape != weights.shape or expert_ids.shape[0] != rows or exists.shape != (rows,):
        raise ValueError(f"ids {expert_ids.shape}, weights {weights.shape}, exists {exists.shape}")
    run = dispatch.choose("expert_mlp", implementation, x, gate, up, down, exact=exact)
    y = _jit(run)(x, gate, up, down, expert_ids, weights, exists)
    return y.astype(jnp.dtype(x.dtype if dtype is None else dtype))


@functools.cache
def _jit(run):
    return jax.jit(run)
