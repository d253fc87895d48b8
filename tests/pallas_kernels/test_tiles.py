"""Tiles against a loop over segments: every row in one tile, no tile in two segments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_bits, normal, poison

from pallas_kernels.tiles import Tiles, put_rows, take_rows, tile_segments

NUM_ROWS, NUM_SEGMENTS = 29, 6


@functools.partial(jax.jit, static_argnames=("num_rows", "size"))
def tile(cu_seqlens, num_rows, size):
    return tile_segments(cu_seqlens, num_rows, size)


@functools.partial(jax.jit, static_argnames="size")
def take_and_put(x, cu_seqlens, size):
    tiles = tile_segments(cu_seqlens, x.shape[0], size)
    taken = take_rows(x, tiles)
    # What a kernel leaves in rows that do not exist is arbitrary.
    left = jnp.where(tiles.valid[:, :, None], taken, jnp.nan)
    return taken, put_rows(left, tiles)


def lengths_to_try(rng: np.random.Generator, size: int) -> list[list[int]]:
    """Empty ones everywhere, the most tiles there can be, and random ones."""
    some = [
        [0] * NUM_SEGMENTS,
        [NUM_ROWS, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, NUM_ROWS],
        [1] * NUM_SEGMENTS,
        [0, size, 0, 0, 1, 0],
    ]
    while len(some) < 12:
        cuts = np.sort(rng.integers(0, NUM_ROWS + 1, NUM_SEGMENTS))
        some.append(np.diff(cuts, prepend=0).tolist())
    # One row more than full tiles in each segment fills the bound.
    worst, left = [], NUM_ROWS
    for _ in range(NUM_SEGMENTS):
        worst.append(min(left, size + 1 if left > size + NUM_SEGMENTS else 1))
        left -= worst[-1]
    return [x for x in [*some, worst] if sum(x) <= NUM_ROWS]


def offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def expected_tiles(lengths: list[int], size: int) -> list[tuple[int, int, int, bool]]:
    """Segment, first row, rows and whether it is the segment's first, tile by tile."""
    tiles, start = [], 0
    for segment, length in enumerate(lengths):
        for at in range(0, length, size):
            tiles.append((segment, start + at, min(size, length - at), at == 0))
        start += length
    return tiles


@pytest.mark.parametrize("size", [1, 2, 4, 7, 64])
def test_r046_tiles_are_those_of_a_loop(rng, size):
    for lengths in lengths_to_try(rng, size):
        tiles: Tiles = jax.tree.map(np.asarray, tile(offsets(lengths), NUM_ROWS, size))
        want = expected_tiles(lengths, size)
        bound = max(1, (NUM_ROWS + NUM_SEGMENTS * (size - 1)) // size)
        assert len(tiles.length) == bound
        assert len(want) <= bound
        for i, (segment, first, length, opens) in enumerate(want):
            assert tiles.segment[i] == segment
            assert tiles.length[i] == length
            assert tiles.is_first[i] == opens
            assert tiles.valid[i].tolist() == [j < length for j in range(size)]
            assert tiles.rows[i, :length].tolist() == list(range(first, first + length))
        unused = slice(len(want), None)
        assert not tiles.length[unused].any()
        assert not tiles.valid[unused].any()
        assert not tiles.is_first[unused].any()
        # Indices of rows that do not exist stay in range as well: reads promise it.
        assert tiles.rows.min() >= 0
        assert tiles.rows.max() < NUM_ROWS
        assert tiles.segment.max() < NUM_SEGMENTS
        for segment, length in enumerate(lengths):
            if length:
                last = max(i for i, t in enumerate(want) if t[0] == segment)
                assert tiles.last_tile[segment] == last


@pytest.mark.parametrize("size", [4, 64])
def test_r040_rows_go_to_tiles_and_back(rng, size):
    """NaN rows beyond the segments never reach a tile, nor what tiles hold there the rows."""
    for lengths in lengths_to_try(rng, size):
        used = sum(lengths)
        x = poison(rng, (NUM_ROWS, 3), "float32")
        x[:used] = normal(rng, (used, 3), "float32")
        taken, back = take_and_put(x, offsets(lengths), size)
        assert np.isfinite(taken).all()
        assert_same_bits(back[:used], x[:used])
        assert (np.asarray(back[used:]) == 0).all()


def test_r046_tiles_do_not_depend_on_neighbours(rng):
    """A segment's tiles hold the same rows of it whatever stands in front."""
    x = normal(rng, (NUM_ROWS, 3), "float32")
    mine = x[:10]
    alone, _ = take_and_put(x, offsets([10, 0, 0, 0, 0, 0]), 4)
    for before in (1, 2, 3, 4, 5, 19):
        moved = np.concatenate([x[10 : 10 + before], mine, x[10 + before :]])
        tiles, _ = take_and_put(moved, offsets([before, 0, 10, 0, 0, 0]), 4)
        start = -(-before // 4)
        assert_same_bits(tiles[start : start + 3], alone[:3])
