"""The two kernels of the GPU prefill, chunk by chunk: `sum_pieces` and `fold_segments`.

See `gpu_prefill` for the formula and `gpu_work` for what a block works on. In shared memory lie,
for each stage, a chunk's q and k [chunk, K] and v [chunk, 64], brought by the copy engine, and the
state in bfloat16 [2, K, 64], where warpgroups show each other their rows of it. v is weighted in
place. Barriers, and why each access is safe:

- `full[stage]`: the copies have arrived. `done[stage]`: all warpgroups have read the stage, so the
  feeder may refill it.
- `met`: every warpgroup has written its rows of the state, of the weighted v and of cleared keys.
  A warpgroup is at most one chunk ahead, and the state's two buffers alternate, so nothing is
  overwritten that another one still reads.
- A row of k that is not the segment's is cleared while scores may still read it: those scores are
  masked out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.lightning_attention.gpu_work import (
    ALIGNED_ROWS,
    Cut,
    Work,
    locate,
    piece_rows,
)

plgpu = compat.mosaic_gpu()

# Columns of V a block, and rows a warpgroup: the size of one wgmma tile.
COLUMNS = ROWS = 64
# The largest exponent of a factor, and the fastest decay: exp(-16) is as small as float32's last
# bit, so what a faster one leaves of a state is lost in rounding anyway.
_MOST_EXPONENT, _FASTEST = 64.0, -16.0
_LOG2_E = math.log2(math.e)
_FEEDER_REGISTERS, _COMPUTE_REGISTERS = 40, 232
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


class Tables(NamedTuple):
    """References to what is read from global memory by number."""

    log_decay: Any
    slots: Any
    cu_seqlens: Any
    is_fresh: Any


class Steps(NamedTuple):
    """The chunks of a block's work: the log2 decay a token, rows a step and their middle."""

    log2_decay: jax.Array
    stride: jax.Array
    middle: jax.Array
    count: jax.Array


class Place(NamedTuple):
    """What a block works on."""

    work: Work
    head: jax.Array
    columns: Any
    steps: Steps


def find_place(plan: Plan, cut: Cut, tables: Tables) -> Place:
    """From the block's number; the parts of V that read the same q and k are neighbours."""
    block = lax.axis_index("block")
    part, head = block % plan.parts, block // plan.parts % plan.heads
    item = block // (plan.parts * plan.heads)
    work = locate(item, cut, tables.cu_seqlens, tables.slots)
    decay = jnp.maximum(tables.log_decay[head], _FASTEST)
    is_slow = -decay * (plan.chunk // 2) <= _MOST_EXPONENT
    stride = jnp.where(is_slow, plan.chunk, ALIGNED_ROWS)
    count = (work.end - work.start + stride - 1) // stride
    columns = pl.ds(pl.multiple_of(part * COLUMNS, COLUMNS), COLUMNS)
    return Place(work, head, columns, Steps(decay * _LOG2_E, stride, stride // 2, count))


def feed(plan: Plan, place: Place, sources, full, done) -> None:
    """Start the copies of every chunk; `sources` are (global rows -> reference, shared buffer)."""
    count = place.steps.count

    @pl.loop(0, count)
    def _(c):
        stage = c % plan.stages

        @pl.when(c >= plan.stages)
        def _():
            plgpu.barrier_wait(done.at[stage])

        start = pl.multiple_of(chunk_at(plan, place, c).first_row, ALIGNED_ROWS)
        for source, target in sources:
            rows = source(pl.ds(start, plan.chunk))
            plgpu.copy_gmem_to_smem(rows, target.at[stage], full.at[stage])

    # No arrival is left unobserved: the interpreter insists on it.
    @pl.loop(jnp.maximum(count - plan.stages, 0), count)
    def _(c):
        plgpu.barrier_wait(done.at[c % plan.stages])


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


def chunk_at(plan: Plan, place: Place, c: jax.Array) -> Chunk:
    """Chunk c in the order of the walk."""
    work, steps = place.work, place.steps
    index = steps.count - 1 - c if plan.reverse else c
    first_row = work.start + index * steps.stride
    lo = jnp.maximum(work.begin - first_row, 0)
    hi = jnp.minimum(work.end - first_row, steps.stride)
    before, after = steps.middle + 1 - lo, hi - 1 - steps.middle
    if plan.reverse:
        before, after = after, before
    return Chunk(c, first_row, lo, hi, before, after)


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
    weight = jnp.exp2(-steps.log2_decay * _distance(plan, steps, group)) * plan.value_scale
    v = plgpu.load(v_shared.at[rows], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    v = v * lax.broadcast_in_dim(weight, v.shape, (0,))
    # A select, not a product: a neighbour's rows may hold NaN.
    v_shared[rows] = jnp.where(_is_ours(chunk, group, v.shape), v, 0).astype(v_shared.dtype)


def scale_state(steps: Steps, exponent: jax.Array, s: jax.Array) -> jax.Array:
    """exp(exponent * g) S."""
    return s * jnp.exp2(steps.log2_decay * exponent.astype(jnp.float32))


def sum_pieces(plan: Plan, cut: Cut, k_ref, v_ref, *refs, shared) -> None:
    """Each piece's own k^T w from zero; for a segment's last piece, what it starts from instead."""
    *tables, pool_ref, sums_ref = refs
    tables = Tables(*tables)
    place = find_place(plan, cut, tables)
    work, head, steps = place.work, place.head, place.steps
    is_cut = (work.pieces > 1) & (work.slot != 0)
    is_last = _is_last(plan, work)

    def feeder():
        @pl.when(is_cut & ~is_last)
        def _():
            sources = [(lambda rows: k_ref.at[rows, head], shared["k"]),
                       (lambda rows: v_ref.at[rows, head, place.columns], shared["v"])]  # fmt: skip
            feed(plan, place, sources, shared["full"], shared["done"])

    def compute(group):
        state_rows = pl.ds(group * plan.state_rows, plan.state_rows)
        target = sums_ref.at[work.rank + work.piece, head, state_rows, place.columns]

        def step(c, s):
            chunk = chunk_at(plan, place, c)
            stage = c % plan.stages
            s = scale_state(steps, chunk.before, s)
            plgpu.barrier_wait(shared["full"].at[stage])
            clear_keys(plan, chunk, group, shared["k"])
            weigh_values(plan, steps, chunk, group, shared["v"])
            plgpu.commit_smem()
            _meet(plan, shared)
            keys = shared["k"].at[stage, :, state_rows].transpose((1, 0))

            def product(acc):
                plgpu.wgmma(acc, keys, shared["v"].at[stage])
                return acc[...]

            s = s + pl.run_scoped(product, plgpu.ACC((plan.state_rows, COLUMNS), jnp.float32))
            plgpu.barrier_arrive(shared["done"].at[stage])
            return scale_state(steps, chunk.after, s)

        @pl.when(is_cut & ~is_last)
        def _():
            s = lax.fori_loop(0, steps.count, step, _no_state(plan))
            compat.store_from_registers(target, s)

        @pl.when(is_cut & is_last)
        def _():
            slot_state = pool_ref.at[work.slot, head, state_rows, place.columns]
            s = _enter(plan, tables.is_fresh[work.segment], slot_state)
            compat.store_from_registers(target, s)

    in_roles(plan, feeder, compute)


def fold_segments(plan: Plan, cut: Cut, q_ref, k_ref, v_ref, *refs, shared) -> None:
    """Outputs of every row, and each segment's state from its slot to its slot."""
    tables, (pool_ref, o_ref) = Tables(*refs[:4]), refs[-2:]
    sums_ref: Any = refs[4] if cut.span else None
    place = find_place(plan, cut, tables)
    work, head, steps = place.work, place.head, place.steps
    has_rows = work.end > work.begin
    runs = has_rows & (work.slot != 0)

    def feeder():
        @pl.when(runs)
        def _():
            sources = [(lambda rows: q_ref.at[rows, head], shared["q"]),
                       (lambda rows: k_ref.at[rows, head], shared["k"]),
                       (lambda rows: v_ref.at[rows, head, place.columns], shared["v"])]  # fmt: skip
            feed(plan, place, sources, shared["full"], shared["done"])

    def compute(group):
        state_rows = pl.ds(group * plan.state_rows, plan.state_rows)
        slot_state = pool_ref.at[work.slot, head, state_rows, place.columns]

        def start():
            def from_slot():
                return _enter(plan, tables.is_fresh[work.segment], slot_state)

            if sums_ref is None:
                return from_slot()

            def from_pieces():
                return _sum_before(
                    plan, cut, place, sums_ref.at[:, head, state_rows, place.columns]
                )

            return lax.cond(work.pieces > 1, from_pieces, from_slot)

        def step(c, s):
            chunk = chunk_at(plan, place, c)
            s = scale_state(steps, chunk.before, s)
            plgpu.barrier_wait(shared["full"].at[c % plan.stages])
            scores = _scores(plan, steps, chunk, group, s, shared)

            def put(o):
                weight = jnp.exp2(steps.log2_decay * _distance(plan, steps, group)) * plan.scale
                o = o * lax.broadcast_in_dim(weight, o.shape, (0,))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                shared["o"][group] = o.astype(o_ref.dtype)
                plgpu.commit_smem()
                _store_rows(chunk, group, place, shared["o"], o_ref)

            s = _products(plan, chunk, group, scores, s, put, shared)
            plgpu.barrier_arrive(shared["done"].at[c % plan.stages])
            return scale_state(steps, chunk.after, s)

        @pl.when(runs)
        def _():
            s = lax.fori_loop(0, steps.count, step, start())

            @pl.when(_is_last(plan, work))
            def _():
                compat.store_from_registers(slot_state, s.astype(pool_ref.dtype))

        @pl.when(has_rows & (work.slot == 0))
        def _():
            nothing = jnp.zeros((ROWS, COLUMNS), o_ref.dtype)
            shared["o"][group] = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
            plgpu.commit_smem()

            @pl.loop(0, steps.count)
            def _(c):
                _store_rows(chunk_at(plan, place, c), group, place, shared["o"], o_ref)

        plgpu.wait_smem_to_gmem(0)

    in_roles(plan, feeder, compute)


def _scores(plan: Plan, steps: Steps, chunk: Chunk, group: int, s: jax.Array, shared):
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


def _products(plan: Plan, chunk: Chunk, group: int, scores, s: jax.Array, put, shared):
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

    return _accumulate(update, s)


def _accumulate(add, start: jax.Array) -> jax.Array:
    """`add(accumulator)` onto `start`."""
    if not compat.is_interpreting_mosaic_gpu():
        return pl.run_state(add)(plgpu.ACC.init(start))

    # The interpreter knows accumulators that start from zero only.
    def from_zero(acc):
        add(acc)
        return acc[...]

    return start + pl.run_scoped(from_zero, plgpu.ACC(start.shape, start.dtype))


def _store_rows(chunk: Chunk, group: int, place: Place, o_shared, o_ref) -> None:
    """Start the copies of a warpgroup's rows lo..hi - 1 to their place, in powers of two."""
    at = jnp.clip(chunk.lo - group * ROWS, 0, ROWS)
    left = jnp.clip(chunk.hi - group * ROWS, 0, ROWS) - at
    first_row = chunk.first_row + group * ROWS
    for size in _COPIES:

        @pl.when((left & size) != 0)
        def _(at=at, size=size):
            target = o_ref.at[pl.ds(first_row + at, size), place.head, place.columns]
            source = o_shared.at[group, pl.ds(at, size)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        at = at + (left & size)
    plgpu.commit_smem_to_gmem_group()


def in_roles(plan: Plan, feeder, compute) -> None:
    """Each warpgroup its part: `compute(group)` with a static number, and one feeder."""
    group = lax.axis_index("group")

    @pl.when(group == plan.groups)
    def _():
        plgpu.set_max_registers(_FEEDER_REGISTERS, action="decrease")
        feeder()

    for number in range(plan.groups):

        @pl.when(group == number)
        def _(number=number):
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            compute(number)


def _meet(plan: Plan, shared) -> None:
    if plan.groups > 1:
        plgpu.barrier_arrive(shared["met"])
        plgpu.barrier_wait(shared["met"])


def _load_state(plan: Plan, ref) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def _enter(plan: Plan, is_fresh: jax.Array, slot_state) -> jax.Array:
    """What a segment starts from; a fresh one does not look at what its slot held."""
    return lax.cond(is_fresh, lambda: _no_state(plan), lambda: _load_state(plan, slot_state))


def _no_state(plan: Plan) -> jax.Array:
    nothing = jnp.zeros((plan.state_rows, COLUMNS), jnp.float32)
    return plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _sum_before(plan: Plan, cut: Cut, place: Place, sums_ref) -> jax.Array:
    """The state a piece starts from: the segment's own, and what the pieces before it add."""
    work = place.work

    def sum_of(piece):
        return _load_state(plan, sums_ref.at[work.rank + piece])

    def then(step, s):
        piece = work.pieces - 1 - step if plan.reverse else step
        _, begin, end = piece_rows(cut, work.first_row, work.last_row, piece)
        return scale_state(place.steps, end - begin, s) + sum_of(piece)

    last = 0 if plan.reverse else work.pieces - 1
    before = work.pieces - 1 - work.piece if plan.reverse else work.piece
    return lax.fori_loop(0, before, then, sum_of(last))


def _is_last(plan: Plan, work: Work) -> jax.Array:
    """Whether a piece is its segment's last in the order of the walk."""
    return work.piece == (0 if plan.reverse else work.pieces - 1)


def _seen(plan: Plan, group: int):
    """The rows of a chunk that a warpgroup's rows may read."""
    first, last = (group, plan.groups) if plan.reverse else (0, group + 1)
    return pl.ds(first * ROWS, (last - first) * ROWS)


def _is_ours(chunk: Chunk, group: int, shape: tuple[int, int]) -> jax.Array:
    """Which of a warpgroup's rows are the segment's, as wide as `shape`."""
    row = _iota(shape, 0) + group * ROWS
    return (row >= chunk.lo) & (row < chunk.hi)


def _distance(plan: Plan, steps: Steps, group: int) -> jax.Array:
    """How far behind the middle of the chunk, in the order of the walk, a warpgroup's rows lie."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    distance = (row + group * ROWS - steps.middle).astype(jnp.float32)
    return -distance if plan.reverse else distance
