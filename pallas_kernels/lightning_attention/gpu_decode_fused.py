"""Lightning decode on Hopper GPUs from the projected row: norms and RoPE of q and k on the way.

    y = w round(x / sqrt(mean(x^2) + eps))                    q and k, a head
    y_j, y_{j+r/2} = y_j c - y_{j+r/2} s, y_{j+r/2} c + y_j s      j < r/2
    S[slot] <- exp(g) S[slot] + k v^T        o = scale * S[slot]^T q

Rounded where `bailing_jax.layers.norms` and `.rope` round, so that the state is the same as from
q, k, v computed apart, but for the order of the sum in the mean. One block a (row, head, part of
V). The state is on its way while q and k are computed; K is held in parts of r/2 rows, so that a
thread has both channels of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.lightning_attention.gpu_decode import expm1
from pallas_kernels.lightning_attention.gpu_rows import (
    fold_row,
    load_wide,
    store_zeros,
    warp_layout,
    warp_tile,
)

plgpu = compat.mosaic_gpu()

# As in `gpu_decode`: state entries a thread.
_ENTRIES, _ENTRIES_FEW_ROWS, _FEW_ROWS = 64, 32, 4


def why_not(qkv: jax.Array, state: jax.Array, num_angles: int) -> str | None:
    """Why the kernel can't run on arrays like these, or None; `num_angles` is r / 2, or 0."""
    for name, array in (("qkv", qkv), ("state", state)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}, not float32 or bfloat16"
    key_dim, value_dim = state.shape[-2:]
    if key_dim != value_dim:
        return f"key dim {key_dim} and value dim {value_dim}: one projection makes them the same"
    if num_angles and (key_dim % num_angles or 2 * num_angles > key_dim):
        return f"{2 * num_angles} rotated channels: half of them must divide key dim {key_dim}"
    if warp_tile(key_dim, value_dim, _ENTRIES, key_dim // (num_angles or key_dim)) is None:
        return f"no register tile for key dim {key_dim} in parts of {num_angles or key_dim}"
    return None


def lightning_decode_fused(
    qkv: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    scale: float,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    angles: tuple[jax.Array, jax.Array] | None,
    rotated_dtype: Any = None,
    entries: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token into each slot.

    Args:
        qkv: [B, 3, N, K], the projected rows; float32 or bfloat16.
        log_decay: float32 [N], <= 0.
        state: [S, N, K, K] float32 or bfloat16; donate it.
        slots: int32 [B], distinct; 0 for pad rows.
        scale: the factor of the output.
        norms: weights of q's and k's norms, each [K] in qkv's dtype; None: no norms.
        eps: of the norms.
        angles: cos and sin, each float32 [B, r / 2]; None: no rotation.
        rotated_dtype: what rotated q and k are rounded to; None: qkv's.
        entries: of the state a thread holds at most.

    Returns:
        o [B, N, K] in qkv's dtype, and the state.

    Raises:
        ValueError: `why_not`.
    """
    batch, _, heads, dim = qkv.shape
    half = angles[0].shape[-1] if angles else dim
    reason = why_not(qkv, state, half if angles else 0)
    if entries is None:
        entries = _ENTRIES_FEW_ROWS if batch <= _FEW_ROWS else _ENTRIES
    num = dim // half
    tile = warp_tile(dim, dim, entries, num) or warp_tile(dim, dim, _ENTRIES, num)
    if reason or tile is None:
        raise ValueError(reason)
    layout, parts = warp_layout(tile), dim // tile.columns
    pieces = [pl.ds(i * half, half) for i in range(num)]

    def lightning_decode_fused_kernel(qkv_ref, g_ref, slots_ref, *refs):
        *refs, s_ref, o_ref = refs
        norm_refs, angle_refs = refs[: len(norms or ())], refs[len(norms or ()) :]
        block = lax.axis_index("block")
        row, head, part = block // (heads * parts), block // parts % heads, block % parts
        columns = pl.ds(part * tile.columns, tile.columns)
        slot = slots_ref[row]
        o_part = o_ref.at[row, head, columns]

        def in_pieces(ref) -> list[jax.Array]:
            return [load_wide(ref.at[piece], layout.reduce(1)) for piece in pieces]

        @pl.when(slot != 0)
        def _():
            s_parts = [s_ref.at[slot, head, piece, columns] for piece in pieces]
            # First: on their way while q and k are computed.
            s = [load_wide(s_part, layout) for s_part in s_parts]
            v = load_wide(qkv_ref.at[row, 2, head, columns], layout.reduce(0))
            q, k = (in_pieces(qkv_ref.at[row, i, head]) for i in (0, 1))
            if norms:
                q, k = (
                    normed(x, in_pieces(weight), eps, qkv.dtype)
                    for x, weight in zip((q, k), norm_refs, strict=True)
                )
            if angle_refs:
                cos, sin = (load_wide(ref.at[row], layout.reduce(1)) for ref in angle_refs)
                q, k = (rotated(x, cos, sin, rotated_dtype or qkv.dtype) for x in (q, k))
            new, o = fold_row(s, q, k, v, expm1(g_ref[head]))
            for s_part, s_new in zip(s_parts, new, strict=True):
                compat.store_from_registers(s_part, s_new.astype(s_ref.dtype))
            compat.store_from_registers(o_part, (scale * o).astype(o_ref.dtype))

        @pl.when(slot == 0)
        def _():
            store_zeros(o_part, layout.reduce(0))

    kernel = plgpu.kernel(
        lightning_decode_fused_kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, dim), qkv.dtype),
        grid=(batch * heads * parts,),
        grid_names=("block",),
        # Sums over K stay within a warp; a sum to a scalar asks for a few bytes all the same.
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=1024),
    )
    pool = jax.new_ref(state)
    o = kernel(qkv, log_decay, slots, *(norms or ()), *(angles or ()), pool)
    return o, jax.freeze(pool)


def normed(
    x: Sequence[jax.Array], weight: Sequence[jax.Array], eps: float, dtype: Any
) -> list[jax.Array]:
    """RMSNorm of a head in pieces, float32 holding numbers of `dtype`."""
    squares = [piece * piece for piece in x]
    count = len(x) * x[0].shape[0]
    mean = jnp.sum(sum(squares[1:], squares[0])) / count
    factor = lax.rsqrt(mean + eps)
    to = rounding(dtype)
    return [to(w * to(piece * factor)) for piece, w in zip(x, weight, strict=True)]


def rotated(x: Sequence[jax.Array], cos: jax.Array, sin: jax.Array, dtype: Any) -> list[jax.Array]:
    """Half-split RoPE: the first piece turns with the second."""
    first, second, *rest = x
    to = rounding(dtype)
    return [to(first * cos - second * sin), to(second * cos + first * sin), *map(to, rest)]


def rounding(dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """To `dtype` and back to float32."""
    return lambda x: x.astype(dtype).astype(jnp.float32)
