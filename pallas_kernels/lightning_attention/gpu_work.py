"""Which rows a block of the GPU prefill works on: segments, cut into pieces where they are long.

A piece is a sequence of its own that starts from a state the pieces before it sum up to, so a long
segment fills the GPU even alone. Rows of no segment and of NULL segments are work too: they become
zeros. Pieces start at multiples of 8 rows (a rule of the copy engine), so the first and the last
chunk of a segment may hold rows of its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ALIGNED_ROWS = 8
# Each block of both kernels looks through all segments for its piece (about 4 us with 33). With
# four or more that costs more than cutting saves, unless one of them is nearly all rows. Cut and
# whole, us on an H200 with 16 heads, segments of one length: 4096 rows in 1 segment 41.2 and 80.2,
# in 4 32.0 and 26.5, in 32 118.6 and 54.6; 8192 rows in 4 49.5 and 45.8, in 16 83.1 and 59.8.
_MOST_CUT_SEGMENTS = 3


class Segments(NamedTuple):
    """slots [P] int32, cu_seqlens [P + 1] int32, is_fresh [P] bool."""

    slots: jax.Array
    cu_seqlens: jax.Array
    is_fresh: jax.Array


class Cut(NamedTuple):
    """How `rows` packed rows of `segments` are handed out; all static.

    A segment is cut every `span` rows; span 0 leaves segments whole. `items` bounds the number of
    pieces, `summed` that of pieces of segments of more than one.
    """

    rows: int
    segments: int
    span: int
    items: int
    summed: int


class Work(NamedTuple):
    """One item: rows [begin, end) of a segment of rows [first_row, last_row); kernel scalars.

    `start` is the aligned row of the first chunk. `piece` of `pieces`; `rank` is the place of the
    segment's first piece among the summed ones.
    """

    slot: jax.Array
    segment: jax.Array
    first_row: jax.Array
    last_row: jax.Array
    start: jax.Array
    begin: jax.Array
    end: jax.Array
    piece: jax.Array
    pieces: jax.Array
    rank: jax.Array


def whole(rows: int, segments: int) -> Cut:
    """Every segment in one piece."""
    return Cut(rows, segments, 0, segments + 1, 0)


def cut(rows: int, segments: int, blocks_per_item: int, chunk: int, wanted_blocks: int) -> Cut:
    """Spans such that one segment of all the rows makes about `wanted_blocks` blocks."""
    span = -(-rows // max(1, wanted_blocks // blocks_per_item))
    span = -(-span // chunk) * chunk
    # A piece costs reading its rows' keys and values twice: two chunks are not worth it.
    span = max(span, 4 * chunk)
    if segments > _MOST_CUT_SEGMENTS or rows <= span:
        return whole(rows, segments)
    # A segment of n rows makes at most (n + 7) / span + 1 pieces, and at most twice the fraction
    # if it makes more than one.
    most = (rows + (ALIGNED_ROWS - 1) * (segments + 1)) // span
    return Cut(rows, segments, span, most + segments + 1, 2 * most + 2)


def piece_rows(cut: Cut, first_row, last_row, piece) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The aligned start of a piece, its first row and the row behind its last."""
    base = first_row // ALIGNED_ROWS * ALIGNED_ROWS
    if not cut.span:
        return base, first_row, last_row
    start = base + piece * cut.span
    return start, jnp.maximum(first_row, start), jnp.minimum(last_row, start + cut.span)


def locate(item: jax.Array, cut: Cut, cu_ref, slots_ref) -> Work:
    """The work of an item, read from the tables in the kernel; items beyond the last are empty."""

    def bounds(segment):
        begin = cu_ref[segment]
        end = cu_ref[jnp.minimum(segment + 1, cut.segments)]
        return begin, jnp.where(segment == cut.segments, cut.rows, end)

    def work(segment, piece, pieces, rank):
        first_row, last_row = bounds(segment)
        # The rows behind the last segment are a segment of nobody.
        slot = slots_ref[jnp.minimum(segment, cut.segments - 1)]
        slot = jnp.where(segment == cut.segments, 0, slot)
        start, begin, end = piece_rows(cut, first_row, last_row, piece)
        end = jnp.where(pieces > 0, end, begin)
        return Work(
            slot, segment, first_row, last_row, start, begin, end, piece, pieces, rank
        )  # fmt: skip

    zero = jnp.int32(0)
    if not cut.span:
        return work(item, zero, jnp.int32(1), zero)

    def visit(segment, found):
        before, summed, mine = found
        begin, end = bounds(segment)
        base = begin // ALIGNED_ROWS * ALIGNED_ROWS
        pieces = jnp.where(end > begin, (end - base + cut.span - 1) // cut.span, 0)
        is_mine = (item >= before) & (item < before + pieces)
        here = (segment, item - before, pieces, summed)
        mine = tuple(jnp.where(is_mine, new, old) for new, old in zip(here, mine, strict=True))
        return before + pieces, summed + jnp.where(pieces > 1, pieces, 0), mine

    nothing = (zero, zero, zero, zero)
    _, _, mine = lax.fori_loop(0, cut.segments + 1, visit, (zero, zero, nothing))
    return work(*mine)
