"""Lightning decode on NVIDIA Hopper GPUs (Mosaic GPU): every state is read once and written once.

    S[slot] <- exp(g) S[slot] + k v^T        o = scale * S[slot]^T q

One block a (row, head, part of V). It holds its [K, columns] of the state in registers, so the
state's bytes are all that is moved; the slot is looked up in the block and the pool is updated in
place. Rows of slot 0 write zeros and touch no state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat

plgpu = compat.mosaic_gpu()

WARPS, LANES = 4, 32
# State entries a thread holds: more of them keep more loads in flight, fewer make more blocks,
# which pays where the states of all rows are few bytes. Best of 16 to 128 on an H200 (us, 16 heads,
# K = V = 128): float32 1 row 2.2 with 16 and 2.8 with 64, 8 rows 6.4 and 6.0; bfloat16 8 rows 4.1
# with 32 and 4.6 with 128, 32 rows 11.5 with 64 and 12.0 with 128, 256 rows 79.0 and 74.8.
_ENTRIES, _ENTRIES_HALF_WIDTH = 64, 128
_FEW_BYTES, _MANY_BYTES = 2**22, 2**26
_FEW_BYTES_A_THREAD = 64


class StateTile(NamedTuple):
    """How a warpgroup holds [K, columns] of a state.

    A lane owns `vector` neighbouring columns, `rows` rows of K make one access of a warp.
    """

    columns: int
    vector: int
    rows: int


def state_tile(key_dim: int, value_dim: int, entries: int) -> StateTile | None:
    """The widest tile and accesses of at most `entries` a thread, None if none fits."""
    # Sums across warps come in vectors of at most 4.
    for vector in (4, 2):
        for columns in (128, 64, 32, 16, 8):
            rows = LANES * vector // columns
            divides = rows and value_dim % columns == 0 and key_dim % (WARPS * rows) == 0
            if divides and key_dim * columns <= entries * WARPS * LANES:
                return StateTile(columns, vector, rows)
    return None


def entries_a_thread(rows: int, state: jax.Array) -> int:
    """How much of a state of [S, N, K, V] a thread should hold, where so many rows decode."""
    itemsize = state.dtype.itemsize
    num_bytes = rows * math.prod(state.shape[1:]) * itemsize
    if num_bytes <= _FEW_BYTES:
        return _FEW_BYTES_A_THREAD // itemsize
    return _ENTRIES_HALF_WIDTH if itemsize == 2 and num_bytes >= _MANY_BYTES else _ENTRIES


def register_layout(tile: StateTile):
    """The layout of a [K, columns] array in registers: a warp a group of rows."""
    columns, vector, rows = tile
    if rows == 1:
        tiling, warps, lanes = ((WARPS, columns), (vector,)), (-3,), (-2,)
    else:
        tiling = (WARPS * rows, columns), (rows, columns), (vector,)
        warps, lanes = (-5,), (-3, -2)
    return plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=warps, lane_dims=lanes, vector_dim=-1)


def why_not(q: jax.Array, v: jax.Array, state: jax.Array) -> str | None:
    """Why the kernel can't run on arrays like these, or None."""
    for name, array in (("q", q), ("v", v), ("state", state)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}, not float32 or bfloat16"
    key_dim, value_dim = state.shape[-2:]
    if state_tile(key_dim, value_dim, _ENTRIES) is None:
        return f"key dim {key_dim} and value dim {value_dim}: want multiples of 16 up to 256"
    return None


def lightning_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    scale: float,
    entries: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_decode`; `entries` of the state a thread holds at most."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if entries is None:
        entries = entries_a_thread(batch, state)
    tile = state_tile(key_dim, value_dim, entries) or state_tile(key_dim, value_dim, _ENTRIES)
    if tile is None:
        raise ValueError(f"no register tile for a state of {key_dim} by {value_dim}")
    layout = register_layout(tile)
    parts = value_dim // tile.columns
    shape = (key_dim, tile.columns)

    def lightning_decode_kernel(q_ref, k_ref, v_ref, g_ref, slots_ref, s_ref, o_ref):
        # One flat grid axis: the second and third of a CUDA grid end at 65,535.
        block = lax.axis_index("block")
        row, head, part = block // (heads * parts), block // parts % heads, block % parts
        columns = pl.ds(part * tile.columns, tile.columns)
        slot = slots_ref[row]
        o_part = o_ref.at[row, head, columns]

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        # On their way while the slot is looked up.
        k_head, q_head = (load(ref.at[row, head], layout.reduce(1)) for ref in (k_ref, q_ref))
        v_part = load(v_ref.at[row, head, columns], layout.reduce(0))
        forgotten = expm1(g_ref[head])

        @pl.when(slot != 0)
        def _():
            s_part = s_ref.at[slot, head, :, columns]
            s = load(s_part, layout)
            k_column, q_column = (lax.broadcast_in_dim(x, shape, (0,)) for x in (k_head, q_head))
            v_row = lax.broadcast_in_dim(v_part, shape, (1,))
            # exp(g) S as S + (exp(g) - 1) S: a slow head's exp(g) would err the same way every
            # token.
            s = s + forgotten * s + k_column * v_row
            compat.store_from_registers(s_part, s.astype(s_ref.dtype))
            o = scale * jnp.sum(s * q_column, axis=0)
            compat.store_from_registers(o_part, o.astype(o_ref.dtype))

        @pl.when(slot == 0)
        def _():
            nothing = jnp.zeros((tile.columns,), o_ref.dtype)
            compat.store_from_registers(o_part, plgpu.layout_cast(nothing, layout.reduce(0)))

    kernel = plgpu.kernel(
        lightning_decode_kernel,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        grid=(batch * heads * parts,),
        grid_names=("block",),
    )
    pool = jax.new_ref(state)
    o = kernel(q, k, v, log_decay, slots, pool)
    return o, jax.freeze(pool)


def expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1 of a scalar x <= 0 in a kernel, to float32's last bits also near 0."""
    # Nested Taylor series, x (1 + x/2 (1 + x/3 (...))): at x = -0.5 the tenth term is 2e-11.
    series = jnp.float32(1)
    for n in range(9, 1, -1):
        series = 1 + x * (1 / n) * series
    return jnp.where(x > -0.5, x * series, jnp.exp2(x * math.log2(math.e)) - 1)
