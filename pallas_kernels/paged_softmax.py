"""Softmax over pages, shared by grouped-query and latent attention: append rows, then attend.

Page 0 is NULL: sequences whose first page is 0 are padding, write nothing and get zeros. Keys
beyond a sequence's length are selected away before they meet a product, so freed pages may hold
anything, NaN included. Attention walks over fixed blocks of pages counted from token 0 with a
running maximum and sum, up to the longest sequence of the call.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum
from pallas_kernels.tiles import (
    Tiles,
    fold_used,
    num_places,
    put_rows,
    segment_of,
    take_rows,
    tile_segments,
)

BLOCK_TOKENS = 256
QUERY_TILE = 64
# Below every score, yet finite: -inf minus -inf would be NaN.
_LOWEST = -1e30

SplitKeysValues = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def append(
    pages: jax.Array,
    rows: jax.Array,
    *,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None,
) -> jax.Array:
    """Write new rows [T, ...] behind each sequence's context.

    Args:
        pages: [num_pages, page_size, ...].
        rows: one row a token.
        page_table: int32 [B, W].
        context_lengths: int32 [B], tokens already in the pages.
        cu_seqlens: int32 [B + 1] for packed segments, or None for one row a sequence.
    """
    num_rows, page_size = rows.shape[0], pages.shape[1]
    sequence, offset, exists = _locate(num_rows, page_table, cu_seqlens)
    position = context_lengths[sequence] + offset
    entry = jnp.clip(position // page_size, 0, page_table.shape[1] - 1)
    page = jnp.where(exists, page_table[sequence, entry], 0)
    within = jnp.where(exists, position % page_size, 0)
    # Padding rows rewrite what the NULL page's first row holds, all of them the same bits.
    mask = exists.reshape((-1,) + (1,) * (rows.ndim - 1))
    values = jnp.where(mask, rows.astype(pages.dtype), pages[0, 0])
    return pages.at[page, within].set(values, mode="promise_in_bounds")


def _locate(
    num_rows: int, page_table: jax.Array, cu_seqlens: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each row's sequence, its offset among the sequence's new rows, and whether it exists."""
    row = jnp.arange(num_rows, dtype=jnp.int32)
    if cu_seqlens is None:
        return row, jnp.zeros_like(row), page_table[:, 0] != 0
    sequence, inside = segment_of(row, cu_seqlens[1:])
    return sequence, row - cu_seqlens[sequence], inside & (page_table[sequence, 0] != 0)


def attend(
    q: jax.Array,
    pages: jax.Array,
    split: SplitKeysValues,
    *,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None,
    scale: float,
    fixed_blocks: bool = False,
) -> jax.Array:
    """Causal attention of new rows over their sequence's pages (the new rows included).

    Args:
        q: [T, Kh, G, H], the G query heads that share a key head.
        pages: [num_pages, page_size, ...].
        split: turns tokens [b, s, ...] of pages into keys [b, s, Kh, H], values [b, s, Kh, V].
        page_table: int32 [B, W].
        context_lengths: int32 [B], tokens before the new rows.
        cu_seqlens: int32 [B + 1], or None for one row a sequence.
        scale: factor of the scores.
        fixed_blocks: always walk in blocks of BLOCK_TOKENS, also where a table is narrower, so
            that the sums of a row do not depend on the table's width.

    Returns:
        float32 [T, Kh, G, V]; zero for rows that do not exist.
    """
    if fixed_blocks:
        missing = -page_table.shape[1] % max(1, BLOCK_TOKENS // pages.shape[1])
        page_table = jnp.pad(page_table, ((0, 0), (0, missing)))
    if cu_seqlens is None:
        exists = page_table[:, 0] != 0
        lengths = jnp.where(exists, context_lengths + 1, 0)
        o = _attend_tiles(q[:, None], pages, split, page_table, lengths, context_lengths, scale)
        return jnp.where(exists[:, None, None, None], o[:, 0], 0)
    tiles = tile_segments(cu_seqlens, q.shape[0], QUERY_TILE)

    def some_tiles(number: jax.Array, here: Tiles, o: jax.Array) -> jax.Array:
        table = page_table[here.segment]
        exists = (here.length > 0) & (table[:, 0] != 0)
        # A tile's first row stands behind the context and the tiles before it.
        first = context_lengths[here.segment] + here.rows[:, 0] - cu_seqlens[here.segment]
        lengths = jnp.where(exists, first + here.length, 0)
        part = _attend_tiles(take_rows(q, here), pages, split, table, lengths, first, scale)
        part = jnp.where(exists[:, None, None, None, None], part, 0)
        return jax.lax.dynamic_update_slice_in_dim(o, part, number, 0)

    value_dim = _value_dim(split, pages)
    shape = (num_places(tiles), QUERY_TILE, *q.shape[1:-1], value_dim)
    return put_rows(fold_used(some_tiles, tiles, jnp.zeros(shape, jnp.float32)), tiles)


def _value_dim(split: SplitKeysValues, pages: jax.Array) -> int:
    return jax.eval_shape(split, pages[:1])[1].shape[-1]


def _attend_tiles(
    q: jax.Array,
    pages: jax.Array,
    split: SplitKeysValues,
    page_table: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    scale: float,
) -> jax.Array:
    """Attention of tiles q [b, i, Kh, G, H] whose row i stands at position first + i."""
    page_size = pages.shape[1]
    pages_a_block = max(1, min(BLOCK_TOKENS // page_size, page_table.shape[1]))
    block = pages_a_block * page_size
    missing = -page_table.shape[1] % pages_a_block
    page_table = jnp.pad(page_table, ((0, 0), (0, missing)))
    query_position = first[:, None] + jnp.arange(q.shape[1])

    def step(number: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        highest, total, o = carry
        ids = jax.lax.dynamic_slice_in_dim(page_table, number * pages_a_block, pages_a_block, 1)
        tokens = pages[ids].reshape((q.shape[0], block, *pages.shape[2:]))
        position = number * block + jnp.arange(block)
        held = position < lengths[:, None]
        tokens = jnp.where(held.reshape(held.shape + (1,) * (tokens.ndim - 2)), tokens, 0)
        keys, values = split(tokens)
        seen = held[:, None, :] & (position <= query_position[:, :, None])
        seen = seen[:, None, None]
        scores = jnp.where(seen, scale * einsum("bikgh,bskh->bkgis", q, keys), _LOWEST)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_highest[..., None]), 0)
        shrink = jnp.exp(highest - new_highest)
        total = total * shrink + weights.sum(-1)
        weighted = einsum("bkgis,bskv->bkgiv", weights.astype(values.dtype), values)
        return new_highest, total, o * shrink[..., None] + weighted

    shape = (q.shape[0], q.shape[2], q.shape[3], q.shape[1])
    start = (
        jnp.full(shape, _LOWEST, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, _value_dim(split, pages)), jnp.float32),
    )
    num_blocks = -(-jnp.max(lengths, initial=0) // block)
    _, total, o = jax.lax.fori_loop(0, num_blocks, step, start)
    o = o / jnp.where(total > 0, total, 1)[..., None]
    return jnp.moveaxis(o, 3, 1)
