"""One packed step: decode rows first, each region with its own slots, padding naming NULL only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bailing_jax.batch import BatchLayout, pack, stack
from bailing_jax.row import Row

SIZES: dict[str, int] = {
    "num_decode": 4,
    "num_prefill": 9,
    "num_segments": 3,
    "page_size": 5,
    "pages_a_sequence": 6,
}


def row(tokens: Sequence[int], slot: int, context: int = 0, pages: int | None = None) -> Row:
    """A row with pages of its own, as many as it needs unless told."""
    need = -(-(context + len(tokens)) // SIZES["page_size"])
    count = need if pages is None else pages
    return Row(tokens, slot, range(10 * slot + 1, 10 * slot + 1 + count), context)


def lay(decodes: Sequence[Row] = (), segments: Sequence[Row] = (), **sizes: int) -> BatchLayout:
    return pack(decodes, segments, **{**SIZES, **sizes})


DECODES = [row([71], 3, context=6), row([72], 1, context=1)]
SEGMENTS = [row([80, 81, 82, 83], 5, context=12), row([], 6, context=7), row([90, 91], 2)]


# ---- what lies where


def test_r010_decode_rows_come_first_and_padding_is_null() -> None:
    layout = lay(DECODES, SEGMENTS)
    got = {field.name: getattr(layout, field.name).tolist() for field in dataclasses.fields(layout)}
    nothing = [0] * 6
    assert got == {
        "tokens": [71, 72, 0, 0, 80, 81, 82, 83, 90, 91, 0, 0, 0],
        "positions": [6, 1, 0, 0, 12, 13, 14, 15, 0, 1, 0, 0, 0],
        "decode_slots": [3, 1, 0, 0],
        "decode_pages": [[31, 32, 0, 0, 0, 0], [11, 0, 0, 0, 0, 0], nothing, nothing],
        "decode_contexts": [6, 1, 0, 0],
        "segment_slots": [5, 6, 2],
        "segment_pages": [[51, 52, 53, 54, 0, 0], [61, 62, 0, 0, 0, 0], [21, 0, 0, 0, 0, 0]],
        "segment_contexts": [12, 7, 0],
        "cu_seqlens": [0, 4, 4, 6],
        "is_fresh": [False, False, True],
        "logit_rows": [0, 1, 0, 0, 7, 7, 9],
    }
    for field in dataclasses.fields(layout):
        want = bool if field.name == "is_fresh" else np.int32
        assert getattr(layout, field.name).dtype == want, field.name
    assert (layout.num_decode, layout.num_prefill) == (4, 9)


def test_layouts_of_several_shards_stack_array_by_array() -> None:
    layouts = [lay(DECODES, SEGMENTS), lay(), lay(DECODES[:1])]
    stacked = stack(layouts)
    assert (stacked.num_decode, stacked.num_prefill) == (4, 9)
    for field in dataclasses.fields(stacked):
        array = getattr(stacked, field.name)
        assert isinstance(array, np.ndarray)
        for shard, layout in enumerate(layouts):
            np.testing.assert_array_equal(array[shard], getattr(layout, field.name))
            assert array.dtype == getattr(layout, field.name).dtype


def test_layouts_of_different_sizes_do_not_stack() -> None:
    with pytest.raises(ValueError, match="shape"):
        stack([lay(), lay(num_prefill=10)])


def test_regions_carry_their_own_slots_and_pages() -> None:
    layout = lay(DECODES, SEGMENTS)
    decode, prefill = layout.decode_region(), layout.prefill_region()
    assert decode.slots is layout.decode_slots
    assert decode.page_table is layout.decode_pages
    assert decode.context_lengths is layout.decode_contexts
    assert decode.cu_seqlens is None
    assert decode.is_fresh is None
    assert prefill.slots is layout.segment_slots
    assert prefill.page_table is layout.segment_pages
    assert prefill.context_lengths is layout.segment_contexts
    assert prefill.cu_seqlens is layout.cu_seqlens
    assert prefill.is_fresh is layout.is_fresh


def test_r012_a_one_token_first_chunk_is_a_segment() -> None:
    """Decode means "has state and one new token", never "one token"."""
    first = row([70], 4, context=0)
    with pytest.raises(ValueError, match="a decode row has state and one new token"):
        lay([first])
    layout = lay(DECODES, [first])
    assert layout.decode_slots.tolist() == [3, 1, 0, 0]
    assert layout.segment_slots.tolist() == [4, 0, 0]
    assert layout.is_fresh.tolist() == [True, False, False]
    assert layout.cu_seqlens.tolist() == [0, 1, 1, 1]


def test_r016_fresh_means_no_token_before() -> None:
    segments = [row([80], 1, context=0), row([81], 2, context=1), row([], 3, context=0)]
    assert lay(segments=segments).is_fresh.tolist() == [True, False, True]


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_zero_length_segment_takes_no_row(last: int) -> None:
    segments = [row([80, 81], 1), row([82], 2), row([83, 84, 85], 4)]
    segments[last] = dataclasses.replace(segments[last], tokens=[])
    layout = lay(segments=segments)
    lengths = [len(segment.tokens) for segment in segments]
    assert np.diff(layout.cu_seqlens).tolist() == lengths
    tokens = [token for segment in segments for token in segment.tokens]
    assert layout.tokens[4 : 4 + sum(lengths)].tolist() == tokens
    assert layout.exists().tolist() == [False] * 4 + [i < sum(lengths) for i in range(9)]
    assert layout.segment_slots.tolist() == [1, 2, 4]


def test_nothing_but_zero_length_segments() -> None:
    layout = lay(segments=[row([], 1), row([], 2, context=5)], num_decode=0)
    assert layout.cu_seqlens.tolist() == [0, 0, 0, 0]
    assert not layout.exists().any()
    assert (layout.logit_rows == 0).all()  # in range, though nobody asks


def test_a_step_may_lack_either_region() -> None:
    only_decode = lay(DECODES, num_prefill=0, num_segments=0)
    assert (only_decode.num_decode, only_decode.num_prefill) == (4, 0)
    assert only_decode.exists().tolist() == [True, True, False, False]
    assert only_decode.prefill_rows(only_decode.tokens).shape == (0,)
    only_prefill = lay(segments=SEGMENTS, num_decode=0)
    assert only_prefill.decode_rows(only_prefill.tokens).shape == (0,)
    assert only_prefill.logit_rows.tolist() == [3, 3, 5]


def test_a_full_step_has_no_padding() -> None:
    decodes = [row([70 + i], 1 + i, context=4) for i in range(4)]
    segments = [row([80] * n, 5 + i, context=i) for i, n in enumerate((2, 3, 4))]
    layout = lay(decodes, segments)
    assert layout.exists().all()
    assert (np.concatenate([layout.decode_slots, layout.segment_slots]) > 0).all()


def test_a_table_may_be_full() -> None:
    layout = lay([row([70], 2, context=29)])
    assert layout.decode_pages[0].tolist() == [21, 22, 23, 24, 25, 26]


# ---- refusals

REFUSED: dict[str, tuple[list[Row], list[Row], str]] = {
    "slot shared by two decode rows": ([row([1], 2, 3), row([2], 2, 3)], [], "slots of a step"),
    "slot shared across regions": ([row([1], 2, 3)], [row([1], 2)], "slots of a step"),
    "slot shared by segments": ([], [row([1], 2), row([1], 2)], "slots of a step"),
    "NULL slot decodes": ([Row([1], 0, [7], 3)], [], "slots of a step"),
    "NULL slot of a segment": ([], [Row([1], 0, [7], 0)], "slots of a step"),
    "negative slot": ([], [Row([1], -1, [7], 0)], "slots of a step"),
    "page shared across regions": ([Row([1], 2, [7], 3)], [Row([1], 3, [7], 0)], "pages of a step"),
    "page twice in a table": ([Row([1], 2, [7, 7], 6)], [], "pages of a step"),
    "NULL page": ([Row([1], 2, [0], 3)], [], "pages of a step"),
    "too few pages to decode": ([row([1], 2, context=5, pages=1)], [], "1 pages, needs 2"),
    "too few pages for a segment": ([], [row([1] * 6, 2, pages=1)], "1 pages, needs 2"),
    "a table too narrow": ([row([1], 2, context=3, pages=7)], [], "7 pages, needs 1, at most 6"),
    "decode without state": ([row([1], 2, context=0)], [], "got context 0 and 1 tokens"),
    "negative context": ([], [row([1] * 3, 2, context=-2)], "context -2 < 0"),
    "decode of two tokens": ([row([1, 2], 2, context=3)], [], "got context 3 and 2 tokens"),
    "decode of no token": ([row([], 2, context=3)], [], "got context 3 and 0 tokens"),
    "too many decode rows": ([row([1], i, context=3) for i in range(1, 6)], [], "5 decode rows"),
    "too many prefill rows": ([], [row([1] * 5, 1), row([1] * 5, 2)], "10 prefill tokens"),
    "too many segments": ([], [row([1], i) for i in range(1, 5)], "4 segments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_r022_what_cannot_be_laid_out_is_refused(name: str) -> None:
    decodes, segments, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        lay(decodes, segments)


# ---- laws of any step


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Row], list[Row], dict[str, int]]:
    """Any step that fits, with sizes at least as large as needed."""
    num_decode, num_segments = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    slots = draw(st.permutations(range(1, 12)))
    decodes = [
        row(
            draw(st.lists(st.integers(1, 99), min_size=1, max_size=1)),
            slot,
            draw(st.integers(1, 20)),
        )
        for slot in slots[:num_decode]
    ]
    segments = [
        row(draw(st.lists(st.integers(1, 99), max_size=7)), slot, draw(st.integers(0, 20)))
        for slot in slots[num_decode : num_decode + num_segments]
    ]
    tokens = sum(len(segment.tokens) for segment in segments)
    sizes = {
        "num_decode": num_decode + draw(st.integers(0, 3)),
        "num_prefill": tokens + draw(st.integers(0, 3)),
        "num_segments": num_segments + draw(st.integers(0, 3)),
    }
    return decodes, segments, sizes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps())
def test_r010_every_sequence_finds_its_own_rows(
    step: tuple[list[Row], list[Row], dict[str, int]],
) -> None:
    """Unpacked by the regions alone, a step gives back what went in; the rest names NULL."""
    decodes, segments, sizes = step
    layout = lay(decodes, segments, **sizes)
    exists = np.asarray(layout.exists())
    assert exists.sum() == len(decodes) + sum(len(s.tokens) for s in segments)

    def unpack(array: Any) -> list[list[int]]:
        rows = [[int(value)] for value in layout.decode_rows(array)[: len(decodes)]]
        prefill, cu = layout.prefill_rows(array), layout.prefill_region().cu_seqlens
        assert cu is not None
        return rows + [prefill[cu[i] : cu[i + 1]].tolist() for i in range(len(segments))]

    everyone = [*decodes, *segments]
    assert unpack(layout.tokens) == [list(r.tokens) for r in everyone]
    assert unpack(layout.positions) == [
        [r.context + i for i in range(len(r.tokens))] for r in everyone
    ]
    assert all(all(mine) for mine in unpack(exists))
    for region, rows in ((layout.decode_region(), decodes), (layout.prefill_region(), segments)):
        padding = len(region.slots) - len(rows)
        width = SIZES["pages_a_sequence"]
        tables = [[*r.pages, *[0] * (width - len(r.pages))] for r in rows]
        assert region.slots.tolist() == [r.slot for r in rows] + [0] * padding
        assert region.context_lengths.tolist() == [r.context for r in rows] + [0] * padding
        assert region.page_table.tolist() == tables + [[0] * width] * padding
    last = [layout.logit_rows[i] for i in range(len(decodes))]
    last += [layout.logit_rows[layout.num_decode + i] for i in range(len(segments))]
    for found, mine in zip(last, everyone, strict=True):
        if mine.tokens:
            assert layout.tokens[found] == mine.tokens[-1]
            assert layout.positions[found] == mine.context + len(mine.tokens) - 1


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize(("decode", "prefill"), [(4, 9), (0, 9), (4, 0)])
def test_join_undoes_the_split(shape: tuple[int, ...], decode: int, prefill: int) -> None:
    layout = lay(num_decode=decode, num_prefill=prefill)
    x = np.random.default_rng(3).standard_normal((decode + prefill, *shape)).astype(np.float32)
    parts = layout.decode_rows(x), layout.prefill_rows(x)
    assert [len(part) for part in parts] == [decode, prefill]
    np.testing.assert_array_equal(layout.join(*parts), x)


def test_r014_a_layout_is_one_pytree_of_arrays() -> None:
    """Everything but the sizes is traced, so no step's slots are baked into a program."""
    layout = lay(DECODES, SEGMENTS)
    leaves, tree = jax.tree.flatten(layout)
    assert len(leaves) == len(dataclasses.fields(BatchLayout))
    traces = []

    @jax.jit
    def program(layout: BatchLayout) -> tuple[jax.Array, ...]:
        traces.append(1)
        return layout.decode_region().slots, layout.prefill_region().slots, layout.exists()

    for other in (layout, lay([row([7], 9, context=2)], [row([5], 8)])):
        assert jax.tree.structure(other) == tree
        got = program(other)
        np.testing.assert_array_equal(got[0], other.decode_slots)
        np.testing.assert_array_equal(got[1], other.segment_slots)
        np.testing.assert_array_equal(got[2], other.exists())
    assert len(traces) == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(steps())
def test_r039_padding_segments_begin_where_the_last_one_ends(
    step: tuple[list[Row], list[Row], dict[str, int]],
) -> None:
    """Bounds never fall, and what lies behind the real segments is of no length."""
    decodes, segments, sizes = step
    bounds = lay(decodes, segments, **sizes).cu_seqlens
    assert bounds[0] == 0
    assert (np.diff(bounds) >= 0).all()
    assert (bounds[len(segments) :] == sum(len(s.tokens) for s in segments)).all()


@pytest.mark.parametrize("decodes", [0, 1, 4])
@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1], [5]])
def test_r008_decode_rows_run_apart_from_segments(decodes: int, lengths: list[int]) -> None:
    """Whoever shares the step, a decode row goes where decode rows go and a segment does not."""
    own = DECODES + [row([73 + i], 7 + i, context=3) for i in range(2)]
    segments = [row([80] * n, 9 + i) for i, n in enumerate(lengths)]
    layout = lay(own[:decodes], segments)
    seen: list[tuple[bool, int, list[int]]] = []

    def run(region: Any, state: Any, x: Any) -> tuple[Any, Any]:
        seen.append((region.cu_seqlens is None, len(x), region.slots.tolist()))
        return x, state

    layout.by_region(run, np.zeros(1), np.asarray(layout.tokens))
    slots = [r.slot for r in own[:decodes]], [s.slot for s in segments]
    assert seen == [
        (True, 4, slots[0] + [0] * (4 - decodes)),
        (False, 9, slots[1] + [0] * (3 - len(lengths))),
    ]
