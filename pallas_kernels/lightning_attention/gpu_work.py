"""Which rows a block of the GPU prefill works on: segments, cut into pieces where they are long.

A piece is a sequence of its own that starts from a state the pieces before it sum up to, so a long
segment fills the GPU even alone. Rows of no segment and of NULL segments are work too: they become
zeros. Pieces start at multiples of 8 rows (a rule of the copy engine), so the first and the last
chunk of a segment may hold rows of its neighbours.

Which blocks there are is fixed before lengths are known. The packed rows are divided in windows of
`span` rows. A segment is cut `span` rows after its base (its first row, rounded down to 8), and
again every `span` rows: so at most one cut falls into a window, and it belongs to the segment of
the row before the window. A block finds the cut of its window by a search in cu_seqlens, and what
is stored for a cut has the number of its window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ALIGNED_ROWS = 8
# A block looks at one entry of cu_seqlens fewer at a time: they do not wait for each other.
_FAN = 16


class Segments(NamedTuple):
    """slots [P] int32, cu_seqlens [P + 1] int32, is_fresh [P] bool."""

    slots: jax.Array
    cu_seqlens: jax.Array
    is_fresh: jax.Array


class Cut(NamedTuple):
    """How `rows` packed rows of `segments` are handed out; all static.

    Segments of more than 1.5 `span` rows are cut every `span` rows; none if `windows` is 0, else
    windows 1 to `windows` may hold a cut.
    """

    rows: int
    segments: int
    span: int
    windows: int

    @property
    def items(self) -> int:
        """Pieces behind a cut, first pieces, and the rows behind the last segment."""
        return self.windows + self.segments + 1

    @property
    def stored(self) -> int:
        """States beside the pool: of each window what a piece adds, and what a segment enters."""
        return 2 * self.windows


class Work(NamedTuple):
    """Rows [begin, end) of a segment of rows [first_row, last_row); kernel scalars.

    `start` is the aligned row of the first chunk. `piece` of `pieces`; the segment is cut in the
    windows after `window`.
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
    window: jax.Array


def whole(rows: int, segments: int) -> Cut:
    """Every segment in one piece."""
    return Cut(rows, segments, max(rows, 1), 0)


def cut(rows: int, segments: int, blocks_per_item: int, chunk: int, wanted_blocks: int) -> Cut:
    """Spans such that one segment of all the rows makes about `wanted_blocks` blocks."""
    span = -(-rows // max(1, wanted_blocks // blocks_per_item))
    span = -(-span // chunk) * chunk
    # A piece costs reading its rows' keys and values twice: two chunks are not worth it.
    span = max(span, 4 * chunk)
    if not _is_long(rows, span):
        return whole(rows, segments)
    return Cut(rows, segments, span, (rows - 1) // span)


def piece_rows(cut: Cut, first_row, last_row, piece) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The aligned start of a piece of a cut segment, its first row and the row behind its last."""
    start = _base(first_row) + piece * cut.span
    return start, jnp.maximum(first_row, start), jnp.minimum(last_row, start + cut.span)


def locate(item: jax.Array, cut: Cut, cu_ref, slots_ref) -> Work:
    """The work of an item, the pieces behind a cut first: they are long."""
    first_piece = item - cut.windows, jnp.int32(0)
    if not cut.windows:
        return _work(cut, cu_ref, slots_ref, *first_piece)
    where = lax.cond(
        item < cut.windows, lambda: _find_cut(item + 1, cut, cu_ref), lambda: first_piece
    )
    return _work(cut, cu_ref, slots_ref, *where)


def beside_cut(window: jax.Array, cut: Cut, cu_ref, slots_ref, *, behind: bool) -> Work:
    """The piece behind the cut in a window, or the one before it; no rows if there is no cut."""
    segment, piece = _find_cut(window, cut, cu_ref)
    return _work(cut, cu_ref, slots_ref, segment, piece, before=not behind)


def stored_sum(work: Work, piece: jax.Array, reverse: bool) -> jax.Array:
    """Where it is stored what a piece adds to the state: by the cut that it is walked towards."""
    return work.window + piece - (1 if reverse else 0)


def stored_start(cut: Cut, work: Work) -> jax.Array:
    """Where it is stored what a cut segment starts from."""
    return cut.windows + work.window


def _work(cut: Cut, cu_ref, slots_ref, segment, piece, *, before: bool = False) -> Work:
    """A piece of a segment, or the one before it; no rows if the segment has no such piece."""
    first_row, last_row = _rows_of(segment, cut, cu_ref)
    base = _base(first_row)
    # The rows behind the last segment are a segment of nobody.
    slot = slots_ref[jnp.minimum(segment, cut.segments - 1)]
    slot = jnp.where(segment == cut.segments, 0, slot)
    is_cut = _is_long(last_row - first_row, cut.span) if cut.windows else jnp.bool_(False)
    pieces = jnp.where(is_cut, (last_row - base + cut.span - 1) // cut.span, 1)
    exists = piece < pieces
    piece = piece - 1 if before else piece
    start, begin, end = piece_rows(cut, first_row, last_row, piece)
    end = jnp.where(exists, jnp.where(is_cut, end, last_row), begin)
    return Work(
        slot, segment, first_row, last_row, start, begin, end, piece, pieces, base // cut.span
    )  # fmt: skip


def _find_cut(window: jax.Array, cut: Cut, cu_ref) -> tuple[jax.Array, jax.Array]:
    """The segment of the row before a window, and its piece behind a cut in the window if any.

    Who begins in the window is cut first in the next one.
    """
    row = window * cut.span - 1
    segment = jnp.int32(0)
    stride = 1
    while stride * _FAN <= cut.segments:
        stride *= _FAN
    while stride:
        steps = jnp.int32(0)
        for i in range(1, min(_FAN - 1, cut.segments // stride) + 1):
            candidate = segment + i * stride
            begins = cu_ref[jnp.minimum(candidate, cut.segments)] <= row
            steps += jnp.where(begins & (candidate <= cut.segments), 1, 0)
        segment += steps * stride
        stride //= _FAN
    return segment, window - _base(cu_ref[segment]) // cut.span


def _is_long(rows, span):
    """Whether a segment is cut: two passes over parts of it, and the two kernels' starts, cost
    about what folding half a span more does."""
    return 2 * rows > 3 * span


def _base(first_row):
    return first_row // ALIGNED_ROWS * ALIGNED_ROWS


def _rows_of(segment, cut: Cut, cu_ref) -> tuple[jax.Array, jax.Array]:
    begin = cu_ref[segment]
    end = cu_ref[jnp.minimum(segment + 1, cut.segments)]
    return begin, jnp.where(segment == cut.segments, cut.rows, end)
