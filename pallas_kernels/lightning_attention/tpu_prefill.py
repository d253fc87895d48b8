"""Prefill on a TPU: one pass over q, k and v, a segment's state on chip from first to last chunk.

A program does one block of heads and walks over all segments, chunk by chunk from each segment's
own first row (`tpu_chunks` has a chunk's arithmetic). Three kinds of copies are under way beside
the arithmetic: rows of the next chunk come in, rows of the last one go out (two buffers each), and
the slot of the next segment comes in while that of the last one goes out. A chunk that is not full
moves exactly its rows, in pieces of a power of two, so that segments may begin and end anywhere.
Segments that name NULL, and the rows behind the last segment, are walked over too and given zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import tpu_blocks
from pallas_kernels.lightning_attention.tpu_blocks import PrefillBlocks
from pallas_kernels.lightning_attention.tpu_chunks import (
    Heads,
    Ref,
    Rows,
    Scalar,
    fold_chunk,
    split_heads,
    tabulate,
)


class Slots(NamedTuple):
    """Buffers of a slot's block of heads, [n, K, V] in the pool's dtype."""

    entering: Ref
    leaving: Ref


class Semaphores(NamedTuple):
    """Rows in and out, one a buffer, and the slot's two copies."""

    rows_in: Ref
    rows_out: Ref
    slot: Ref


def supports(q, k, v, log_decay, state) -> str | None:
    """Why this call can't run, or None; arguments as of `api.lightning_prefill`."""
    return tpu_blocks.refusal(q, v, state) or tpu_blocks.prefill_blocks(q, v, state).refusal


def lightning_prefill(*arrays: jax.Array, chunk_size: int, **keywords: Any):
    """See `api.lightning_prefill`; chunks of the kernel's own size."""
    q, _, v, _, state = arrays
    return in_chunks(*arrays, chunk_size=tpu_blocks.prefill_blocks(q, v, state).chunk, **keywords)


def in_chunks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    cu_seqlens: jax.Array,
    is_fresh: jax.Array,
    scale: float,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_prefill`; chunks of `chunk_size` tokens, so it is the exact form too."""
    _, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    blocks = tpu_blocks.prefill_blocks(q, v, state, chunk_size)
    heads, chunk = blocks.heads, blocks.chunk
    in_place = pl.BlockSpec(memory_space=pl.ANY)

    def rows(width: int, dtype: jnp.dtype) -> Any:
        return pltpu.VMEM((2, chunk, heads, width), dtype)

    def by_head(height: int, width: int, dtype: Any = jnp.float32) -> Any:
        return pltpu.VMEM((heads, height, width), dtype)

    # One array for both, because scalar memory is small: a fresh segment's slot is negative.
    signed_slots = jnp.where(is_fresh, -slots, slots)
    o, state = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_heads // heads,),
            in_specs=[in_place] * 4,
            out_specs=[in_place] * 2,
            scratch_shapes=[
                Rows(rows(key_dim, q.dtype), rows(key_dim, q.dtype), rows(value_dim, v.dtype),
                     rows(value_dim, v.dtype)),
                Heads(by_head(chunk, key_dim, q.dtype), by_head(chunk, key_dim, q.dtype),
                      by_head(chunk, value_dim, v.dtype), by_head(chunk, value_dim, v.dtype),
                      by_head(chunk, chunk), by_head(chunk, value_dim),
                      by_head(key_dim, value_dim)),
                Slots(*[by_head(key_dim, value_dim, state.dtype)] * 2),
                Semaphores(*[pltpu.SemaphoreType.DMA((2,))] * 3),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ],
        input_output_aliases={6: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tpu_blocks.VMEM_LIMIT
        ),
        cost_estimate=cost(q, v, state, slots.shape[0], blocks),
        name="lightning_prefill",
    )(signed_slots, cu_seqlens, log_decay, q, k, v, state)  # fmt: skip
    return o, state


def cost(
    q: jax.Array, v: jax.Array, state: jax.Array, num_segments: int, blocks: PrefillBlocks
) -> pl.CostEstimate:
    """What a call whose segments fill its rows and go on from their slots computes and moves."""
    num_rows, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    slot = num_heads * key_dim * value_dim
    within = num_rows * num_heads * blocks.chunk * (key_dim + value_dim)
    rows = 2 * q.size * q.dtype.itemsize + 2 * v.size * v.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * within + 4 * num_rows * slot,
        bytes_accessed=rows + 2 * num_segments * slot * state.dtype.itemsize,
        transcendentals=num_heads * (blocks.chunk * (blocks.chunk + value_dim) + num_rows),
    )


def _kernel(
    slots: Ref,
    cu_seqlens: Ref,
    log_decay: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    _: Ref,
    o: Ref,
    state: Ref,
    rows: Rows,
    heads: Heads,
    slot_buffers: Slots,
    done: Semaphores,
    *,
    blocks: PrefillBlocks,
    scale: float,
) -> None:
    chunk = blocks.chunk
    num_segments, num_rows = slots.shape[0], q.shape[0]
    # All heads at once begin at a plain 0: another number need not be a multiple of a tile.
    one_block = q.shape[1] == blocks.heads
    first_head = 0 if one_block else pl.multiple_of(pl.program_id(0) * blocks.heads, blocks.heads)
    block = pl.ds(first_head, blocks.heads)

    # Behind the last segment stands one more, of all rows that are left: it names NULL.
    def signed_slot(segment):
        found = slots[jnp.minimum(segment, num_segments - 1)]
        return jnp.where(segment < num_segments, found, 0)

    def end(segment):
        found = cu_seqlens[jnp.minimum(segment + 1, num_segments)]
        return jnp.where(segment < num_segments, found, num_rows)

    def seek(segment):
        """The first segment from this one on that has rows; num_segments + 1: none."""

        def is_empty(p):
            exists = p <= num_segments
            return exists & (cu_seqlens[jnp.minimum(p, num_segments)] >= end(p))

        return lax.while_loop(is_empty, lambda p: p + 1, segment)

    def copy_in(row, count, buffer, act):
        def piece(offset, size):
            here, there = pl.ds(offset, size), pl.ds(row + offset, size)
            for packed, into in ((q, rows.q), (k, rows.k), (v, rows.v)):
                source, target = packed.at[there, block], into.at[buffer, here]
                act(pltpu.make_async_copy(source, target, done.rows_in.at[buffer]))

        _in_pieces(count, chunk, num_rows, piece)

    def copy_out(row, count, buffer, act):
        def piece(offset, size):
            source = rows.o.at[buffer, pl.ds(offset, size)]
            target = o.at[pl.ds(row + offset, size), block]
            act(pltpu.make_async_copy(source, target, done.rows_out.at[buffer]))

        _in_pieces(count, chunk, num_rows, piece)

    def load(segment):
        slot = state.at[jnp.abs(signed_slot(segment)), block]
        return pltpu.make_async_copy(slot, slot_buffers.entering, done.slot.at[0])

    def store(segment):
        slot = state.at[jnp.abs(signed_slot(segment)), block]
        return pltpu.make_async_copy(slot_buffers.leaving, slot, done.slot.at[1])

    def prefetch(segment, row, buffer):
        signed = signed_slot(segment)
        is_first = row == cu_seqlens[jnp.minimum(segment, num_segments)]

        @pl.when(signed != 0)
        def _():
            copy_in(row, jnp.minimum(chunk, end(segment) - row), buffer, _start)

        @pl.when(is_first & (signed > 0))
        def _():
            load(segment).start()

    def take_in(segment, row, count, buffer):
        copy_in(row, count, buffer, _wait)
        is_first = row == cu_seqlens[segment]
        goes_on = signed_slot(segment) > 0

        @pl.when(is_first & goes_on)
        def _():
            load(segment).wait()
            heads.state[...] = slot_buffers.entering[...].astype(jnp.float32)

        @pl.when(is_first & jnp.logical_not(goes_on))
        def _():
            # What the slot held is not read: it may be NaN.
            heads.state[...] = jnp.zeros_like(heads.state)

    def finish(segment, row, count, buffer, stored):
        split_heads(rows, heads, count, buffer)
        fold_chunk(heads, log_decay, first_head, count)
        rows.o[buffer] = jnp.swapaxes(heads.o[...], 0, 1)

        @pl.when(row + count == end(segment))
        def _():
            @pl.when(stored > 0)
            def _():
                store(segment).wait()

            slot_buffers.leaving[...] = heads.state[...].astype(state.dtype)
            store(segment).start()

    def one_chunk(carry):
        i, segment, row, last, before_last, stored = carry
        buffer = lax.rem(i, 2)
        count = jnp.minimum(chunk, end(segment) - row)
        runs = signed_slot(segment) != 0
        is_last = row + count == end(segment)
        following = lax.cond(is_last, lambda: seek(segment + 1), lambda: segment)
        following_row = jnp.where(
            is_last, cu_seqlens[jnp.minimum(following, num_segments)], row + chunk
        )

        @pl.when(runs)
        def _():
            take_in(segment, row, count, buffer)

        # The other buffer's rows were used by the chunk before this one, and `entering` has just
        # been emptied.
        prefetch(following, following_row, 1 - buffer)
        # This buffer's results left two chunks ago.
        copy_out(0, before_last, buffer, _wait)

        @pl.when(runs)
        def _():
            finish(segment, row, count, buffer, stored)

        @pl.when(jnp.logical_not(runs))
        def _():
            rows.o[buffer] = jnp.zeros_like(rows.o[buffer])

        copy_out(row, count, buffer, _start)
        stored = jnp.where(runs & is_last, 1, stored)
        return i + 1, following, following_row, count, last, stored

    tabulate(heads, log_decay, first_head, scale)
    begin = seek(jnp.int32(0))
    first_row = cu_seqlens[jnp.minimum(begin, num_segments)]
    prefetch(begin, first_row, 0)
    zero = jnp.int32(0)
    i, _, _, last, before_last, stored = lax.while_loop(
        lambda carry: carry[1] <= num_segments,
        one_chunk,
        (zero, begin, first_row, zero, zero, zero),
    )
    # Two chunks' results and one slot may still be on their way.
    copy_out(0, before_last, lax.rem(i, 2), _wait)
    copy_out(0, last, lax.rem(i + 1, 2), _wait)

    @pl.when(stored > 0)
    def _():
        store(begin).wait()


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()


def _in_pieces(
    count: jax.Array, chunk: int, num_rows: int, piece: Callable[[Scalar, int], None]
) -> None:
    """piece(offset, size) for rows 0 to `count`: all `chunk` at once, else powers of two.

    No copy larger than the call's `num_rows` is made: no chunk has as many.
    """
    if chunk <= num_rows:

        @pl.when(count == chunk)
        def _():
            piece(0, chunk)

    @pl.when(count < chunk)
    def _():
        # Copies have static sizes: the binary digits of the count, the largest first.
        for digit in reversed(range((chunk - 1).bit_length())):
            size = 1 << digit
            if size > num_rows:
                continue

            @pl.when((count & size) != 0)
            def _(size=size):
                piece(count & -(2 * size), size)
