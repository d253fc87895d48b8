"""Packed segments cut into tiles of a fixed number of rows, each tile inside one segment.

Prefill rows of several segments lie packed one after another; matrix work wants blocks of a
fixed size that never mix two segments. Tiles count from a segment's own first row, so what a
segment computes does not depend on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Tiles of `size` rows over packed rows; n tiles, of which the last may be empty.

    Attributes:
        segment: int32 [n], the segment a tile lies in.
        rows: int32 [n, size], the packed row of each tile row, clipped into range.
        valid: bool [n, size], whether the tile row exists.
        length: int32 [n], the number of valid rows; 0 for unused tiles.
        is_first: bool [n], whether the tile opens its segment.
        last_tile: int32 [segments], each segment's last tile (clipped; empty segments have none).
    """

    segment: jax.Array
    rows: jax.Array
    valid: jax.Array
    length: jax.Array
    is_first: jax.Array
    last_tile: jax.Array


def tile_segments(cu_seqlens: jax.Array, num_rows: int, size: int) -> Tiles:
    """Cut the segments `cu_seqlens` [P + 1] of `num_rows` packed rows into tiles of `size`.

    The number of tiles is the static bound (num_rows + P * (size - 1)) // size, at least 1.
    """
    num_segments = cu_seqlens.shape[0] - 1
    num_tiles = max(1, (num_rows + num_segments * (size - 1)) // size)
    tiles_of = -(-(cu_seqlens[1:] - cu_seqlens[:-1]) // size)
    ends = jnp.cumsum(tiles_of)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    segment = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
    used = segment < num_segments
    segment = jnp.minimum(segment, num_segments - 1)
    within = tile - (ends - tiles_of)[segment]
    start = cu_seqlens[segment] + within * size
    length = jnp.where(used, jnp.clip(cu_seqlens[segment + 1] - start, 0, size), 0)
    offset = jnp.arange(size, dtype=jnp.int32)
    return Tiles(
        segment=segment,
        rows=jnp.clip(start[:, None] + offset, 0, num_rows - 1),
        valid=offset < length[:, None],
        length=length,
        is_first=used & (within == 0),
        last_tile=jnp.maximum(ends - 1, 0),
    )


def take_rows(x: jax.Array, tiles: Tiles) -> jax.Array:
    """Rows of x [T, ...] as tiles [n, size, ...]; rows that do not exist are zero.

    A select, not a product: what lies in rows beyond the segments may be NaN.
    """
    valid = tiles.valid.reshape(tiles.valid.shape + (1,) * (x.ndim - 1))
    return jnp.where(valid, x[tiles.rows], 0)


def put_rows(y: jax.Array, tiles: Tiles, num_rows: int) -> jax.Array:
    """The inverse of `take_rows`: [n, size, ...] to [T, ...]; rows in no segment are zero."""
    # Rows that do not exist go to one row past the end, which is cut off again.
    target = jnp.where(tiles.valid, tiles.rows, num_rows).reshape(-1)
    flat = y.reshape((-1, *y.shape[2:]))
    out = jnp.zeros((num_rows + 1, *flat.shape[1:]), y.dtype)
    return out.at[target].set(flat, mode="promise_in_bounds")[:num_rows]
