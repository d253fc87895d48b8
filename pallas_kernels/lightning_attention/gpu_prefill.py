"""Lightning prefill on NVIDIA Hopper GPUs (Mosaic GPU): one pass, the state stays in registers.

One block a (piece of a segment, head, 64 columns of V). `groups` warpgroups share its chunks of
64 * groups rows: each computes 64 rows of the output and holds K / groups rows of the state. One
more warpgroup only starts the loads. Of a chunk with the segment's rows lo..hi-1 and middle row m
everything is put on the scale of row m, so that the scores need no decay but only a mask:

    S~  = exp((m + 1 - lo) g) S         w_j = exp((m - j) g) v_j
    o_i = scale exp((i - m) g) (q_i S~ + sum_{j<=i} (q_i . k_j) w_j)
    S   = exp((hi - 1 - m) g) (S~ + k^T w)

Factors stay within exp(+-64), which bfloat16 holds: heads that forget faster take 8 rows at a time.

Segments too few to fill the GPU are cut (`gpu_work`): a first kernel sums up k^T w of each piece,
the second adds the sums of the pieces before its own to the state it starts from.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.lightning_attention.gpu_chunks import (
    COLUMNS,
    ROWS,
    Plan,
    fold_segments,
    sum_pieces,
)
from pallas_kernels.lightning_attention.gpu_work import ALIGNED_ROWS, Cut, cut

# Shared memory of a block on Hopper, less what barriers take.
_SHARED_BYTES = 227 * 1024 - 512
_MULTIPROCESSORS = 132


def make_plan(heads: int, key_dim: int, value_dim: int, groups: int | None = None) -> Plan | None:
    """Two warpgroups where K divides between them, as many stages as fit; None if nothing fits."""
    groups = groups or (2 if key_dim % (2 * ROWS) == 0 else 1)
    chunk = ROWS * groups
    stage = 2 * chunk * (2 * key_dim + COLUMNS)
    fixed = 2 * (2 * key_dim * COLUMNS + chunk * COLUMNS)
    stages = min(3, (_SHARED_BYTES - fixed) // stage)
    if key_dim % (ROWS * groups) or value_dim % COLUMNS or stages < 1:
        return None
    return Plan(heads, key_dim, value_dim // COLUMNS, groups, stages)


def supports(q, k, v, log_decay, state, **_) -> str | None:
    """Why the kernel can't run this call, or None."""
    reason = compat.why_no_mosaic_gpu()
    if reason is not None:
        return reason
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: the matrix units want bfloat16"
    key_dim, value_dim = state.shape[-2:]
    if make_plan(state.shape[1], key_dim, value_dim) is None:
        return f"key dim {key_dim} and value dim {value_dim}: want multiples of 64, keys up to 256"
    return None


def lightning_prefill(
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
    chunk_size: int = 0,
    groups: int | None = None,
    wanted_blocks: int = _MULTIPROCESSORS,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_prefill`; the chunk is the kernel's own, `groups` overrides its choice."""
    del chunk_size
    rows, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    plan = make_plan(heads, key_dim, value_dim, groups)
    if plan is None:
        raise ValueError(f"no kernel for key dim {key_dim} and value dim {value_dim}")
    # A copy of all the rows, for numbers of rows that no engine uses.
    missing = max(-rows % ALIGNED_ROWS, plan.chunk - rows)
    if missing:
        q, k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    work = cut(rows + missing, slots.shape[0], heads * plan.parts, plan.chunk, wanted_blocks)
    tables = (log_decay, slots, cu_seqlens, is_fresh.astype(jnp.int32))
    pool = jax.new_ref(state)
    sums = ()
    if work.span:
        shape = jax.ShapeDtypeStruct((work.summed, *state.shape[1:]), jnp.float32)

        def lightning_prefill_sums(*refs, **shared):
            sum_pieces(plan, work, *refs, shared=shared)

        sums = (_kernel(lightning_prefill_sums, plan, work, shape, q=False)(k, v, *tables, pool),)

    def lightning_prefill_fold(*refs, **shared):
        fold_segments(plan, work, scale, *refs, shared=shared)

    shape = jax.ShapeDtypeStruct(v.shape, v.dtype)
    fold = _kernel(lightning_prefill_fold, plan, work, shape, q=True)
    o = fold(q, k, v, *tables, *sums, pool)
    return o[:rows], jax.freeze(pool)


def _kernel(body, plan: Plan, work: Cut, out_type: jax.ShapeDtypeStruct, *, q: bool):
    """`body(*refs, **shared)` over all items, heads and parts of V; `q`: with outputs of rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    chunk, stages = plan.chunk, plan.stages
    for_wgmma = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=for_wgmma)
    shared = {
        "k": tiled((stages, chunk, plan.key_dim)),
        "v": tiled((stages, chunk, COLUMNS)),
        "full": plgpu.Barrier(num_arrivals=3 if q else 2, num_barriers=stages),
        "done": plgpu.Barrier(num_arrivals=plan.groups, num_barriers=stages),
    }
    if plan.groups > 1:
        shared["met"] = plgpu.Barrier(num_arrivals=plan.groups)
    if q:
        shared["q"] = tiled((stages, chunk, plan.key_dim))
        shared["s"] = tiled((2, plan.key_dim, COLUMNS))
        # Not tiled: copies of any number of rows start at any row.
        shared["o"] = plgpu.SMEM((plan.groups, ROWS, COLUMNS), out_type.dtype)
        if compat.is_interpreting_mosaic_gpu():
            shared["scores"] = plgpu.SMEM((plan.groups, ROWS, chunk), jnp.bfloat16)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=shared,
        grid=(work.items * plan.heads * plan.parts,),
        grid_names=("block",),
        num_threads=plan.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
