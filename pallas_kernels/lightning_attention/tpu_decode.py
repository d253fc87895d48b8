"""Decode on a TPU: every slot goes through VMEM once, and the pool stays in place.

    S = exp(g) S + k v^T        o = scale * S^T q

A task is one row and one block of heads. Its part of the slot comes from HBM into one of DEPTH
buffers, is updated there and goes back to where it came from, while the tasks before and behind it
are under way: at any time AHEAD loads, one update and the stores that are not over yet. Rows of q,
k, v and o come and go as windows of many rows. Rows that name NULL move nothing and give zero.

Everything is a loop or a vector operation: the program's size depends on the heads of a block, not
on rows. On a chip whose two cores are one device each takes half of the rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat
from pallas_kernels.lightning_attention import tpu_blocks
from pallas_kernels.lightning_attention.tpu_blocks import AHEAD, DEPTH, DecodeBlocks

Ref = Any


def supports(q, k, v, log_decay, state) -> str | None:
    """Why this call can't run, or None; arguments as of `api.lightning_decode`."""
    return tpu_blocks.refusal(q, v, state) or tpu_blocks.decode_blocks(q, v, state).refusal


def lightning_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    slots: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_decode`."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    blocks = tpu_blocks.decode_blocks(q, v, state)
    # Rows a core, a whole number of windows.
    last = pl.cdiv(batch, blocks.rows) - 1
    cores = min(compat.tpu_cores(), last + 1)
    windows = pl.cdiv(last + 1, cores)

    def window(width: int) -> pl.BlockSpec:
        # The second core may have a window less: it stays with its last one.
        return pl.BlockSpec(
            (blocks.rows, heads, width),
            lambda core, i, *_: (jnp.minimum(core * windows + i, last), 0, 0),
        )

    in_place = pl.BlockSpec(memory_space=pl.ANY)
    o, state = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, batch=batch, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, windows),
            in_specs=[window(key_dim), window(key_dim), window(value_dim), in_place],
            out_specs=[window(value_dim), in_place],
            scratch_shapes=[
                pltpu.VMEM((heads, value_dim), jnp.float32),
                pltpu.VMEM((2, blocks.heads, key_dim), jnp.float32),
                pltpu.VMEM((2, blocks.heads, value_dim), jnp.float32),
                pltpu.VMEM((DEPTH, blocks.heads, key_dim, value_dim), state.dtype),
                pltpu.SemaphoreType.DMA((DEPTH,)),
                pltpu.SemaphoreType.DMA((DEPTH,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ],
        input_output_aliases={5: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tpu_blocks.VMEM_LIMIT,
        ),
        cost_estimate=cost(q, v, state),
        name="lightning_decode",
    )(slots, log_decay, q, k, v, state)
    return o, state


def cost(q: jax.Array, v: jax.Array, state: jax.Array) -> pl.CostEstimate:
    """What a call with no pad row computes and moves."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    slot = heads * key_dim * value_dim
    rows = 2 * q.size * q.dtype.itemsize + 2 * v.size * v.dtype.itemsize
    return pl.CostEstimate(
        flops=6 * batch * slot,
        bytes_accessed=rows + 2 * batch * slot * state.dtype.itemsize,
        transcendentals=heads * value_dim,
    )


def _kernel(
    slots: Ref,
    log_decay: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    _: Ref,
    o: Ref,
    state: Ref,
    decay: Ref,
    qk_rows: Ref,
    vo_rows: Ref,
    buffers: Ref,
    load_done: Ref,
    store_done: Ref,
    *,
    blocks: DecodeBlocks,
    batch: int,
    scale: float,
) -> None:
    num_heads = q.shape[1]
    parts = num_heads // blocks.heads
    core, window = pl.program_id(0), pl.program_id(1)
    rows_a_core = pl.num_programs(1) * blocks.rows
    begin = core * rows_a_core * parts
    end = jnp.minimum((core + 1) * rows_a_core, batch) * parts

    def runs(task):
        return slots[lax.div(task, parts)] != 0

    def first_head(task):
        if parts == 1:
            return 0
        return pl.multiple_of(lax.rem(task, parts) * blocks.heads, blocks.heads)

    def place(task):
        return state.at[slots[lax.div(task, parts)], pl.ds(first_head(task), blocks.heads)]

    def load(task):
        buffer = lax.rem(task, DEPTH)
        return pltpu.make_async_copy(place(task), buffers.at[buffer], load_done.at[buffer])

    def store(task):
        buffer = lax.rem(task, DEPTH)
        return pltpu.make_async_copy(buffers.at[buffer], place(task), store_done.at[buffer])

    def fetch(task):
        # A buffer is free once the task that had it before has stored. Slots of a call are
        # distinct, so no load waits for another task's store.
        earlier = task - DEPTH

        @pl.when((task < end) & (earlier >= begin) & runs(jnp.maximum(earlier, 0)))
        def _():
            store(earlier).wait()

        @pl.when((task < end) & runs(jnp.minimum(task, batch * parts - 1)))
        def _():
            load(task).start()

    @pl.when(window == 0)
    def _():
        lax.fori_loop(0, AHEAD, lambda i, _: fetch(begin + i), None)

        def one_head(head, _):
            row = jnp.full((1, decay.shape[1]), log_decay[head], jnp.float32)
            decay[pl.ds(head, 1)] = _expm1(row)

        lax.fori_loop(0, num_heads, one_head, None)

    def run(task):
        row = lax.div(task, parts) - (begin // parts + window * blocks.rows)
        heads = pl.ds(first_head(task), blocks.heads)

        @pl.when(jnp.logical_not(runs(task)))
        def _():
            o[row, heads] = jnp.zeros((blocks.heads, o.shape[-1]), o.dtype)

        @pl.when(runs(task))
        def _():
            for place_, x in ((qk_rows.at[0], q), (qk_rows.at[1], k), (vo_rows.at[0], v)):
                place_[...] = x[row, heads].astype(jnp.float32)
            load(task).wait()
            block = buffers.at[lax.rem(task, DEPTH)]
            _update(block, decay.at[heads], qk_rows, vo_rows)
            store(task).start()
            o[row, heads] = (scale * vo_rows[1]).astype(o.dtype)

    def step(i, _):
        task = begin + window * blocks.rows * parts + i
        fetch(task + AHEAD)
        run(task)

    tasks = jnp.clip(end - begin - window * blocks.rows * parts, 0, blocks.rows * parts)
    lax.fori_loop(0, tasks, step, None)

    @pl.when(window == pl.num_programs(1) - 1)
    def _():
        def wait(i, _):
            task = end - 1 - i

            @pl.when((task >= begin) & runs(jnp.maximum(task, 0)))
            def _():
                store(task).wait()

        lax.fori_loop(0, DEPTH, wait, None)


def _update(block: Ref, decay: Ref, qk_rows: Ref, vo_rows: Ref) -> None:
    """One token into a block of heads [n, K, V]; rows of q, k [2, n, K] and v, o [2, n, V]."""
    num_heads, key_dim, value_dim = block.shape

    def column(row: jax.Array) -> jax.Array:
        # A row [1, K] down the sublanes and the same in every lane.
        return jnp.broadcast_to(row, (value_dim, key_dim)).T

    # As many heads are scheduled together as keep the units busy; their number bounds the code.
    together = math.gcd(num_heads, tpu_blocks.HEAD_BLOCK)

    def group(i, _):
        heads = pl.ds(i * together, together)
        q, k, v, g = qk_rows[0, heads], qk_rows[1, heads], vo_rows[0, heads], decay[heads]
        outputs = []
        for n in range(together):
            one, head = slice(n, n + 1), i * together + n
            old = block[head].astype(jnp.float32)
            # exp(g) S as S + (exp(g) - 1) S: a slow head's exp(g) would err the same way every
            # token.
            new = old + g[one] * old + column(k[one]) * v[one]
            block[head] = new.astype(block.dtype)
            outputs.append(jnp.sum(column(q[one]) * new, axis=0, keepdims=True))
        vo_rows[1, heads] = jnp.concatenate(outputs)

    lax.fori_loop(0, num_heads // together, group, None)


def _expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1 for x <= 0 with float32's relative precision: a series where they would cancel."""
    series = jnp.ones_like(x)
    for n in range(8, 1, -1):
        series = 1 + x / n * series
    return jnp.where(x > -0.25, x * series, jnp.exp(x) - 1)
