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
    beside_cut,
    cut,
    locate,
    stored_start,
    stored_sum,
    whole,
)

ROWS = 600


@functools.cache
def compiled(shares: Cut, behind: bool | None = None):
    """cu_seqlens -> the work of every item, or beside every cut."""
    slots = jnp.arange(1, shares.segments + 1)

    def work(item, cu):
        if behind is None:
            return locate(item, shares, cu, slots)
        return beside_cut(item + 1, shares, cu, slots, behind=behind)

    number = shares.items if behind is None else shares.windows
    return jax.jit(lambda cu: jax.vmap(lambda i: work(i, cu))(jnp.arange(number)))


def work_of(shares: Cut, cu: list[int], behind: bool | None = None) -> list[Work]:
    """As plain numbers."""
    columns = np.asarray(compiled(shares, behind)(jnp.array(cu, jnp.int32))).tolist()
    return [Work(*row) for row in zip(*columns, strict=True)]


def shares_of(segments: int, span: int) -> Cut:
    return Cut(ROWS, segments, span, (ROWS - 1) // span) if span else whole(ROWS, segments)


@st.composite
def layouts(draw):
    """cu_seqlens of segments that are empty, short and long."""
    number = draw(st.sampled_from([1, 5, 8]))
    length = st.sampled_from([0, 1, 7, 33, 47, 48, 49, 64, 65, 130])
    lengths = draw(st.lists(length, min_size=number, max_size=number))
    return np.minimum(np.cumsum([0, *lengths]), ROWS).tolist()


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from([0, 32, 64]))
def test_every_row_is_in_one_piece(cu, span):
    segments = len(cu) - 1
    shares = shares_of(segments, span)
    owners = Counter()
    bounds = list(zip(cu, [*cu[1:], ROWS], strict=True))
    for work in work_of(shares, cu):
        if work.end <= work.begin:
            continue
        first, last = bounds[work.segment]
        assert (work.first_row, work.last_row) == (first, last)
        assert first <= work.begin < work.end <= last
        assert work.start % 8 == 0
        assert work.begin - 8 < work.start <= work.begin
        assert work.slot == (0 if work.segment == segments else work.segment + 1)
        is_cut = span and 2 * (last - first) > 3 * span
        assert (work.pieces > 1) == is_cut
        # As many as there are, and each but the first `span` rows behind the one before it.
        assert work.pieces == (-(-(last - first // 8 * 8) // span) if is_cut else 1)
        assert work.start == first // 8 * 8 + work.piece * span
        owners.update(range(work.begin, work.end))
    assert owners == Counter(range(ROWS))


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from([32, 64]), st.booleans())
def test_what_pieces_add_has_places_of_its_own(cu, span, reverse):
    """Each piece that another follows is summed once, where those behind it look for it."""
    shares = shares_of(len(cu) - 1, span)
    beside = enumerate(work_of(shares, cu, behind=reverse))
    stored = {index: work for index, work in beside if work.end > work.begin}
    looked_for = {}
    for work in work_of(shares, cu):
        if work.end <= work.begin or work.pieces == 1:
            continue
        is_followed = work.piece > 0 if reverse else work.piece < work.pieces - 1
        if is_followed:
            looked_for[stored_sum(work, work.piece, reverse)] = work
        # By whichever of its pieces a segment's start is asked for, one place behind all sums.
        place = stored_start(shares, work)
        assert shares.windows <= place < shares.stored
        assert looked_for.setdefault(place, work).segment == work.segment
        first = 1 if reverse else 0
        summed = stored[place - shares.windows]
        assert (summed.segment, summed.piece) == (work.segment, first)
    sums = {i: work for i, work in looked_for.items() if i < shares.windows}
    assert sums == stored


def test_what_is_cut():
    """By static sizes: spans for the blocks wanted, none where they are there without."""
    assert cut(8_192, 1, 32, 128, 132) == Cut(8_192, 1, 2_048, 3)
    # A long prompt may be one of many: the room for others does not matter.
    assert cut(8_192, 33, 32, 128, 132) == Cut(8_192, 33, 2_048, 3)
    assert cut(8_192, 1, 128, 128, 132).windows == 0
    # Two chunks are not worth it.
    assert cut(1_024, 1, 2, 128, 132).span == 512
    assert cut(768, 1, 2, 128, 132).windows == 0
    assert cut(0, 1, 2, 16, 132).items == 2


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7, 8, 65_536])
def test_bisection_ends_at_either_side(segments):
    """The cut of a last and of a first segment, between only empty ones."""
    for number in (0, segments - 1):
        cu = [0] * (number + 1) + [100] * (segments - number)
        found = [w[1:2] + w[5:7] for w in work_of(Cut(100, segments, 32, 3), cu)[:3]]
        assert found == [(number, 32, 64), (number, 64, 96), (number, 96, 100)]
