"""Lightning prefill on Hopper GPUs token by token: any head size and dtype, float32 throughout.

    S <- exp(g) S + k v^T        o = scale * S^T q

For what the matrix units do not take (`gpu_prefill`): float32 rows, and head sizes that are no
multiples of 64. One block a (piece of a segment, head, part of V), its part of the state in
registers as in `gpu_decode`; the copy engine brings the next rows of q, k and v while these are
folded. Segments too few to fill the GPU are cut (`gpu_work`): a first kernel folds each piece from
zero, the second starts each from the weighted sum of those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.lightning_attention import gpu_decode
from pallas_kernels.lightning_attention.gpu_decode import (
    StateTile,
    expm1,
    register_layout,
    state_tile,
)
from pallas_kernels.lightning_attention.gpu_work import (
    Cut,
    Segments,
    Work,
    beside_cut,
    cut,
    locate,
    piece_rows,
    stored_start,
    stored_sum,
)

plgpu = compat.mosaic_gpu()

# Rows in shared memory at once, twice; and entries of the state a thread holds, few, so that one
# segment alone makes many blocks.
_ROWS, _STAGES, _ENTRIES = 16, 2, 32
# That one long segment is cut for: several a multiprocessor, of which one computes while others
# wait for a sum.
_BLOCKS = 528


class Plan(NamedTuple):
    """What all blocks have in common; static."""

    tile: StateTile
    cut: Cut
    heads: int
    key_dim: int
    parts: int
    rows_at_once: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the state's part that a block holds."""
        return self.key_dim, self.tile.columns


class Place(NamedTuple):
    """What a block works on; `log_decay` of its head."""

    work: Work
    head: jax.Array
    columns: Any
    log_decay: jax.Array


def why_not(q: jax.Array, v: jax.Array, state: jax.Array) -> str | None:
    """Why the kernel can't run on arrays like these, or None."""
    return gpu_decode.why_not(q, v, state)


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segments: Segments,
    scale: float,
    blocks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`api.lightning_prefill` on the kernels, not differentiable; one segment cut for `blocks`.

    Raises:
        ValueError: no kernel for these head dimensions.
    """
    rows, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    tile = state_tile(key_dim, value_dim, _ENTRIES) or state_tile(key_dim, value_dim, 2 * _ENTRIES)
    if tile is None:
        raise ValueError(f"no register tile for a state of {key_dim} by {value_dim}")
    parts = value_dim // tile.columns
    work = cut(rows, segments.slots.shape[0], heads * parts, _ROWS, blocks or _BLOCKS)
    plan = Plan(tile, work, heads, key_dim, parts, min(_ROWS, rows))
    pool = jax.new_ref(state)
    sums = ()
    if work.windows:

        def lightning_prefill_scan_sums(*refs, **shared):
            sum_pieces(plan, *refs, shared=shared)

        shape = jax.ShapeDtypeStruct((work.stored, *state.shape[1:]), jnp.float32)
        summing = _kernel(lightning_prefill_scan_sums, plan, work.windows, shape, {"k": k, "v": v})
        sums = (summing(k, v, log_decay, *segments, pool),)

    def lightning_prefill_scan(*refs, **shared):
        fold_segments(plan, scale, *refs, shared=shared)

    shape = jax.ShapeDtypeStruct(v.shape, v.dtype)
    folding = _kernel(lightning_prefill_scan, plan, work.items, shape, {"q": q, "k": k, "v": v})
    return folding(q, k, v, log_decay, *segments, *sums, pool), jax.freeze(pool)


def _kernel(
    body, plan: Plan, items: int, out_type: jax.ShapeDtypeStruct, rows: dict[str, jax.Array]
):
    """`body(*refs, **shared)` over all items, heads and parts of V; `rows` pass shared memory."""
    shared: dict[str, Any] = {}
    for name, array in rows.items():
        width = plan.tile.columns if name == "v" else plan.key_dim
        shared[name] = plgpu.SMEM((_STAGES, plan.rows_at_once, width), array.dtype)
    shared["full"] = plgpu.Barrier(num_arrivals=len(rows), num_barriers=_STAGES)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=shared,
        grid=(items * plan.heads * plan.parts,),
        grid_names=("block",),
    )


def sum_pieces(
    plan: Plan, k_ref, v_ref, g_ref, slots_ref, cu_ref, fresh_ref, pool_ref, sums_ref, *, shared
) -> None:
    """For each cut the fold from zero of the piece before it.

    With a segment's first cut, what the segment starts from: its slot may be written before all
    its pieces have begun.
    """
    work = beside_cut(_item_of(plan) + 1, plan.cut, cu_ref, slots_ref, behind=False)
    place = _find_place(plan, work, g_ref)
    adds = (work.end > work.begin) & (work.slot != 0)
    sums_part = sums_ref.at[:, place.head, :, place.columns]

    @pl.when(adds & (work.piece == 0))
    def _():
        slot_state = pool_ref.at[work.slot, place.head, :, place.columns]
        s = _enter(plan, fresh_ref[work.segment], slot_state)
        compat.store_from_registers(sums_part.at[stored_start(plan.cut, work)], s)

    @pl.when(adds)
    def _():
        s = _fold(plan, place, {"k": k_ref, "v": v_ref}, shared, _no_state(plan))
        compat.store_from_registers(sums_part.at[stored_sum(work, work.piece, reverse=False)], s)


def fold_segments(
    plan: Plan, scale, q_ref, k_ref, v_ref, g_ref, slots_ref, cu_ref, fresh_ref, *refs, shared
) -> None:
    """Outputs of every row, and each segment's state from its slot to its slot."""
    *sums, pool_ref, o_ref = refs
    work = locate(_item_of(plan), plan.cut, cu_ref, slots_ref)
    place = _find_place(plan, work, g_ref)
    slot_state = pool_ref.at[work.slot, place.head, :, place.columns]

    def put(row, o):
        compat.store_from_registers(o_ref.at[row, place.head, place.columns], o.astype(o_ref.dtype))

    def start():
        def from_slot():
            return _enter(plan, fresh_ref[work.segment], slot_state)

        if not sums:
            return from_slot()
        part = sums[0].at[:, place.head, :, place.columns]
        return lax.cond(work.pieces > 1, lambda: _sum_before(plan, place, part), from_slot)

    @pl.when((work.slot != 0) & (work.end > work.begin))
    def _():
        sources = {"q": q_ref, "k": k_ref, "v": v_ref}
        s = _fold(plan, place, sources, shared, start(), lambda row, o: put(row, scale * o))

        @pl.when(work.piece == work.pieces - 1)
        def _():
            compat.store_from_registers(slot_state, s.astype(pool_ref.dtype))

    @pl.when(work.slot == 0)
    def _():
        nothing = jnp.zeros((plan.tile.columns,), jnp.float32)

        @pl.loop(work.begin, work.end)
        def _(row):
            put(row, plgpu.layout_cast(nothing, register_layout(plan.tile).reduce(0)))


def _item_of(plan: Plan) -> jax.Array:
    return lax.axis_index("block") // (plan.parts * plan.heads)


def _find_place(plan: Plan, work: Work, g_ref) -> Place:
    block = lax.axis_index("block")
    part, head = block % plan.parts, block // plan.parts % plan.heads
    return Place(work, head, pl.ds(part * plan.tile.columns, plan.tile.columns), g_ref[head])


def _fold(
    plan: Plan,
    place: Place,
    sources: dict[str, Any],
    shared: dict[str, Any],
    start: jax.Array,
    put: Callable[[jax.Array, jax.Array], None] | None = None,
) -> jax.Array:
    """The state after a piece's rows; `put(row, S^T q)` after each, where `sources` have q."""
    work, at_once = place.work, plan.rows_at_once
    chunks = (work.end - work.begin + at_once - 1) // at_once
    layout = register_layout(plan.tile)
    forgotten = expm1(place.log_decay)

    def feed(c):
        rows, stage = pl.ds(work.begin + c * at_once, at_once), c % _STAGES
        for name, ref in sources.items():
            of_head = (
                ref.at[rows, place.head, place.columns] if name == "v" else ref.at[rows, place.head]
            )
            plgpu.copy_gmem_to_smem(of_head, shared[name].at[stage], shared["full"].at[stage])

    def vector(name, stage, row, axis):
        x = plgpu.load(shared[name].at[stage, row], layout=layout.reduce(axis), optimized=False)
        return lax.broadcast_in_dim(x.astype(jnp.float32), plan.shape, (1 - axis,))

    def chunk(c, s):
        stage, first_row = c % _STAGES, work.begin + c * at_once
        plgpu.barrier_wait(shared["full"].at[stage])

        def token(row, s):
            added = vector("k", stage, row, 1) * vector("v", stage, row, 0)
            s = s + forgotten * s + added
            if put is not None:
                put(first_row + row, jnp.sum(s * vector("q", stage, row, 1), axis=0))
            return s

        s = lax.fori_loop(0, jnp.minimum(at_once, work.end - first_row), token, s)
        # All warps have read the stage before it is filled again.
        plgpu.commit_smem()
        pl.when(c + _STAGES < chunks)(lambda: feed(c + _STAGES))
        return s

    for c in range(_STAGES):
        pl.when(c < chunks)(lambda c=c: feed(c))
    return lax.fori_loop(0, chunks, chunk, start)


def _sum_before(plan: Plan, place: Place, sums_ref) -> jax.Array:
    """The state a piece starts from: the segment's own, and what the pieces before it add."""
    work = place.work

    def then(piece, s):
        _, begin, end = piece_rows(plan.cut, work.first_row, work.last_row, piece)
        forgotten = expm1(place.log_decay * (end - begin).astype(jnp.float32))
        added = _load_state(plan, sums_ref.at[stored_sum(work, piece, reverse=False)])
        return s + forgotten * s + added

    start = _load_state(plan, sums_ref.at[stored_start(plan.cut, work)])
    return lax.fori_loop(0, work.piece, then, start)


def _load_state(plan: Plan, ref) -> jax.Array:
    x = plgpu.load(ref, layout=register_layout(plan.tile), optimized=False)
    return x.astype(jnp.float32)


def _enter(plan: Plan, is_fresh: jax.Array, slot_state) -> jax.Array:
    """What a segment starts from; a fresh one does not look at what its slot held."""
    return lax.cond(is_fresh, lambda: _no_state(plan), lambda: _load_state(plan, slot_state))


def _no_state(plan: Plan) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(plan.shape, jnp.float32), register_layout(plan.tile))
