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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.lightning_attention.gpu_chunks import COLUMNS, ROWS, Plan
from pallas_kernels.lightning_attention.gpu_kernels import fold_segments, sum_pieces
from pallas_kernels.lightning_attention.gpu_work import ALIGNED_ROWS, Segments, cut

plgpu = compat.mosaic_gpu()

# Shared memory of a block on Hopper, less what barriers take.
_SHARED_BYTES = 227 * 1024 - 512
_MULTIPROCESSORS = 132
# Beyond, the state no longer fits in a warpgroup's registers.
_MOST_KEYS = 256


class Variant(NamedTuple):
    """What the recurrence multiplies and which way it runs (`gpu_chunks.Plan`), and tuning.

    `groups` of warpgroups a block (None: by K); `blocks` that one long segment is cut for
    (None: the kernels' own).
    """

    scale: float
    value_scale: float = 1.0
    reverse: bool = False
    groups: int | None = None
    blocks: int | None = None


def make_plan(heads: int, key_dim: int, value_dim: int, variant: Variant) -> Plan | None:
    """Two warpgroups where K divides between them, as many stages as fit; None if nothing fits."""
    groups = variant.groups or (2 if key_dim % (2 * ROWS) == 0 else 1)
    chunk = ROWS * groups
    stage = 2 * chunk * (2 * key_dim + COLUMNS)
    fixed = 2 * (2 * key_dim * COLUMNS + chunk * COLUMNS)
    stages = min(3, (_SHARED_BYTES - fixed) // stage)
    if key_dim % chunk or key_dim > _MOST_KEYS or value_dim % COLUMNS or stages < 1:
        return None
    return Plan(
        heads, key_dim, value_dim // COLUMNS, groups, stages,
        variant.scale, variant.value_scale, variant.reverse,
    )  # fmt: skip


def why_not(q: jax.Array, v: jax.Array, state: jax.Array) -> str | None:
    """Why the kernel can't run on arrays like these, or None."""
    if q.dtype != jnp.bfloat16 or v.dtype != jnp.bfloat16:
        return f"q is {q.dtype} and v {v.dtype}: the matrix units take bfloat16"
    heads, key_dim, value_dim = state.shape[1:]
    if make_plan(heads, key_dim, value_dim, Variant(scale=1.0)) is None:
        return f"key dim {key_dim} and value dim {value_dim}: want multiples of 64, keys up to 256"
    return None


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segments: Segments,
    variant: Variant,
) -> tuple[jax.Array, jax.Array]:
    """`api.lightning_prefill` on the kernels, not differentiable.

    Raises:
        ValueError: no kernel for these head dimensions.
    """
    rows, heads, key_dim = q.shape
    if variant.groups is None and rows < 2 * ROWS and key_dim <= 2 * ROWS:
        # Not even one chunk of two warpgroups: take what needs no padding.
        variant = variant._replace(groups=1)
    plan = make_plan(heads, key_dim, v.shape[-1], variant)
    if plan is None:
        raise ValueError(f"no kernel for key dim {key_dim} and value dim {v.shape[-1]}")
    # A copy of all the rows, for numbers of rows that no engine uses.
    missing = max(-rows % ALIGNED_ROWS, plan.chunk - rows)
    if missing:
        q, k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    num_segments = segments.slots.shape[0]
    blocks = variant.blocks or _MULTIPROCESSORS
    work = cut(rows + missing, num_segments, heads * plan.parts, plan.chunk, blocks)
    pool = jax.new_ref(state)
    sums = ()
    if work.windows:
        shape = jax.ShapeDtypeStruct((work.stored, *state.shape[1:]), jnp.float32)

        def lightning_prefill_sums(*refs, **shared):
            sum_pieces(plan, work, *refs, shared=shared)

        summing = _kernel(lightning_prefill_sums, plan, work.windows, shape, q=False)
        sums = (summing(k, v, log_decay, *segments, pool),)

    def lightning_prefill_fold(*refs, **shared):
        fold_segments(plan, work, *refs, shared=shared)

    shape = jax.ShapeDtypeStruct(v.shape, v.dtype)
    folding = _kernel(lightning_prefill_fold, plan, work.items, shape, q=True)
    o = folding(q, k, v, log_decay, *segments, *sums, pool)
    return o[:rows], jax.freeze(pool)


def _kernel(body, plan: Plan, items: int, out_type: jax.ShapeDtypeStruct, *, q: bool):
    """`body(*refs, **shared)` over all items, heads and parts of V; `q`: with outputs of rows."""
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
        grid=(items * plan.heads * plan.parts,),
        grid_names=("block",),
        num_threads=plan.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
