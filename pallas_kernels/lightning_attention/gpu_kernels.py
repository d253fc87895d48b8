"""The two kernels of the GPU prefill: `reach_cuts` and `fold_segments`, bodies of `plgpu.kernel`.

See `gpu_prefill` for the formula, `gpu_work` for what a block works on and `gpu_chunks` for what
its warpgroups do with a chunk and why that is safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    before_cut,
    handed_over,
    locate,
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


def reach_cuts(plan: Plan, cut: Cut, q_ref, k_ref, v_ref, *refs, shared) -> None:
    """For each cut what the piece before it hands over.

    Of a segment's first piece the state behind it, and its outputs; of others k^T w from zero.
    """
    tables, (pool_ref, o_ref, handed_ref) = Tables(*refs[:4]), refs[-3:]
    work = before_cut(item_of(plan), cut, tables.cu_seqlens, tables.slots)
    place = find_place(plan, work, tables)
    runs = (work.end > work.begin) & (work.slot != 0)
    is_first = work.piece == 0

    def state_part(ref, group):
        return ref.at[place.head, pl.ds(group * plan.state_rows, plan.state_rows), place.columns]

    def start(group):
        slot_state = state_part(pool_ref.at[work.slot], group)
        return _enter(plan, tables.is_fresh[work.segment], slot_state)

    def hand_over(group, s):
        target = state_part(handed_ref.at[handed_over(work, work.piece)], group)
        compat.store_from_registers(target, s)

    feed_fold, fold = _folding(plan, place, (q_ref, k_ref, v_ref, o_ref), shared)
    feed_sum, add_up = _summing(plan, place, (k_ref, v_ref), shared)

    def feeder():
        pl.when(runs & is_first)(feed_fold)
        pl.when(runs & ~is_first)(feed_sum)

    def compute(group):
        @pl.when(runs & is_first)
        def _():
            hand_over(group, fold(group, start(group)))

        @pl.when(runs & ~is_first)
        def _():
            hand_over(group, add_up(group, _no_state(plan)))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    in_roles(plan, feeder, compute)


def fold_segments(plan: Plan, cut: Cut, q_ref, k_ref, v_ref, *refs, shared) -> None:
    """Outputs of every row, and each segment's state from its slot to its slot.

    Less what `reach_cuts` has done.
    """
    tables, (pool_ref, o_ref) = Tables(*refs[:4]), refs[-2:]
    handed_ref: Any = refs[4] if cut.windows else None
    work = locate(item_of(plan), cut, tables.cu_seqlens, tables.slots)
    place = find_place(plan, work, tables)
    has_rows = work.end > work.begin
    runs = has_rows & (work.slot != 0)
    feed_fold, fold = _folding(plan, place, (q_ref, k_ref, v_ref, o_ref), shared)

    def feeder():
        pl.when(runs)(feed_fold)

    def compute(group):
        state_rows = pl.ds(group * plan.state_rows, plan.state_rows)
        slot_state = pool_ref.at[work.slot, place.head, state_rows, place.columns]

        def start():
            def from_slot():
                return _enter(plan, tables.is_fresh[work.segment], slot_state)

            if handed_ref is None:
                return from_slot()

            def from_pieces():
                parts = handed_ref.at[:, place.head, state_rows, place.columns]
                return _sum_before(plan, cut, place, parts)

            return lax.cond(work.piece > 0, from_pieces, from_slot)

        @pl.when(runs)
        def _():
            s = fold(group, start())

            @pl.when(work.piece == work.pieces - 1)
            def _():
                compat.store_from_registers(slot_state, s.astype(pool_ref.dtype))

        @pl.when(has_rows & (work.slot == 0))
        def _():
            o_part = o_ref.at[:, place.head, place.columns]
            nothing = jnp.zeros((ROWS, COLUMNS), o_ref.dtype)
            shared["o"][group] = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
            plgpu.commit_smem()

            @pl.loop(0, place.steps.count)
            def _(c):
                store_rows(chunk_at(plan, place, c), group, shared["o"], o_part)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    in_roles(plan, feeder, compute)


Roles = tuple[Callable[[], None], Callable[[int, jax.Array], jax.Array]]


def _folding(plan: Plan, place: Place, refs, shared) -> Roles:
    """Of a piece's outputs: what the feeder does, and the state of a warpgroup behind it."""
    q_ref, k_ref, v_ref, o_ref = refs
    head, steps = place.head, place.steps
    o_part = o_ref.at[:, head, place.columns]

    def feeder():
        sources = [(lambda rows: q_ref.at[rows, head], shared["q"]),
                   (lambda rows: k_ref.at[rows, head], shared["k"]),
                   (lambda rows: v_ref.at[rows, head, place.columns], shared["v"])]  # fmt: skip
        feed(plan, place, sources, shared["full"], shared["done"])

    def fold(group, s):
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

        return lax.fori_loop(0, steps.count, step, s)

    return feeder, fold


def _summing(plan: Plan, place: Place, refs, shared) -> Roles:
    """As `_folding`, without outputs."""
    k_ref, v_ref = refs
    head, steps = place.head, place.steps

    def feeder():
        sources = [(lambda rows: k_ref.at[rows, head], shared["k"]),
                   (lambda rows: v_ref.at[rows, head, place.columns], shared["v"])]  # fmt: skip
        feed(plan, place, sources, shared["full_sums"], shared["done"])

    def add_up(group, s):
        state_rows = pl.ds(group * plan.state_rows, plan.state_rows)

        def step(c, s):
            chunk = chunk_at(plan, place, c)
            stage = c % plan.stages
            s = scale_state(steps, chunk.before, s)
            plgpu.barrier_wait(shared["full_sums"].at[stage])
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

        return lax.fori_loop(0, steps.count, step, s)

    return feeder, add_up


def _sum_before(plan: Plan, cut: Cut, place: Place, handed_ref) -> jax.Array:
    """The state a piece starts from: that behind the first piece, and what those since then add."""
    work = place.work

    def load(piece):
        return _load_state(plan, handed_ref.at[handed_over(work, piece)])

    def then(piece, s):
        return scale_state(place.steps, jnp.int32(cut.span), s) + load(piece)

    return lax.fori_loop(1, work.piece, then, load(0))


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
