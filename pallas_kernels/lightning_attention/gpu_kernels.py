"""The two kernels of the GPU prefill: `sum_pieces` and `fold_segments`, bodies of `plgpu.kernel`.

See `gpu_prefill` for the formula, `gpu_work` for what a block works on and `gpu_chunks` for what
its warpgroups do with a chunk and why that is safe.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.lightning_attention.gpu_chunks import (
    COLUMNS,
    ROWS,
    Chunk,
    Plan,
    Steps,
    clear_keys,
    distance,
    masked_scores,
    products,
    scale_state,
    store_rows,
    weigh_values,
)
from pallas_kernels.lightning_attention.gpu_work import (
    ALIGNED_ROWS,
    Cut,
    Work,
    beside_cut,
    locate,
    piece_rows,
    stored_start,
    stored_sum,
)

plgpu = compat.mosaic_gpu()

# The largest exponent of a factor, and the fastest decay: exp(-16) is as small as float32's last
# bit, so what a faster one leaves of a state is lost in rounding anyway.
_MOST_EXPONENT, _FASTEST = 64.0, -16.0
_LOG2_E = math.log2(math.e)
_FEEDER_REGISTERS, _COMPUTE_REGISTERS = 40, 232


class Tables(NamedTuple):
    """References to what is read from global memory by number."""

    log_decay: Any
    slots: Any
    cu_seqlens: Any
    is_fresh: Any


class Place(NamedTuple):
    """What a block works on."""

    work: Work
    head: jax.Array
    columns: Any
    steps: Steps


def item_of(plan: Plan) -> jax.Array:
    """The block's item; the blocks of one item are neighbours."""
    return lax.axis_index("block") // (plan.parts * plan.heads)


def find_place(plan: Plan, work: Work, tables: Tables) -> Place:
    """From the block's number; the parts of V that read the same q and k are neighbours."""
    block = lax.axis_index("block")
    part, head = block % plan.parts, block // plan.parts % plan.heads
    decay = jnp.maximum(tables.log_decay[head], _FASTEST)
    is_slow = -decay * (plan.chunk // 2) <= _MOST_EXPONENT
    stride = jnp.where(is_slow, plan.chunk, ALIGNED_ROWS)
    count = (work.end - work.start + stride - 1) // stride
    columns = pl.ds(pl.multiple_of(part * COLUMNS, COLUMNS), COLUMNS)
    return Place(work, head, columns, Steps(decay * _LOG2_E, stride, stride // 2, count))


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


def sum_pieces(plan: Plan, cut: Cut, k_ref, v_ref, *refs, shared) -> None:
    """For each cut the k^T w, from zero, of the piece that is walked towards it.

    With a segment's first cut, what the segment starts from: its slot may be written before all
    its pieces have begun.
    """
    *tables, pool_ref, sums_ref = refs
    tables = Tables(*tables)
    item = item_of(plan)
    work = beside_cut(item + 1, cut, tables.cu_seqlens, tables.slots, behind=plan.reverse)
    place = find_place(plan, work, tables)
    head, steps = place.head, place.steps
    adds = (work.end > work.begin) & (work.slot != 0)
    at_first_cut = work.piece == (1 if plan.reverse else 0)

    def feeder():
        @pl.when(adds)
        def _():
            sources = [(lambda rows: k_ref.at[rows, head], shared["k"]),
                       (lambda rows: v_ref.at[rows, head, place.columns], shared["v"])]  # fmt: skip
            feed(plan, place, sources, shared["full"], shared["done"])

    def compute(group):
        state_rows = pl.ds(group * plan.state_rows, plan.state_rows)
        sums_part = sums_ref.at[:, head, state_rows, place.columns]

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

        @pl.when(adds & at_first_cut)
        def _():
            slot_state = pool_ref.at[work.slot, head, state_rows, place.columns]
            s = _enter(plan, tables.is_fresh[work.segment], slot_state)
            compat.store_from_registers(sums_part.at[stored_start(cut, work)], s)

        @pl.when(adds)
        def _():
            s = lax.fori_loop(0, steps.count, step, _no_state(plan))
            sum_place = stored_sum(work, work.piece, plan.reverse)
            compat.store_from_registers(sums_part.at[sum_place], s)

    in_roles(plan, feeder, compute)


def fold_segments(plan: Plan, cut: Cut, q_ref, k_ref, v_ref, *refs, shared) -> None:
    """Outputs of every row, and each segment's state from its slot to its slot."""
    tables, (pool_ref, o_ref) = Tables(*refs[:4]), refs[-2:]
    sums_ref: Any = refs[4] if cut.windows else None
    work = locate(item_of(plan), cut, tables.cu_seqlens, tables.slots)
    place = find_place(plan, work, tables)
    head, steps = place.head, place.steps
    o_part = o_ref.at[:, head, place.columns]
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
            scores = masked_scores(plan, steps, chunk, group, s, shared)

            def put(o):
                weight = jnp.exp2(steps.log2_decay * distance(plan, steps, group)) * plan.scale
                o = o * lax.broadcast_in_dim(weight, o.shape, (0,))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                shared["o"][group] = o.astype(o_ref.dtype)
                plgpu.commit_smem()
                store_rows(chunk, group, shared["o"], o_part)

            s = products(plan, chunk, group, scores, s, put, shared)
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
                store_rows(chunk_at(plan, place, c), group, shared["o"], o_part)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    in_roles(plan, feeder, compute)


def _sum_before(plan: Plan, cut: Cut, place: Place, sums_ref) -> jax.Array:
    """The state a piece starts from: the segment's own, and what the pieces before it add."""
    work = place.work

    def then(step, s):
        piece = work.pieces - 1 - step if plan.reverse else step
        _, begin, end = piece_rows(cut, work.first_row, work.last_row, piece)
        added = _load_state(plan, sums_ref.at[stored_sum(work, piece, plan.reverse)])
        return scale_state(place.steps, end - begin, s) + added

    before = work.pieces - 1 - work.piece if plan.reverse else work.piece
    return lax.fori_loop(0, before, then, _load_state(plan, sums_ref.at[stored_start(cut, work)]))


def _is_last(plan: Plan, work: Work) -> jax.Array:
    """Whether a piece is its segment's last in the order of the walk."""
    return work.piece == (0 if plan.reverse else work.pieces - 1)


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
