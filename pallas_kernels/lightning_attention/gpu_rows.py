"""One decode row in one warpgroup with a part of V a warp: no warp waits for another.

    S <- exp(g) S + k v^T        o = scale * S^T q

For a kernel that computes k and q itself (`gpu_decode_fused`). Each warp holds all K rows of its
columns, so sums over K take shuffles only: no shared memory and no barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

plgpu = compat.mosaic_gpu()

WARPS, LANES = 4, 32


class WarpTile(NamedTuple):
    """How a warpgroup holds [K, columns] of a state.

    A warp owns columns / 4 of them, a lane `vector` neighbours; `rows` rows of K make one access.
    """

    columns: int
    vector: int
    rows: int


def warp_tile(key_dim: int, value_dim: int, entries: int, parts: int = 1) -> WarpTile | None:
    """The widest tile of at most `entries` a thread, None if none fits; K is held in `parts`."""
    for vector in (4, 2):
        for columns in (128, 64, 32, 16):
            lanes = columns // (WARPS * vector)
            rows = LANES // lanes if lanes else 0
            divides = rows and value_dim % columns == 0 and key_dim % (parts * rows) == 0
            if divides and key_dim * columns <= entries * WARPS * LANES:
                return WarpTile(columns, vector, rows)
    return None


def warp_layout(tile: WarpTile):
    """The layout of a [K, columns] array in registers: a warp a group of columns."""
    columns, vector, rows = tile
    tiling = (rows, columns), (rows, columns // WARPS), (vector,)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiling), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
    )


def load_wide(ref: Any, layout: Any) -> jax.Array:
    """Global memory to registers, as float32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def fold_row(
    s: Sequence[jax.Array],
    q: Sequence[jax.Array],
    k: Sequence[jax.Array],
    v: jax.Array,
    forgotten: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """The state after one token, and S^T q; everything float32 in registers.

    Args:
        s: [keys, columns] for each part of K, all as large.
        q: [keys] for each part, in the layout of a column of s. So is k.
        v: [columns], in the layout of a row of s.
        forgotten: exp(g) - 1.
    """
    shape = s[0].shape
    v_row = lax.broadcast_in_dim(v, shape, (1,))
    new, products = [], []
    for s_part, q_part, k_part in zip(s, q, k, strict=True):
        k_column, q_column = (lax.broadcast_in_dim(x, shape, (0,)) for x in (k_part, q_part))
        # exp(g) S as S + (exp(g) - 1) S: a slow head's exp(g) would err the same way every token.
        new.append(s_part + forgotten * s_part + k_column * v_row)
        products.append(new[-1] * q_column)
    return new, jnp.sum(sum(products[1:], products[0]), axis=0)


def store_zeros(ref: Any, layout: Any) -> None:
    """Zeros to a row's output in global memory."""
    nothing = jnp.zeros(ref.shape, ref.dtype)
    compat.store_from_registers(ref, plgpu.layout_cast(nothing, layout))
