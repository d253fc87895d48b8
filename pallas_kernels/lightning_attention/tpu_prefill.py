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


class Segments(NamedTuple):
    """The call's segments; behind the last stands one more, of all rows left, that names NULL."""

    slots: Ref  # a fresh segment's is negative
    cu_seqlens: Ref
    num_rows: int

    @property
    def number(self) -> int:
        """Without the one behind the last."""
        return self.slots.shape[0]

    def signed_slot(self, segment: Scalar) -> jax.Array:
        """Negative: of a fresh segment; 0: of one that names NULL."""
        found = self.slots[jnp.minimum(segment, self.number - 1)]
        return jnp.where(segment < self.number, found, 0)

    def begin(self, segment: Scalar) -> jax.Array:
        """Its first row."""
        return self.cu_seqlens[jnp.minimum(segment, self.number)]

    def end(self, segment: Scalar) -> jax.Array:
        """The row behind its last."""
        found = self.cu_seqlens[jnp.minimum(segment + 1, self.number)]
        return jnp.where(segment < self.number, found, self.num_rows)

    def seek(self, segment: jax.Array) -> jax.Array:
        """The first segment from this one on that has rows; number + 1: none."""

        def is_empty(p):
            return (p <= self.number) & (self.begin(p) >= self.end(p))

        return lax.while_loop(is_empty, lambda p: p + 1, segment)


class Copies(NamedTuple):
    """What lies in HBM, where its copies go, and when they are done; of one block of heads."""

    packed: Rows  # q, k, v and o as the call has them
    state: Ref
    rows: Rows
    slot_buffers: Slots
    done: Semaphores
    block: Any

    def rows_in(self, row: Scalar, count: Scalar, buffer: Scalar, act: Callable) -> None:
        """`act` on each copy of `count` rows into a buffer."""

        def piece(offset, size):
            here, there = pl.ds(offset, size), pl.ds(row + offset, size)
            for packed, into in zip(self.packed[:3], self.rows[:3], strict=True):
                source, target = packed.at[there, self.block], into.at[buffer, here]
                act(pltpu.make_async_copy(source, target, self.done.rows_in.at[buffer]))

        self._in_pieces(count, piece)

    def rows_out(self, row: Scalar, count: Scalar, buffer: Scalar, act: Callable) -> None:
        """`act` on each copy of `count` rows of results out of a buffer."""

        def piece(offset, size):
            source = self.rows.o.at[buffer, pl.ds(offset, size)]
            target = self.packed.o.at[pl.ds(row + offset, size), self.block]
            act(pltpu.make_async_copy(source, target, self.done.rows_out.at[buffer]))

        self._in_pieces(count, piece)

    def slot_in(self, slot: Scalar) -> Any:
        """The copy of a slot's state."""
        source = self.state.at[slot, self.block]
        return pltpu.make_async_copy(source, self.slot_buffers.entering, self.done.slot.at[0])

    def slot_out(self, slot: Scalar) -> Any:
        """The copy of a state into its slot."""
        target = self.state.at[slot, self.block]
        return pltpu.make_async_copy(self.slot_buffers.leaving, target, self.done.slot.at[1])

    def _in_pieces(self, count: Scalar, piece: Callable[[Scalar, int], None]) -> None:
        """piece(offset, size) for rows 0 to `count`: a whole chunk at once, else powers of two.

        No copy larger than the call's rows is made: no chunk has as many.
        """
        chunk, num_rows = self.rows.q.shape[1], self.packed.q.shape[0]
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
    segments = Segments(slots, cu_seqlens, q.shape[0])
    # All heads at once begin at a plain 0: another number need not be a multiple of a tile.
    one_block = q.shape[1] == blocks.heads
    first_head = 0 if one_block else pl.multiple_of(pl.program_id(0) * blocks.heads, blocks.heads)
    block = pl.ds(first_head, blocks.heads)
    copies = Copies(Rows(q, k, v, o), state, rows, slot_buffers, done, block)

    def one_chunk(carry):
        i, segment, row, last, before_last, stored = carry
        buffer = lax.rem(i, 2)
        count = jnp.minimum(chunk, segments.end(segment) - row)
        runs = segments.signed_slot(segment) != 0
        is_last = row + count == segments.end(segment)
        following = lax.cond(is_last, lambda: segments.seek(segment + 1), lambda: segment)
        following_row = jnp.where(is_last, segments.begin(following), row + chunk)

        @pl.when(runs)
        def _():
            copies.rows_in(row, count, buffer, _wait)
            _enter(segments, copies, heads, segment, row)

        # The other buffer's rows were used by the chunk before this one, and `entering` has just
        # been emptied.
        _prefetch(segments, copies, following, following_row, 1 - buffer)
        # This buffer's results left two chunks ago.
        copies.rows_out(0, before_last, buffer, _wait)

        @pl.when(runs)
        def _():
            split_heads(rows, heads, count, buffer)
            fold_chunk(heads, log_decay, first_head, count)
            rows.o[buffer] = jnp.swapaxes(heads.o[...], 0, 1)
            pl.when(is_last)(lambda: _leave(segments, copies, heads, segment, stored))

        @pl.when(jnp.logical_not(runs))
        def _():
            rows.o[buffer] = jnp.zeros_like(rows.o[buffer])

        copies.rows_out(row, count, buffer, _start)
        stored = jnp.where(runs & is_last, 1, stored)
        return i + 1, following, following_row, count, last, stored

    tabulate(heads, log_decay, first_head, scale)
    begin = segments.seek(jnp.int32(0))
    _prefetch(segments, copies, begin, segments.begin(begin), 0)
    zero = jnp.int32(0)
    i, _, _, last, before_last, stored = lax.while_loop(
        lambda carry: carry[1] <= segments.number,
        one_chunk,
        (zero, begin, segments.begin(begin), zero, zero, zero),
    )
    # Two chunks' results and one slot may still be on their way; a wait is for a slot's bytes,
    # whichever it is.
    copies.rows_out(0, before_last, lax.rem(i, 2), _wait)
    copies.rows_out(0, last, lax.rem(i + 1, 2), _wait)
    pl.when(stored > 0)(lambda: copies.slot_out(0).wait())


def _prefetch(
    segments: Segments, copies: Copies, segment: Scalar, row: Scalar, buffer: Scalar
) -> None:
    """Start the copies of a chunk's rows, and of the state that its segment goes on from."""
    signed = segments.signed_slot(segment)

    @pl.when(signed != 0)
    def _():
        left = segments.end(segment) - row
        copies.rows_in(row, jnp.minimum(copies.rows.q.shape[1], left), buffer, _start)

    @pl.when((row == segments.begin(segment)) & (signed > 0))
    def _():
        copies.slot_in(signed).start()


def _enter(segments: Segments, copies: Copies, heads: Heads, segment: Scalar, row: Scalar) -> None:
    """At a segment's first row: the state it starts from."""
    signed = segments.signed_slot(segment)
    is_first = row == segments.begin(segment)

    @pl.when(is_first & (signed > 0))
    def _():
        copies.slot_in(signed).wait()
        heads.state[...] = copies.slot_buffers.entering[...].astype(jnp.float32)

    @pl.when(is_first & (signed <= 0))
    def _():
        # What the slot held is not read: it may be NaN.
        heads.state[...] = jnp.zeros_like(heads.state)


def _leave(
    segments: Segments, copies: Copies, heads: Heads, segment: Scalar, stored: Scalar
) -> None:
    """Behind a segment's last row: its state on its way to its slot."""
    slot = jnp.abs(segments.signed_slot(segment))

    @pl.when(stored > 0)
    def _():
        # The state of the segment before must have left; a wait is for as many bytes.
        copies.slot_out(slot).wait()

    leaving = copies.slot_buffers.leaving
    leaving[...] = heads.state[...].astype(leaving.dtype)
    copies.slot_out(slot).start()


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()
