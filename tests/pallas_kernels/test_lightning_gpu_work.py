"""How the GPU prefill hands out rows: every row once, whatever the segments' lengths."""

from __future__ import annotations

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.lightning_attention.gpu_work import (
    Cut,
    Work,
    before_cut,
    cut,
    handed_over,
    locate,
    whole,
)

ROWS = 600


@functools.cache
def compiled(shares: Cut, kernel: int):
    """cu_seqlens, slots -> the work of every block of the first or the second kernel."""
    find, number = ((before_cut, shares.windows), (locate, shares.items))[kernel - 1]
    return jax.jit(
        lambda cu, slots: jax.vmap(lambda i: find(i, shares, cu, slots))(jnp.arange(number))
    )


def work_of(
    shares: Cut, cu: list[int], kernel: int = 2, slots: list[int] | None = None
) -> list[Work]:
    """As plain numbers; slots are 1, 2, ... if not given."""
    slots = slots or list(range(1, shares.segments + 1))
    arrays = jnp.array(cu, jnp.int32), jnp.array(slots, jnp.int32)
    columns = np.asarray(compiled(shares, kernel)(*arrays)).tolist()
    return [work for work in (Work(*row) for row in zip(*columns, strict=True)) if has_rows(work)]


def has_rows(work: Work) -> bool:
    return bool(work.end > work.begin)


def shares_of(segments: int, span: int, first: int, reverse: bool = False) -> Cut:
    if not span:
        return whole(ROWS, segments)
    made = Cut(ROWS, segments, span, first, 0, reverse)
    return made._replace(windows=(ROWS - made.least) // span + 1)


@st.composite
def layouts(draw):
    """cu_seqlens of segments that are empty, short and long."""
    number = draw(st.sampled_from([1, 5, 8]))
    length = st.sampled_from([0, 1, 7, 33, 47, 48, 49, 64, 65, 130])
    lengths = draw(st.lists(length, min_size=number, max_size=number))
    return np.minimum(np.cumsum([0, *lengths]), ROWS).tolist()


SPANS = st.sampled_from([(0, 0), (32, 16), (64, 16), (64, 32)])


@settings(max_examples=200, deadline=None)
@given(layouts(), SPANS, st.booleans(), st.data())
def test_every_row_is_in_one_piece(cu, span_and_first, reverse, data):
    """Of either kernel, NULL segments in the second one alone."""
    span, first = span_and_first
    segments = len(cu) - 1
    shares = shares_of(segments, span, first, reverse)
    null = data.draw(st.lists(st.booleans(), min_size=segments, max_size=segments))
    slots = [0 if is_null else i + 1 for i, is_null in enumerate(null)]
    begun = [w for w in work_of(shares, cu, 1, slots) if w.piece == 0 and w.slot]
    owners = Counter()
    bounds = list(zip(cu, [*cu[1:], ROWS], strict=True))
    for work in [*begun, *work_of(shares, cu, 2, slots)]:
        first_row, last_row = bounds[work.segment]
        length = last_row - first_row
        assert first_row <= work.begin < work.end <= last_row
        assert work.start % 8 == 0
        assert work.begin - 8 < work.start <= work.begin
        assert work.slot == [*slots, 0][work.segment]
        is_cut = span and 2 * length > 3 * span
        assert (work.pieces > 1) == bool(is_cut)
        if is_cut:
            check_length(shares, work, first_row, last_row)
        owners.update(range(work.begin, work.end))
    assert owners == Counter(range(ROWS))


def check_length(shares: Cut, work: Work, first_row: int, last_row: int) -> None:
    """Of a piece of a cut segment: those between the cuts have exactly a span."""
    rows = work.end - work.begin
    at = last_row - work.end if shares.reverse else work.begin - first_row
    if work.piece == 0:
        assert at == 0
        assert shares.first - 8 < rows <= shares.first
    elif work.piece < work.pieces - 1:
        assert rows == shares.span
    else:
        assert shares.least - 8 < rows < shares.least + shares.span
    if work.piece:
        assert 0 <= shares.first + (work.piece - 1) * shares.span - at < 8


@settings(max_examples=200, deadline=None)
@given(layouts(), SPANS.filter(all), st.booleans())
def test_what_pieces_hand_over_has_places_of_its_own(cu, span_and_first, reverse):
    """Each piece that another follows hands over once, where those behind it look for it."""
    shares = shares_of(len(cu) - 1, *span_and_first, reverse)
    stored = {}
    for work in work_of(shares, cu, 1):
        place = handed_over(work, work.piece)
        assert 0 <= place < shares.windows
        assert place not in stored
        stored[place] = work.segment, work.piece
    looked_for = {}
    for work in work_of(shares, cu, 2):
        for piece in range(work.piece):
            looked_for[handed_over(work, piece)] = work.segment, piece
    assert looked_for == stored


def test_what_is_cut():
    """By static sizes: spans for the blocks wanted, none where they are there without."""
    assert cut(8_192, 1, 32, 128, 132, 0.5) == Cut(8_192, 1, 1_792, 1_024, 5)
    # A long prompt may be one of many: the room for others does not matter.
    assert cut(8_192, 33, 32, 128, 132, 0.5) == Cut(8_192, 33, 1_792, 1_024, 5)
    # A longer first piece would keep the others waiting.
    assert cut(32_768, 1, 32, 128, 132, 0.5)[2:4] == (57 * 128, 28 * 128)
    assert cut(8_192, 1, 128, 128, 132, 0.5).windows == 0
    # Two pieces would run one after the other.
    assert cut(8_192, 1, 96, 128, 132, 0.5).windows == 0
    # Two chunks are not worth it.
    assert cut(1_024, 1, 2, 128, 132, 0.5).span == 512
    assert cut(768, 1, 2, 128, 132, 0.5).windows == 0
    assert cut(0, 1, 2, 16, 132, 0.25).items == 2


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7, 8, 15, 16, 17, 65_536])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_search_ends_at_either_side(segments, reverse):
    """The cuts of a last and of a first segment, between only empty ones."""
    shares = Cut(104, segments, 32, 16, 3, reverse)
    pieces = [(0, 16), (16, 48), (48, 100)]
    if reverse:
        pieces = [(88, 100), (56, 88), (24, 56), (0, 24)]
    for number in (0, segments - 1):
        cu = [0] * (number + 1) + [100] * (segments - number)
        of_first = [(w.segment, w.begin, w.end) for w in work_of(shares, cu, 1)]
        of_second = [(w.segment, w.begin, w.end) for w in work_of(shares, cu) if w.slot]
        assert of_first == [(number, *rows) for rows in pieces[:-1]]
        assert of_second == [(number, *rows) for rows in pieces[1:]]
