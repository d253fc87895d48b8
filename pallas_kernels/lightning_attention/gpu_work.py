"""Which rows a block of the GPU prefill works on: segments, cut into pieces where they are long.

A piece is a sequence of its own, so a long segment fills the GPU even alone. It takes two kernels.
The first brings each cut what the piece before it hands over: of a segment's first piece the state
behind it (and its outputs), of each other piece what it adds to a state. The second starts every
later piece from a weighted sum of those. A first piece has fewer rows than the others, so that the
first kernel's blocks take equally long. Pieces count in the order of the walk: `Cut.reverse` goes
from a segment's last row to its first.

Rows of no segment and of NULL segments are work too: they become zeros. Pieces start at multiples
of 8 rows (a rule of the copy engine), so the first and the last chunk of a segment may hold rows of
its neighbours.

Which blocks there are is fixed before lengths are known. The packed rows are divided in windows of
`span` rows, in the order of the walk. A segment is cut `first` rows after its base (where its walk
begins, rounded to 8 rows outwards) and again every `span` rows, as long as `Cut.least` rows are
left: so at most one cut falls into a window, and there is a row of each window that belongs to the
segment whose cut it may hold. A block finds that by a search in cu_seqlens, and what is handed over
at a cut is stored under the number of its window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ALIGNED_ROWS = 8
# A block looks at one entry of cu_seqlens fewer at a time: they do not wait for each other.
_FAN = 16
# A piece costs reading its rows' keys and values twice: two chunks are not worth it.
_LEAST_CHUNKS = 4


class Segments(NamedTuple):
    """slots [P] int32, cu_seqlens [P + 1] int32, is_fresh [P] bool."""

    slots: jax.Array
    cu_seqlens: jax.Array
    is_fresh: jax.Array


class Cut(NamedTuple):
    """How `rows` packed rows of `segments` are handed out; all static.

    Segments of more than 1.5 `span` rows are cut; none if `windows` is 0, else the windows 0 to
    `windows` - 1 may hold a cut. `reverse`, for which `rows` must be a multiple of 8: see above.
    """

    rows: int
    segments: int
    span: int
    first: int
    windows: int
    reverse: bool = False

    @property
    def least(self) -> int:
        """Rows of a segment's last piece at least, counted with those that alignment adds."""
        return _least(self.span, self.first)

    @property
    def items(self) -> int:
        """Of the second kernel: pieces behind a cut, first pieces, rows behind the last segment."""
        return self.windows + self.segments + 1


class Work(NamedTuple):
    """Rows [begin, end) of a segment of rows [first_row, last_row); kernel scalars.

    `start` is the aligned row of the first chunk. `piece` of `pieces`; `window` is that of the
    segment's first cut.
    """

    slot: jax.Array
    segment: jax.Array
    start: jax.Array
    begin: jax.Array
    end: jax.Array
    piece: jax.Array
    pieces: jax.Array
    window: jax.Array


def whole(rows: int, segments: int) -> Cut:
    """Every segment in one piece."""
    return Cut(rows, segments, max(rows, 1), 0, 0)


def cut(
    rows: int,
    segments: int,
    blocks_per_item: int,
    chunk: int,
    wanted_blocks: int,
    first_share: float,
    *,
    reverse: bool = False,
) -> Cut:
    """Spans such that one segment of all the rows makes about `wanted_blocks` blocks a kernel.

    `first_share` of a span is what a first piece has.
    """
    later = wanted_blocks // blocks_per_item
    # One piece after the first one would only wait for it.
    if later < 2:
        return whole(rows, segments)
    chunks = -(-rows // chunk)
    span = int(chunks // (later + first_share))
    first = chunks - later * span
    if span < _LEAST_CHUNKS or first + span > (1 + first_share) * (span + 1):
        span = max(span + 1, _LEAST_CHUNKS)
        first = round(first_share * span)
    span, first = span * chunk, first * chunk
    if not _is_long(rows, span):
        return whole(rows, segments)
    windows = (rows - _least(span, first)) // span + 1
    return Cut(rows, segments, span, first, windows, reverse)


def locate(item: jax.Array, cut: Cut, cu_ref, slots_ref) -> Work:
    """What the second kernel's block does; the pieces behind a cut come first: they are long."""
    segment, piece = item - cut.windows, jnp.int32(0)
    if not cut.windows:
        return _work(cut, cu_ref, slots_ref, segment, piece)

    def behind_cut():
        segment, before = _find_cut(item, cut, cu_ref)
        return segment, before + 1

    where = lax.cond(item < cut.windows, behind_cut, lambda: (segment, piece))
    work = _work(cut, cu_ref, slots_ref, *where)
    # The first kernel has done it.
    is_done = (work.piece == 0) & (work.pieces > 1) & (work.slot != 0)
    return work._replace(end=jnp.where(is_done, work.begin, work.end))


def before_cut(window: jax.Array, cut: Cut, cu_ref, slots_ref) -> Work:
    """What the first kernel's block does: the piece before a cut; no rows if there is no cut."""
    segment, piece = _find_cut(window, cut, cu_ref)
    work = _work(cut, cu_ref, slots_ref, segment, piece)
    is_followed = piece + 1 < work.pieces
    return work._replace(end=jnp.where(is_followed, work.end, work.begin))


def handed_over(work: Work, piece: jax.Array) -> jax.Array:
    """Where it is stored what a piece hands over."""
    return work.window + piece


def _work(cut: Cut, cu_ref, slots_ref, segment, piece) -> Work:
    """A piece of a segment; no rows if the segment has no such piece."""
    first_row = cu_ref[segment]
    last_row = cu_ref[jnp.minimum(segment + 1, cut.segments)]
    last_row = jnp.where(segment == cut.segments, cut.rows, last_row)
    # The rows behind the last segment are a segment of nobody.
    slot = slots_ref[jnp.minimum(segment, cut.segments - 1)]
    slot = jnp.where(segment == cut.segments, 0, slot)
    bottom = _down(first_row)
    if not cut.windows:
        zero, one = jnp.int32(0), jnp.int32(1)
        return Work(slot, segment, bottom, first_row, last_row, zero, one, zero)
    top = _down(last_row + ALIGNED_ROWS - 1)
    length = top - first_row if cut.reverse else last_row - bottom
    is_cut = _is_long(last_row - first_row, cut.span)
    pieces = jnp.where(is_cut, 2 + (length - cut.first - cut.least) // cut.span, 1)
    is_last = piece == pieces - 1
    # Where the walk enters the piece and leaves it, counted from the segment's base.
    enters = jnp.where(piece == 0, 0, cut.first + (piece - 1) * cut.span)
    leaves = cut.first + piece * cut.span
    if cut.reverse:
        start = jnp.where(is_last, bottom, top - leaves)
        begin, end = jnp.maximum(first_row, start), jnp.minimum(last_row, top - enters)
        base = cut.rows - top
    else:
        start = bottom + enters
        begin = jnp.maximum(first_row, start)
        end = jnp.where(is_last, last_row, bottom + leaves)
        base = bottom
    end = jnp.where(piece < pieces, end, begin)
    return Work(slot, segment, start, begin, end, piece, pieces, (base + cut.first) // cut.span)


def _find_cut(window: jax.Array, cut: Cut, cu_ref) -> tuple[jax.Array, jax.Array]:
    """The segment that a window's cut belongs to, and its piece before that cut if there is one.

    A cut at row c, counted in the order of the walk, is at most 8 rows before the end of its
    window, its segment begins before row c - first + 8 and goes on at least until row c + least:
    so the row looked for is the segment's.
    """
    row = (window + 1) * cut.span - cut.first - 1
    row = cut.rows - 1 - row if cut.reverse else row
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
    if cut.reverse:
        last_row = cu_ref[jnp.minimum(segment + 1, cut.segments)]
        last_row = jnp.where(segment == cut.segments, cut.rows, last_row)
        base = cut.rows - _down(last_row + ALIGNED_ROWS - 1)
    else:
        base = _down(cu_ref[segment])
    return segment, window - (base + cut.first) // cut.span


def _least(span: int, first: int) -> int:
    return span - first + ALIGNED_ROWS


def _is_long(rows, span):
    """Whether a segment is cut: two passes over parts of it, and the two kernels' starts, cost
    about what folding half a span more does."""
    return 2 * rows > 3 * span


def _down(row):
    return row // ALIGNED_ROWS * ALIGNED_ROWS
