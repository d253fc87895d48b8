"""Packed segments cut into tiles of a fixed number of rows, each tile inside one segment.

Prefill rows of several segments lie packed one after another; matrix work wants blocks of a
fixed size that never mix two segments. Tiles count from a segment's own first row, so what a
segment computes does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.compat import target_platform

Carry = TypeVar("Carry")

# Used tiles that go through a loop's body together: a CPU takes one after the other anyway.
_TILES_AT_ONCE = {"cpu": 1}
_TILES_AT_ONCE_ELSEWHERE = 16


class Tiles(NamedTuple):
    """Tiles of `size` rows over packed rows; n tiles, of which the last may be empty.

    Attributes:
        segment: int32 [n], the segment a tile lies in.
        rows: int32 [n, size], the packed row of each tile row, clipped into range.
        valid: bool [n, size], whether the tile row exists.
        length: int32 [n], the number of valid rows; 0 for unused tiles.
        is_first: bool [n], whether the tile opens its segment.
        last_tile: int32 [segments], each segment's last tile (clipped; empty segments have none).
        row_segment: int32 [T], the segment a packed row lies in, clipped.
        row_exists: bool [T], whether it lies in any.
        row_place: int32 [T], where it stands among all tile rows, n * size of them.
    """

    segment: jax.Array
    rows: jax.Array
    valid: jax.Array
    length: jax.Array
    is_first: jax.Array
    last_tile: jax.Array
    row_segment: jax.Array
    row_exists: jax.Array
    row_place: jax.Array


def tile_segments(cu_seqlens: jax.Array, num_rows: int, size: int) -> Tiles:
    """Cut the segments `cu_seqlens` [P + 1] of `num_rows` packed rows into tiles of `size`.

    The number of tiles is the static bound (num_rows + P * (size - 1)) // size, at least 1.
    """
    num_segments = cu_seqlens.shape[0] - 1
    num_tiles = max(1, (num_rows + num_segments * (size - 1)) // size)
    tiles_of = -(-(cu_seqlens[1:] - cu_seqlens[:-1]) // size)
    ends = jnp.cumsum(tiles_of)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    segment, used = segment_of(tile, ends)
    within = tile - (ends - tiles_of)[segment]
    start = cu_seqlens[segment] + within * size
    length = jnp.where(used, jnp.clip(cu_seqlens[segment + 1] - start, 0, size), 0)
    offset = jnp.arange(size, dtype=jnp.int32)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    row_segment, row_exists = segment_of(row, cu_seqlens[1:])
    within_segment = row - cu_seqlens[row_segment]
    first_tile = (ends - tiles_of)[row_segment]
    place = first_tile * size + within_segment
    return Tiles(
        segment=segment,
        rows=jnp.clip(start[:, None] + offset, 0, num_rows - 1),
        valid=offset < length[:, None],
        length=length,
        is_first=used & (within == 0),
        last_tile=jnp.maximum(ends - 1, 0),
        row_segment=row_segment,
        row_exists=row_exists,
        row_place=jnp.where(row_exists, place, 0),
    )


def fold_used(run: Callable[[jax.Array, Tiles, Carry], Carry], tiles: Tiles, carry: Carry) -> Carry:
    """`run` over the tiles in use, a few at a time; the bound of `tile_segments` is mostly air.

    Args:
        run: (number of the first tile, the tiles [m] from there on, carry) -> carry. Of the tiles
            it gets at last some may be unused, and their numbers up to `num_places`.
        tiles: the used ones first, as `tile_segments` makes them.
        carry: what the first call gets.
    """
    some = _at_once(tiles)
    missing = num_places(tiles) - tiles.length.shape[0]
    names = ("segment", "rows", "valid", "length", "is_first")
    padded = [
        jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        for x in (getattr(tiles, name) for name in names)
    ]

    def body(number: jax.Array, carry: Carry) -> Carry:
        start = number * some
        part = (jax.lax.dynamic_slice_in_dim(x, start, some) for x in padded)
        return run(start, tiles._replace(**dict(zip(names, part, strict=True))), carry)

    num_used = (tiles.length > 0).sum()
    return jax.lax.fori_loop(0, -(-num_used // some), body, carry)


def num_places(tiles: Tiles) -> int:
    """Room for whatever `fold_used` hands out: the tiles, up to a multiple of those at once."""
    return -(-tiles.length.shape[0] // _at_once(tiles)) * _at_once(tiles)


def _at_once(tiles: Tiles) -> int:
    most = _TILES_AT_ONCE.get(target_platform(), _TILES_AT_ONCE_ELSEWHERE)
    return min(tiles.length.shape[0], most)


def segment_of(number: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which of the intervals that end at `ends` holds each number, clipped; whether one does."""
    # A bisection is a loop of small steps; a few ends are compared with all at once.
    method = "compare_all" if ends.shape[0] <= 64 else "scan"
    found = jnp.searchsorted(ends, number, side="right", method=method).astype(jnp.int32)
    return jnp.minimum(found, ends.shape[0] - 1), found < ends.shape[0]


@jax.custom_vjp
def take_rows(x: jax.Array, tiles: Tiles) -> jax.Array:
    """Rows of x [T, ...] as tiles [n, size, ...]; rows that do not exist are zero.

    A select, not a product: what lies in rows beyond the segments may be NaN.
    """
    valid = tiles.valid.reshape(tiles.valid.shape + (1,) * (x.ndim - 1))
    return jnp.where(valid, x[tiles.rows], 0)


@jax.custom_vjp
def put_rows(y: jax.Array, tiles: Tiles) -> jax.Array:
    """The inverse of `take_rows`: [n, size, ...] to [T, ...]; rows in no segment are zero.

    More than n tiles may come; those behind are not read.
    """
    # Gathered, not scattered: XLA's CPU scatter is a loop over rows.
    rows = y.reshape((-1, *y.shape[2:]))[tiles.row_place]
    return jnp.where(tiles.row_exists.reshape((-1,) + (1,) * (rows.ndim - 1)), rows, 0)


# Every row that exists has one place, so each of the two is the other's transpose: gradients are
# gathered too, where differentiating a gather would scatter.
take_rows.defvjp(
    lambda x, tiles: (take_rows(x, tiles), tiles), lambda tiles, g: (put_rows(g, tiles), None)
)
put_rows.defvjp(
    lambda y, tiles: (put_rows(y, tiles), tiles), lambda tiles, g: (take_rows(g, tiles), None)
)


def tile_a_segment(cu_seqlens: jax.Array, num_rows: int, size: int) -> Tiles:
    """One tile of `size` rows a segment; rows of a segment beyond `size` are in no tile.

    See `tile_segments`; here tile p is segment p.
    """
    num_segments = cu_seqlens.shape[0] - 1
    length = jnp.minimum(cu_seqlens[1:] - cu_seqlens[:-1], size)
    offset = jnp.arange(size, dtype=jnp.int32)
    row_segment, row_exists = segment_of(jnp.arange(num_rows, dtype=jnp.int32), cu_seqlens[1:])
    within = jnp.arange(num_rows, dtype=jnp.int32) - cu_seqlens[row_segment]
    row_exists &= within < size
    segment = jnp.arange(num_segments, dtype=jnp.int32)
    return Tiles(
        segment=segment,
        rows=jnp.clip(cu_seqlens[:-1, None] + offset, 0, num_rows - 1),
        valid=offset < length[:, None],
        length=length,
        is_first=length > 0,
        last_tile=segment,
        row_segment=row_segment,
        row_exists=row_exists,
        row_place=jnp.where(row_exists, row_segment * size + within, 0),
    )
