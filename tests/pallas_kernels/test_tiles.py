"""Tiles against a loop over segments: every row in one tile, no tile in two segments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_bits, normal, poison

from pallas_kernels import tiles as tiles_module
from pallas_kernels.lightning_attention import xla
from pallas_kernels.paged_softmax import attend
from pallas_kernels.tiles import Tiles, fold_used, put_rows, take_rows, tile_segments

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


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_a_fold_sees_every_used_tile_once_and_in_order(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(tiles_module, "_TILES_AT_ONCE", {})
    monkeypatch.setattr(tiles_module, "_TILES_AT_ONCE_ELSEWHERE", at_once)
    size = 4

    @jax.jit
    def seen(cu_seqlens: jax.Array) -> jax.Array:
        tiles = tile_segments(cu_seqlens, NUM_ROWS, size)

        def note(first: jax.Array, here: Tiles, carry: tuple[jax.Array, jax.Array]):
            log, calls = carry
            about = [here.segment, here.rows[:, 0], here.length, here.is_first]
            number = first + jnp.arange(here.length.shape[0])
            return log.at[number].set(jnp.stack(about, 1), mode="drop"), calls + 1

        log = jnp.full((tiles.length.shape[0], 4), -1, jnp.int32)
        return fold_used(note, tiles, (log, jnp.int32(0)))

    for lengths in lengths_to_try(rng, size):
        log, calls = seen(offsets(lengths))
        want = expected_tiles(lengths, size)
        got = np.asarray(log)[: len(want)].tolist()
        assert got == [list(map(int, tile)) for tile in want]
        # Beyond them nothing but the unused ones of the last few.
        some = min(at_once, log.shape[0])
        assert calls == -(-len(want) // some)
        assert set(np.asarray(log)[len(want) :, 2].tolist()) <= {0, -1}


@pytest.mark.parametrize("at_once", [2, 16])
def test_how_many_tiles_go_together_does_not_matter(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Of lightning attention and of attention over pages, as other platforms run them."""
    heads, key_dim, value_dim, page_size = 3, 5, 7, 8
    cu_seqlens = offsets([0, 150, 3, 64, 0, 66])
    rows, segments = int(cu_seqlens[-1]) + 5, len(cu_seqlens) - 1
    q, k = (normal(rng, (rows, heads, key_dim), "float32") for _ in range(2))
    v, state = (
        normal(rng, shape, "float32")
        for shape in ((rows, heads, value_dim), (9, heads, key_dim, value_dim))
    )
    slots = np.array([3, 1, 8, 0, 2, 5], np.int32)
    log_decay = -np.linspace(0.01, 2, heads, dtype=np.float32)
    pages_of = 1 + np.arange(segments * 24, dtype=np.int32).reshape(segments, 24)
    pages = normal(rng, (segments * 24 + 1, page_size, 4 + value_dim), "float32")
    query = normal(rng, (rows, 1, heads, 4), "float32")
    contexts = np.array([0, 9, 40, 0, 7, 1], np.int32)

    arrays = [q, k, v, log_decay, state, query, pages, slots, cu_seqlens, pages_of, contexts]

    def both():
        @jax.jit
        def run(q, k, v, log_decay, state, query, pages, slots, cu_seqlens, pages_of, contexts):
            lightning = xla.lightning_prefill(
                q, k, v, log_decay, state, slots=slots, cu_seqlens=cu_seqlens,
                is_fresh=jnp.arange(segments) % 2 == 0, scale=0.3, chunk_size=16,
            )  # fmt: skip
            softmax = attend(
                query, pages, lambda x: (x[:, :, None, :4], x[:, :, None, 4:]),
                page_table=pages_of, context_lengths=contexts, cu_seqlens=cu_seqlens, scale=0.5,
            )  # fmt: skip
            return *lightning, softmax

        return run(*arrays)

    monkeypatch.setattr(tiles_module, "_TILES_AT_ONCE", {})
    monkeypatch.setattr(tiles_module, "_TILES_AT_ONCE_ELSEWHERE", 1)
    want = both()
    monkeypatch.setattr(tiles_module, "_TILES_AT_ONCE_ELSEWHERE", at_once)
    for got, alone in zip(both(), want, strict=True):
        np.testing.assert_allclose(got, alone, rtol=1e-6, atol=1e-6)
