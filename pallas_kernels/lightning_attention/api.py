"""Lightning attention over slots of recurrent state: the public functions and their checks.

Slot 0 is NULL: rows and segments that name it are padding, give zero and change nothing. Slots
in one call are distinct (except NULL); slots not named come back bit for bit. A fresh segment
never sees what its slot held. Formula: DESIGN of the Bailing family, simple GLA with a constant
decay a head (see `reference.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention import gpu, reference, train, xla

CHUNK_SIZE = 64
# Of a row of a TPU's memory.
LANES = 128

# Chunks count from a segment's own first row and states are folded one by one, so the usual form
# is the exact one.
for _name, _module, _exact in (("xla", xla, True), ("reference", reference, False)):
    for _operator in ("lightning_prefill", "lightning_decode"):
        _run = getattr(_module, _operator)
        dispatch.register(_operator, _name, _run, exact=_run if _exact else None)
dispatch.register("lightning_prefill", "train", train.lightning_prefill)


def _from(module: str, function: str) -> Callable:
    return dispatch.lazily(f"{__package__}.{module}", function)


dispatch.register(
    "lightning_prefill", "gpu", _from("gpu_grad", "lightning_prefill"), gpu.prefill_supports
)
# `fused` stands in for this one.
DECODE_ON_GPU = _from("gpu_decode", "lightning_decode")
dispatch.register("lightning_decode", "gpu", DECODE_ON_GPU, gpu.decode_supports)
dispatch.register(
    "lightning_prefill", "tpu",
    _from("tpu_prefill", "lightning_prefill"), _from("tpu_prefill", "supports"),
    exact=_from("tpu_prefill", "in_chunks"),
)  # fmt: skip
_decode_on_tpu = _from("tpu_decode", "lightning_decode")
dispatch.register(
    "lightning_decode", "tpu", _decode_on_tpu, _from("tpu_decode", "supports"),
    exact=_decode_on_tpu,
)  # fmt: skip


def lightning_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    cu_seqlens: jax.Array,
    is_fresh: jax.Array,
    scale: float,
    chunk_size: int = CHUNK_SIZE,
    implementation: str = "auto",
    exact: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Fold packed segments into their slots.

    Args:
        q: [T, N, K], as k; float32 or bfloat16.
        k: [T, N, K].
        v: [T, N, V].
        log_decay: float32 [N], <= 0, per token.
        state: [S, N, K, V] float32 or bfloat16; donate it. It may have zeros behind its V columns,
            up to a multiple of 128 (whole lanes of a TPU), which stay.
        slots: int32 [P], the slot of each segment, 0 for pads.
        cu_seqlens: int32 [P + 1], not decreasing, starting at 0; segment p holds rows
            cu_seqlens[p] to cu_seqlens[p + 1]. Rows beyond the last are padding.
        is_fresh: bool [P], whether a segment starts from zero instead of its slot.
        scale: the factor of the output, head_dim ** -0.5.
        chunk_size: tokens a chunk of the matrix form; unless `exact`, an implementation may have
            its own.
        implementation: "auto" or a registered name.
        exact: a segment's bits depend on nothing but itself and the static sizes.

    Returns:
        o [T, N, V] in v's dtype, and the state.

    Raises:
        ValueError: shapes or dtypes do not fit, or no implementation can run.
    """
    _check(q, k, v, log_decay, state)
    segments = slots.shape[0]
    if not segments:
        raise ValueError("no segments: leave the call out")
    if cu_seqlens.shape != (segments + 1,) or is_fresh.shape != (segments,):
        raise ValueError(
            f"{segments} slots need cu_seqlens [{segments + 1}] and is_fresh [{segments}], got "
            f"{cu_seqlens.shape} and {is_fresh.shape}"
        )
    wide_v = _as_wide(v, state)
    run = dispatch.choose(
        "lightning_prefill", implementation, q, k, wide_v, log_decay, state, exact=exact
    )
    o, state = _jit(run, "scale", "chunk_size")(
        q, k, wide_v, log_decay, state, slots=slots, cu_seqlens=cu_seqlens, is_fresh=is_fresh,
        scale=scale, chunk_size=chunk_size,
    )  # fmt: skip
    return _as_narrow(o, v), state


def lightning_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    scale: float,
    implementation: str = "auto",
    exact: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Fold one token into each slot.

    Args:
        q: [B, N, K], as k.
        k: [B, N, K].
        v: [B, N, V].
        log_decay: float32 [N], <= 0.
        state: [S, N, K, V], or wider, as of `lightning_prefill`; donate it.
        slots: int32 [B], distinct; 0 for pad rows.
        scale: the factor of the output.
        implementation: "auto" or a registered name.
        exact: a row's bits depend on nothing but its sequence and the static sizes.

    Returns:
        o [B, N, V] in v's dtype, and the state.

    Raises:
        ValueError: shapes or dtypes do not fit, or no implementation can run.
    """
    _check(q, k, v, log_decay, state)
    if slots.shape != q.shape[:1]:
        raise ValueError(f"one slot a row: rows {q.shape[0]}, slots {slots.shape}")
    wide_v = _as_wide(v, state)
    run = dispatch.choose(
        "lightning_decode", implementation, q, k, wide_v, log_decay, state, exact=exact
    )
    o, state = _jit(run, "scale")(q, k, wide_v, log_decay, state, slots=slots, scale=scale)
    return _as_narrow(o, v), state


def _as_wide(v: jax.Array, state: jax.Array) -> jax.Array:
    """v with the zeros behind it that a state of whole lanes has behind its columns."""
    missing = state.shape[-1] - v.shape[-1]
    return jnp.pad(v, ((0, 0), (0, 0), (0, missing))) if missing else v


def _as_narrow(o: jax.Array, v: jax.Array) -> jax.Array:
    return o if o.shape == v.shape else o[..., : v.shape[-1]]


@functools.cache
def _jit(run, *static: str):
    """A jit of its own, so that all layers share one trace of the operator."""
    return jax.jit(run, static_argnames=static)


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array
) -> None:
    rows, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if not rows:
        raise ValueError("no rows: leave the call out")
    if k.shape != q.shape or v.shape != (rows, heads, value_dim):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: want [T,N,K] twice and [T,N,V]")
    if log_decay.shape != (heads,) or log_decay.dtype != jnp.float32:
        got = f"{log_decay.dtype} {log_decay.shape}"
        raise ValueError(f"log_decay: want float32 [{heads}], got {got}")
    widths = {value_dim, -(-value_dim // LANES) * LANES}
    if state.ndim != 4 or state.shape[1:3] != (heads, key_dim) or state.shape[3] not in widths:
        raise ValueError(f"state: want [S,{heads},{key_dim},{value_dim}], got {state.shape}")
    if state.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"state: want float32 or bfloat16, got {state.dtype}")
