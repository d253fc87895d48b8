"""One chunk of the GPU prefill in one warpgroup: scores, outputs, and the state's update.

See `gpu_prefill` for the formula and `gpu_kernels` for who calls this. In shared memory lie, for
each stage, a chunk's q and k [chunk, K] and v [chunk, 64], brought by the copy engine, and the
state in bfloat16 [2, K, 64], where warpgroups show each other their rows of it. v is weighted in
place. Barriers, and why each access is safe:

- `full[stage]`: the copies have arrived. `done[stage]`: all warpgroups have read the stage, so the
  feeder may refill it.
- `met`: every warpgroup has written its rows of the state, of the weighted v and of cleared keys.
  A warpgroup is at most one chunk ahead, and the state's two buffers alternate, so nothing is
  overwritten that another one still reads.
- A row of k that is not the segment's is cleared while scores of another warpgroup may still read
  it: those scores are masked out.

Between starting a product and waiting for it there is no branch: the assembler would then wait
for each product at once (its warning C7514).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat

plgpu = compat.mosaic_gpu()

# Columns of V a block, and rows a warpgroup: the size of one wgmma tile.
COLUMNS = ROWS = 64
# Rows a copy to global memory may have, to reach every number of rows up to 64.
_COPIES = (64, 32, 16, 8, 4, 2, 1)


class Plan(NamedTuple):
    """Static sizes: warpgroups that compute, and chunks in shared memory at once.

    `scale` multiplies outputs, `value_scale` v. `reverse` runs from the last row to the first:

        E_i = exp(g) (E_{i+1} + ...) carried, o_i = scale (E_{i+1} + k_i v_i^T)^T q_i

    the recurrence of gradients, in which a row is not forgotten before it is read.
    """

    heads: int
    key_dim: int
    parts: int
    groups: int
    stages: int
    scale: float = 1.0
    value_scale: float = 1.0
    reverse: bool = False

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return ROWS * self.groups

    @property
    def state_rows(self) -> int:
        """Rows of the state a warpgroup holds."""
        return self.key_dim // self.groups


class Steps(NamedTuple):
    """The chunks of a block's work: the log2 decay a token, rows a step and their middle."""

    log2_decay: jax.Array
    stride: jax.Array
    middle: jax.Array
    count: jax.Array


class Chunk(NamedTuple):
    """The c-th chunk of a block's work: the segment's rows are lo <= row < hi of it.

    `before` and `after` are how many tokens the state decays to come onto the chunk's scale, and
    from it to the next chunk.
    """

    number: jax.Array
    first_row: jax.Array
    lo: jax.Array
    hi: jax.Array
    before: jax.Array
    after: jax.Array


def clear_keys(plan: Plan, chunk: Chunk, group: int, k_shared) -> None:
    """Zero a warpgroup's rows of k that are not the segment's: they may hold NaN."""
    rows = chunk.number % plan.stages, pl.ds(group * ROWS, ROWS)

    @pl.when((chunk.lo > 0) | (chunk.hi < plan.chunk))
    def _():
        k = plgpu.load(k_shared.at[rows], layout=plgpu.Layout.WGMMA)
        k_shared[rows] = jnp.where(_is_ours(chunk, group, k.shape), k, jnp.zeros_like(k))


def weigh_values(plan: Plan, steps: Steps, chunk: Chunk, group: int, v_shared) -> None:
    """v of a warpgroup's rows onto the chunk's scale, in place; rows of others to zero."""
    rows = chunk.number % plan.stages, pl.ds(group * ROWS, ROWS)
    weight = jnp.exp2(-steps.log2_decay * distance(plan, steps, group)) * plan.value_scale
    v = plgpu.load(v_shared.at[rows], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    v = v * lax.broadcast_in_dim(weight, v.shape, (0,))
    # A select, not a product: a neighbour's rows may hold NaN.
    v_shared[rows] = jnp.where(_is_ours(chunk, group, v.shape), v, 0).astype(v_shared.dtype)


def scale_state(steps: Steps, exponent: jax.Array, s: jax.Array) -> jax.Array:
    """exp(exponent * g) S."""
    return s * jnp.exp2(steps.log2_decay * exponent.astype(jnp.float32))


def masked_scores(plan: Plan, steps: Steps, chunk: Chunk, group: int, s: jax.Array, shared):
    """q k^T of the warpgroup's rows, masked, in bfloat16; meanwhile w and S~ go to shared memory.

    Columns beyond the warpgroup's own rows are not read yet and left out.
    """
    stage, seen = chunk.number % plan.stages, _seen(plan, group)
    clear_keys(plan, chunk, group, shared["k"])

    def product(acc):
        rows = pl.ds(group * ROWS, ROWS)
        keys = shared["k"].at[stage, seen].transpose((1, 0))
        plgpu.wgmma(acc, shared["q"].at[stage, rows], keys)
        weigh_values(plan, steps, chunk, group, shared["v"])
        state_rows = pl.ds(group * plan.state_rows, plan.state_rows)
        shared["s"][chunk.number % 2, state_rows] = s.astype(shared["s"].dtype)
        plgpu.commit_smem()
        if plan.groups > 1:
            plgpu.barrier_arrive(shared["met"])
        return acc[...]

    scores = pl.run_scoped(product, plgpu.ACC((ROWS, seen.size), jnp.float32))
    row, column = _iota(scores.shape, 0) + group * ROWS, _iota(scores.shape, 1) + seen.start
    if plan.reverse:
        is_read = (row <= column) & (column < chunk.hi)
    else:
        is_read = (row >= column) & (column >= chunk.lo)
    scores = jnp.where(is_read, scores, 0).astype(jnp.bfloat16)
    if "scores" in shared:
        # The interpreter multiplies from shared memory only.
        shared["scores"][group, :, seen] = scores
        plgpu.commit_smem()
        scores = shared["scores"].at[group, :, seen]
    if plan.groups > 1:
        plgpu.barrier_wait(shared["met"])
    return scores


def products(plan: Plan, chunk: Chunk, group: int, scores, s: jax.Array, put, shared):
    """S~ + k^T w of the warpgroup's rows; `put` takes scores w + q S~ while that is under way."""
    stage = chunk.number % plan.stages
    rows = pl.ds(group * ROWS, ROWS)
    state_rows = pl.ds(group * plan.state_rows, plan.state_rows)

    def update(s_acc):
        def outputs(o_acc):
            plgpu.wgmma(o_acc, scores, shared["v"].at[stage, _seen(plan, group)])
            plgpu.wgmma(o_acc, shared["q"].at[stage, rows], shared["s"].at[chunk.number % 2])
            keys = shared["k"].at[stage, :, state_rows].transpose((1, 0))
            plgpu.wgmma(s_acc, keys, shared["v"].at[stage])
            return plgpu.wgmma_accumulator_load(o_acc, wait_n=1)

        put(pl.run_scoped(outputs, plgpu.ACC((ROWS, COLUMNS), jnp.float32)))

    return accumulate(update, s)


def accumulate(add, start: jax.Array) -> jax.Array:
    """`add(accumulator)` onto `start`."""
    if not compat.is_interpreting_mosaic_gpu():
        return pl.run_state(add)(plgpu.ACC.init(start))

    # The interpreter knows accumulators that start from zero only.
    def from_zero(acc):
        add(acc)
        return acc[...]

    return start + pl.run_scoped(from_zero, plgpu.ACC(start.shape, start.dtype))


def store_rows(chunk: Chunk, group: int, o_shared, o_ref) -> None:
    """Start the copies of a warpgroup's rows lo..hi - 1 to their place, in powers of two."""
    at = jnp.clip(chunk.lo - group * ROWS, 0, ROWS)
    left = jnp.clip(chunk.hi - group * ROWS, 0, ROWS) - at
    first_row = chunk.first_row + group * ROWS
    for size in _COPIES:

        @pl.when((left & size) != 0)
        def _(at=at, size=size):
            target = o_ref.at[pl.ds(first_row + at, size)]
            source = o_shared.at[group, pl.ds(at, size)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        at = at + (left & size)
    plgpu.commit_smem_to_gmem_group()


def _seen(plan: Plan, group: int) -> Any:
    """The rows of a chunk that a warpgroup's rows may read."""
    first, last = (group, plan.groups) if plan.reverse else (0, group + 1)
    return pl.ds(first * ROWS, (last - first) * ROWS)


def _is_ours(chunk: Chunk, group: int, shape: tuple[int, int]) -> jax.Array:
    """Which of a warpgroup's rows are the segment's, as wide as `shape`."""
    row = _iota(shape, 0) + group * ROWS
    return (row >= chunk.lo) & (row < chunk.hi)


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def distance(plan: Plan, steps: Steps, group: int) -> jax.Array:
    """How far behind the middle of the chunk, in the order of the walk, a warpgroup's rows lie."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    behind = (row + group * ROWS - steps.middle).astype(jnp.float32)
    return -behind if plan.reverse else behind
