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
    """What a block works on: a piece, a head, and a part of V or a pair of parts."""

    work: Work
    head: jax.Array
    part: jax.Array
    steps: Steps
    is_pair: Any = False

    def columns(self, offset: Any = 0) -> Any:
        """Those of V in the block's part, or in that behind it."""
        return pl.ds(pl.multiple_of((self.part + offset) * COLUMNS, COLUMNS), COLUMNS)


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
    return Place(work, head, part, Steps(decay * _LOG2_E, stride, stride // 2, count))


def chunk_at(plan: Plan, place: Place, number: jax.Array) -> Chunk:
    """A chunk in the order of the walk; numbers go on in the second part of a pair."""
    work, steps = place.work, place.steps
    c = jnp.where(number < steps.count, number, number - steps.count)
    index = steps.count - 1 - c if plan.reverse else c
    first_row = work.start + index * steps.stride
    lo = jnp.maximum(work.begin - first_row, 0)
    hi = jnp.minimum(work.end - first_row, steps.stride)
    before, after = steps.middle + 1 - lo, hi - 1 - steps.middle
    if plan.reverse:
        before, after = after, before
    return Chunk(number, first_row, lo, hi, before, after)


def feed(plan: Plan, place: Place, sources, full, done) -> None:
    """Start the copies of every chunk; `sources` are (global reference, shared buffer, is v)."""
    count = place.steps.count
    total = jnp.where(place.is_pair, 2 * count, count)

    @pl.loop(0, total)
    def _(c):
        stage = c % plan.stages

        @pl.when(c >= plan.stages)
        def _():
            plgpu.barrier_wait(done.at[stage])

        start = pl.multiple_of(chunk_at(plan, place, c).first_row, ALIGNED_ROWS)
        rows = pl.ds(start, plan.chunk)
        for source, target, is_v in sources:
            columns = place.columns(jnp.where(c >= count, 1, 0)) if is_v else slice(None)
            of_head = source.at[rows, place.head, columns]
            plgpu.copy_gmem_to_smem(of_head, target.at[stage], full.at[stage])

    # No arrival is left unobserved: the interpreter insists on it.
    @pl.loop(jnp.maximum(total - plan.stages, 0), total)
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
        return ref.at[place.head, pl.ds(group * plan.state_rows, plan.state_rows), place.columns()]

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
    if plan.parts % 2 == 0:
        place = place._replace(is_pair=_in_pairs(plan, cut, work, tables))
    is_done = place.is_pair & (place.part % 2 == 1)
    has_rows = work.end > work.begin
    runs = has_rows & (work.slot != 0) & ~is_done
    feed_fold, fold = _folding(plan, place, (q_ref, k_ref, v_ref, o_ref), shared)

    def feeder():
        pl.when(runs)(feed_fold)

    def compute(group):
        state_rows = pl.ds(group * plan.state_rows, plan.state_rows)

        def go_through(columns, half):
            slot_state = pool_ref.at[work.slot, place.head, state_rows, columns]

            def from_slot():
                return _enter(plan, tables.is_fresh[work.segment], slot_state)

            def from_pieces():
                parts = handed_ref.at[:, place.head, state_rows, columns]
                return _sum_before(plan, cut, place, parts)

            if handed_ref is None or half:
                start = from_slot()
            else:
                start = lax.cond(work.piece > 0, from_pieces, from_slot)
            s = fold(group, start, half)

            @pl.when(work.piece == work.pieces - 1)
            def _():
                compat.store_from_registers(slot_state, s.astype(pool_ref.dtype))

        @pl.when(runs)
        def _():
            go_through(place.columns(), 0)

        if plan.parts % 2 == 0:

            @pl.when(runs & place.is_pair)
            def _():
                go_through(place.columns(1), 1)

        @pl.when(has_rows & (work.slot == 0))
        def _():
            o_part = o_ref.at[:, place.head, place.columns()]
            nothing = jnp.zeros((ROWS, COLUMNS), o_ref.dtype)
            shared["o"][group] = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
            plgpu.commit_smem()

            @pl.loop(0, place.steps.count)
            def _(c):
                store_rows(chunk_at(plan, place, c), group, shared["o"], o_part)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    in_roles(plan, feeder, compute)


def _in_pairs(plan: Plan, cut: Cut, work: Work, tables: Tables) -> jax.Array:
    """Whether a whole segment's blocks do two parts of V each, one after the other.

    It saves half the blocks' starts, and is done where rows like these make pairs enough.
    """
    rows = tables.cu_seqlens[cut.segments]
    pairs = plan.heads * plan.parts // 2
    is_short = (work.end - work.begin) * plan.least_pairs <= rows * pairs
    return is_short & (work.pieces == 1) & (work.slot != 0)


Roles = tuple[Callable[[], None], Callable[..., jax.Array]]


def _folding(plan: Plan, place: Place, refs, shared) -> Roles:
    """Of a piece's outputs: what the feeder does, and the state of a warpgroup behind it."""
    q_ref, k_ref, v_ref, o_ref = refs
    steps = place.steps

    def feeder():
        sources = [(q_ref, shared["q"], False), (k_ref, shared["k"], False),
                   (v_ref, shared["v"], True)]  # fmt: skip
        feed(plan, place, sources, shared["full"], shared["done"])

    def fold(group, s, half=0):
        o_part = o_ref.at[:, place.head, place.columns(half)]
        begin = half * steps.count

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

        return lax.fori_loop(begin, begin + steps.count, step, s)

    return feeder, fold


def _summing(plan: Plan, place: Place, refs, shared) -> Roles:
    """As `_folding`, without outputs."""
    k_ref, v_ref = refs
    steps = place.steps

    def feeder():
        sources = [(k_ref, shared["k"], False), (v_ref, shared["v"], True)]
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
