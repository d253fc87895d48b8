"""Decode straight from projected rows: when one kernel does norms and RoPE of q and k as well.

It is no operator of its own. It stands in for `lightning_decode` where that would run on the
kernel for Hopper GPUs, so whoever takes a step from that kernel (a plugin, a named
implementation, exact mode) takes it from this one too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels import compat, dispatch
from pallas_kernels.lightning_attention import api

logger = logging.getLogger(__name__)

# (row, head) pairs from which it was no faster: there the state's bytes decide alone, and plain
# decode moves them faster (128 rows of 64 heads, 292.0 us of a layer against 291.3 on an H200).
_TOO_MANY_PAIRS = 8192
_STATIC = ("scale", "eps", "rotated_dtype")
_why_not = dispatch.lazily(f"{__package__}.gpu_decode_fused", "why_not")
_run = dispatch.lazily(f"{__package__}.gpu_decode_fused", "lightning_decode_fused")


def choose_fused_decode(
    qkv: jax.Array | jax.ShapeDtypeStruct,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    norms: Sequence[jax.Array],
    num_angles: int,
    rotated_dtype: Any,
    implementation: str = "auto",
    exact: bool = False,
) -> Callable[..., tuple[jax.Array, jax.Array]] | None:
    """`gpu_decode_fused.lightning_decode_fused`, or None where norms, RoPE and decode run apart.

    Args:
        qkv: [B, 3, N, K], only its shape and dtype count.
        log_decay: float32 [N].
        state: [S, N, K, K].
        norms: weights of the norms of q and k, empty without.
        num_angles: half the rotated channels, 0 without RoPE.
        rotated_dtype: what q and k of the operator would have.
        implementation: of `lightning_decode`, as there.
        exact: as there.

    Raises:
        ValueError: `lightning_decode` can't run.
    """
    if exact or compat.why_no_mosaic_gpu() is not None:
        return None
    rows, _, heads, dim = qkv.shape
    q = jax.ShapeDtypeStruct((rows, heads, dim), rotated_dtype)
    v = jax.ShapeDtypeStruct((rows, heads, dim), qkv.dtype)
    chosen = dispatch.choose("lightning_decode", implementation, q, q, v, log_decay, state)
    if chosen is not api.DECODE_ON_GPU:
        return None
    reason = _why_not(qkv, state, num_angles)
    if any(weight.dtype != qkv.dtype for weight in norms):
        reason = f"weights of norms are not {qkv.dtype}"
    elif rows * heads >= _TOO_MANY_PAIRS:
        reason = f"it does not pay for {_TOO_MANY_PAIRS} or more rows x heads"
    _log_choice(reason)
    return None if reason else _jitted()


@functools.cache
def _jitted() -> Callable[..., tuple[jax.Array, jax.Array]]:
    """One trace for all layers."""
    return jax.jit(_run, static_argnames=_STATIC)


@functools.cache
def _log_choice(reason: str | None) -> None:
    if reason:
        logger.info("lightning_decode: norms and RoPE apart, because %s", reason)
    else:
        logger.info("lightning_decode: norms and RoPE in its kernel")
