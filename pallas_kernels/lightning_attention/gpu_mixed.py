"""A mixed step of lightning attention on Hopper GPUs in one launch: decode rows and segments.

Rows come as a step packs them, decode rows first. The first blocks fold segments as `gpu_prefill`
does with segments left whole; the others fold decode rows, one (row, head, part of V) a warpgroup
at a time (`gpu_rows`). Few segments leave most of the GPU and nearly all bandwidth idle for as long
as their chunks follow one another: the decode rows, which need nothing but bandwidth, fill it.
Slots of all rows and segments are distinct, so that no block waits for another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.lightning_attention import gpu_prefill
from pallas_kernels.lightning_attention.gpu_chunks import ROWS
from pallas_kernels.lightning_attention.gpu_decode import expm1
from pallas_kernels.lightning_attention.gpu_kernels import fold_segments
from pallas_kernels.lightning_attention.gpu_prefill import Variant, make_plan
from pallas_kernels.lightning_attention.gpu_rows import (
    WarpTile,
    fold_row,
    load_wide,
    store_zeros,
    warp_layout,
    warp_tile,
)
from pallas_kernels.lightning_attention.gpu_work import ALIGNED_ROWS, whole

plgpu = compat.mosaic_gpu()

# State entries a thread holds while it folds a decode row.
_ENTRIES = 64
_MULTIPROCESSORS = 132
# Decode blocks wanted a multiprocessor: fewer have less to start, more end at the same time.
_BLOCKS_EACH = 4


class Sharing(NamedTuple):
    """How blocks are shared out; all static.

    `segments` blocks fold segments, `rows` blocks decode rows, each warpgroup of theirs `turns`
    times. Of the first `first` blocks all fold segments; the rest of them are spread evenly.
    """

    segments: int
    rows: int
    turns: int
    first: int


def why_not(q: jax.Array, v: jax.Array, state: jax.Array) -> str | None:
    """Why the kernel can't run on arrays like these, or None."""
    key_dim, value_dim = state.shape[-2:]
    if warp_tile(key_dim, value_dim, _ENTRIES) is None:
        return f"no register tile for a state of {key_dim} by {value_dim}"
    return gpu_prefill.why_not(q, v, state)


def lightning_mixed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    decode_slots: jax.Array,
    slots: jax.Array,
    cu_seqlens: jax.Array,
    is_fresh: jax.Array,
    scale: float,
    turns: int | None = None,
    first: int = _MULTIPROCESSORS,
) -> tuple[jax.Array, jax.Array]:
    """`api.lightning_decode` of the first D rows and `api.lightning_prefill` of the T others.

    Args:
        q: bfloat16 [D + T, N, K], as k.
        k: [D + T, N, K].
        v: bfloat16 [D + T, N, V].
        log_decay: float32 [N], <= 0.
        state: [S, N, K, V] float32 or bfloat16; donate it.
        decode_slots: int32 [D], 0 for pad rows; distinct from one another and from `slots`.
        slots: int32 [P], 0 for pads.
        cu_seqlens: int32 [P + 1], counted from row D.
        is_fresh: bool [P].
        scale: the factor of the output.
        turns: rows a warpgroup folds one after another; None: by the number of rows.
        first: blocks of segments that start before any of decode rows.

    Returns:
        o [D + T, N, V] in v's dtype, and the state. A segment's bits depend on the place of its
        first row modulo 8, counted from row 0.

    Raises:
        ValueError: no kernel for these head dimensions.
    """
    rows, heads, key_dim = q.shape
    value_dim, num_decode = v.shape[-1], decode_slots.shape[0]
    variant = Variant(scale)
    if rows < 2 * ROWS and key_dim <= 2 * ROWS:
        variant = variant._replace(groups=1)
    plan = make_plan(heads, key_dim, value_dim, variant)
    tile = warp_tile(key_dim, value_dim, _ENTRIES)
    if plan is None or tile is None:
        raise ValueError(f"no kernel for key dim {key_dim} and value dim {value_dim}")
    missing = max(-rows % ALIGNED_ROWS, plan.chunk - rows)
    if missing:
        q, k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    work = whole(rows + missing, slots.shape[0], num_decode)
    workers = plan.groups + 1
    items = num_decode * heads * (value_dim // tile.columns)
    sharing = share(work.items * heads * plan.parts, items, workers, turns, first)

    def lightning_mixed_kernel(
        q_ref, k_ref, v_ref, g_ref, decode_slots_ref, slots_ref, cu_ref, fresh_ref, pool_ref, o_ref,
        **shared,
    ):  # fmt: skip
        is_segments, index = role(sharing, lax.axis_index("block"))

        # First: what a feeder's few registers can reach would be compiled for as few.
        @pl.when(~is_segments)
        def _():
            fold_rows(
                tile, sharing.turns, workers, scale, index,
                q_ref, k_ref, v_ref, g_ref, decode_slots_ref, pool_ref, o_ref,
            )  # fmt: skip

        @pl.when(is_segments)
        def _():
            tables = g_ref, slots_ref, cu_ref, fresh_ref
            fold_segments(
                plan, work, index, q_ref, k_ref, v_ref, *tables, pool_ref, o_ref, shared=shared
            )

    kernel = plgpu.kernel(
        lightning_mixed_kernel,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        scratch_types=gpu_prefill.scratch(plan, v.dtype, q=True),
        grid=(sharing.segments + sharing.rows,),
        grid_names=("block",),
        num_threads=workers,
        thread_name="group",
        # Sums over K stay within a warp.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    pool = jax.new_ref(state)
    o = kernel(q, k, v, log_decay, decode_slots, slots, cu_seqlens, is_fresh, pool)
    return o[:rows], jax.freeze(pool)


def share(segments: int, items: int, workers: int, turns: int | None, first: int) -> Sharing:
    """`items` of decode rows over blocks of `workers` warpgroups, beside `segments` blocks."""
    if turns is None:
        turns = min(8, max(1, items // (workers * _MULTIPROCESSORS * _BLOCKS_EACH)))
    return Sharing(segments, -(-items // (workers * turns)), turns, min(first, segments))


def role(sharing: Sharing, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a block folds segments, and its number among its kind."""
    spread = sharing.segments - sharing.first
    late = block - sharing.first
    if not spread:
        return late < 0, jnp.where(late < 0, block, late)
    total = spread + sharing.rows
    if spread * (total + 1) >= 1 << 31:
        # Beyond int32 below; so many blocks are in no need of spreading.
        late = block - sharing.segments
        return late < 0, jnp.where(late < 0, block, late)
    # Of `total` late blocks `spread`, as evenly as whole numbers allow.
    before = late * spread // total
    is_segments = (late < 0) | ((late + 1) * spread // total > before)
    number = jnp.where(late < 0, block, sharing.first + before)
    return is_segments, jnp.where(is_segments, number, late - before)


def fold_rows(
    tile: WarpTile, turns: int, workers: int, scale: float, block: jax.Array,
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, slots_ref: Any, pool_ref: Any, o_ref: Any,
) -> None:  # fmt: skip
    """A block's decode rows: neighbouring items for its warpgroups, `turns` times."""
    heads, parts = q_ref.shape[1], v_ref.shape[-1] // tile.columns
    items = slots_ref.shape[0] * heads * parts
    layout = warp_layout(tile)
    mine = block * (turns * workers) + lax.axis_index("group")

    def slot_of(turn):
        # Clamped: the last block's last turns may have no item.
        return slots_ref[jnp.minimum(mine + turn * workers, items - 1) // (heads * parts)]

    def fold(turn, slot):
        item = mine + turn * workers
        row, head, part = item // (heads * parts), item // parts % heads, item % parts
        columns = pl.ds(part * tile.columns, tile.columns)
        o_part = o_ref.at[row, head, columns]
        # On its way while this one's state is.
        next_slot = slot_of(turn + 1)

        @pl.when((item < items) & (slot != 0))
        def _():
            s_part = pool_ref.at[slot, head, :, columns]
            s = load_wide(s_part, layout)
            q, k = (load_wide(ref.at[row, head], layout.reduce(1)) for ref in (q_ref, k_ref))
            v = load_wide(v_ref.at[row, head, columns], layout.reduce(0))
            (s,), o = fold_row([s], [q], [k], v, expm1(g_ref[head]))
            compat.store_from_registers(s_part, s.astype(pool_ref.dtype))
            compat.store_from_registers(o_part, (scale * o).astype(o_ref.dtype))

        @pl.when((item < items) & (slot == 0))
        def _():
            store_zeros(o_part, layout.reduce(0))

        return next_slot

    lax.fori_loop(0, turns, fold, slot_of(0))
