"""Lightning prefill on Hopper GPUs token by token: any head size and dtype, float32 throughout.

    S <- exp(g) S + k v^T        o = scale * S^T q

For what the matrix units do not take (`gpu_prefill`): float32 rows, and head sizes that are no
multiples of 64. One block a (segment, head, part of V), its part of the state in registers as in
`gpu_decode`; the copy engine brings the next rows of q, k and v while these are folded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.lightning_attention import gpu_decode
from pallas_kernels.lightning_attention.gpu_decode import expm1, register_layout, state_tile
from pallas_kernels.lightning_attention.gpu_work import Segments, locate, whole

plgpu = compat.mosaic_gpu()

# Rows in shared memory at once, twice; and entries of the state a thread holds, few, so that one
# segment alone makes many blocks.
_ROWS, _STAGES, _ENTRIES = 16, 2, 32


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
) -> tuple[jax.Array, jax.Array]:
    """`api.lightning_prefill` on the kernel, not differentiable.

    Raises:
        ValueError: no kernel for these head dimensions.
    """
    num_rows, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    tile = state_tile(key_dim, value_dim, _ENTRIES) or state_tile(key_dim, value_dim, 2 * _ENTRIES)
    if tile is None:
        raise ValueError(f"no register tile for a state of {key_dim} by {value_dim}")
    layout, shape = register_layout(tile), (key_dim, tile.columns)
    parts, rows_at_once = value_dim // tile.columns, min(_ROWS, num_rows)
    items = whole(num_rows, segments.slots.shape[0])

    def lightning_prefill_scan(
        q_ref, k_ref, v_ref, g_ref, slots_ref, cu_ref, fresh_ref, pool_ref, o_ref, **shared
    ):
        block = lax.axis_index("block")
        part, head = block % parts, block // parts % heads
        work = locate(block // (parts * heads), items, cu_ref, slots_ref)
        columns = pl.ds(part * tile.columns, tile.columns)
        slot_state = pool_ref.at[work.slot, head, :, columns]
        chunks = (work.end - work.begin + rows_at_once - 1) // rows_at_once
        forgotten = expm1(g_ref[head])

        def feed(c):
            rows, stage = pl.ds(work.begin + c * rows_at_once, rows_at_once), c % _STAGES
            arrived = shared["full"].at[stage]
            plgpu.copy_gmem_to_smem(q_ref.at[rows, head], shared["q"].at[stage], arrived)
            plgpu.copy_gmem_to_smem(k_ref.at[rows, head], shared["k"].at[stage], arrived)
            plgpu.copy_gmem_to_smem(v_ref.at[rows, head, columns], shared["v"].at[stage], arrived)

        def vector(name, stage, row, axis):
            x = plgpu.load(shared[name].at[stage, row], layout=layout.reduce(axis), optimized=False)
            return lax.broadcast_in_dim(x.astype(jnp.float32), shape, (1 - axis,))

        def put(row, o):
            compat.store_from_registers(o_ref.at[row, head, columns], o.astype(o_ref.dtype))

        def chunk(c, s):
            stage, first_row = c % _STAGES, work.begin + c * rows_at_once
            plgpu.barrier_wait(shared["full"].at[stage])

            def token(row, s):
                added = vector("k", stage, row, 1) * vector("v", stage, row, 0)
                s = s + forgotten * s + added
                put(first_row + row, scale * jnp.sum(s * vector("q", stage, row, 1), axis=0))
                return s

            s = lax.fori_loop(0, jnp.minimum(rows_at_once, work.end - first_row), token, s)
            # All warps have read the stage before it is filled again.
            plgpu.commit_smem()
            pl.when(c + _STAGES < chunks)(lambda: feed(c + _STAGES))
            return s

        @pl.when((work.slot != 0) & (work.end > work.begin))
        def _():
            for c in range(_STAGES):
                pl.when(c < chunks)(lambda c=c: feed(c))
            nothing = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            start = lax.cond(
                fresh_ref[work.segment],
                lambda: nothing,
                lambda: plgpu.load(slot_state, layout=layout, optimized=False).astype(jnp.float32),
            )
            s = lax.fori_loop(0, chunks, chunk, start)
            compat.store_from_registers(slot_state, s.astype(pool_ref.dtype))

        @pl.when(work.slot == 0)
        def _():
            nothing = jnp.zeros((tile.columns,), jnp.float32)

            @pl.loop(work.begin, work.end)
            def _(row):
                put(row, plgpu.layout_cast(nothing, layout.reduce(0)))

    kernel = plgpu.kernel(
        lightning_prefill_scan,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        scratch_types={
            "q": plgpu.SMEM((_STAGES, rows_at_once, key_dim), q.dtype),
            "k": plgpu.SMEM((_STAGES, rows_at_once, key_dim), k.dtype),
            "v": plgpu.SMEM((_STAGES, rows_at_once, tile.columns), v.dtype),
            "full": plgpu.Barrier(num_arrivals=3, num_barriers=_STAGES),
        },
        grid=(items.items * heads * parts,),
        grid_names=("block",),
    )
    pool = jax.new_ref(state)
    o = kernel(q, k, v, log_decay, *segments, pool)
    return o, jax.freeze(pool)
