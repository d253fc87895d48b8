"""Lightning prefill on Hopper GPUs: the choice of the kernel, and its gradients.

bfloat16 rows with heads of multiples of 64 go through the matrix units (`gpu_prefill`), everything
else token by token (`gpu_scan`). With dS_t the gradient of the state after token t, and the scale
left out:

    dq_t = S_t do_t                                the fold of (do, v, k) over S^T
    dS_t = exp(g) dS_{t+1} + q_t do_t^T            from the last row to the first
    dv_t = dS_t^T k_t      dk_t = dS_t v_t         the reverse folds of (k, q, do) and (v, do, q)

so on the matrix units every product runs on the kernels of the forward pass and no state of a chunk
is kept. The decay is a constant of the model; who asks for its gradient gets that of the `train`
form, as do all gradients where there is only the scan.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_attention import gpu_prefill, gpu_scan, train
from pallas_kernels.lightning_attention.gpu_prefill import Variant
from pallas_kernels.lightning_attention.gpu_work import Segments


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
    chunk_size: int = 64,
    **tuning: Any,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_prefill`; the chunk is the kernel's own, `tuning` as in `Variant`.

    `chunk_size` is that of the decay's gradient.
    """
    segments = Segments(slots, cu_seqlens, is_fresh)
    return _prefill(Variant(scale, **tuning), chunk_size, q, k, v, log_decay, state, segments)


def why_not(q: jax.Array, v: jax.Array, state: jax.Array) -> str | None:
    """Why no kernel can run on arrays like these, or None."""
    return gpu_prefill.why_not(q, v, state) and gpu_scan.why_not(q, v, state)


def _run(variant: Variant, q, k, v, log_decay, state, segments):
    if gpu_prefill.why_not(q, v, state) is None:
        return gpu_prefill.run(q, k, v, log_decay, state, segments, variant)
    return gpu_scan.run(q, k, v, log_decay, state, segments, variant.scale, variant.blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _prefill(variant: Variant, chunk_size: int, q, k, v, log_decay, state, segments):
    return _run(variant, q, k, v, log_decay, state, segments)


def _forward(variant: Variant, chunk_size: int, q, k, v, log_decay, state, segments):
    # The rows of the pool that are read, not the pool: it is overwritten.
    fresh = segments.is_fresh[:, None, None, None]
    entering = jnp.where(fresh, 0, state[segments.slots].astype(jnp.float32))
    out = _run(variant, q, k, v, log_decay, state, segments)
    return out, (q, k, v, log_decay, entering, segments)


def _backward(variant: Variant, chunk_size: int, saved, gradients):
    q, k, v, log_decay, entering, segments = saved
    do, d_pool = gradients
    slots, cu_seqlens, is_fresh = segments
    runs = (cu_seqlens[1:] > cu_seqlens[:-1]) & (slots != 0)
    leaving = jnp.where(runs[:, None, None, None], d_pool[slots].astype(jnp.float32), 0)
    # A pool of the segments alone: segment p has slot p + 1.
    own = jnp.where(slots != 0, jnp.arange(1, slots.shape[0] + 1, dtype=slots.dtype), 0)
    own = Segments(own, cu_seqlens, jnp.zeros_like(is_fresh))

    def by_train(q, k, v, log_decay, entering):
        return train.lightning_prefill(
            q, k, v, log_decay, _pool(entering), slots=own.slots, cu_seqlens=cu_seqlens,
            is_fresh=own.is_fresh, scale=variant.scale, chunk_size=chunk_size,
        )  # fmt: skip

    # What of this nobody uses is left out of the compiled program.
    pull = jax.vjp(by_train, q, k, v, log_decay, entering)[1]
    dq, dk, dv, d_log_decay, d_entering = pull((do, _pool(leaving)))
    across = entering.swapaxes(-1, -2)
    if all(gpu_prefill.why_not(q, x, s) is None for x, s in ((v, entering), (q, across))):
        dq, dk, dv, d_entering = _by_kernels(variant, saved, do, leaving, own)
    # What a fresh segment's slot held has no influence; slots of nobody pass theirs on.
    d_entering = jnp.where(is_fresh[:, None, None, None], 0, d_entering).astype(d_pool.dtype)
    written = jnp.where(runs, slots, d_pool.shape[0])
    d_pool = d_pool.at[written].set(d_entering, mode="drop")
    return dq, dk, dv, d_log_decay, d_pool, None


def _by_kernels(variant: Variant, saved, do: jax.Array, leaving: jax.Array, own: Segments):
    """Gradients of q, k, v and of the states that segments entered with."""
    q, k, v, log_decay, entering, _ = saved

    def fold(q, k, v, pool, **how):
        return gpu_prefill.run(q, k, v, log_decay, pool, own, variant._replace(**how))

    back = {"scale": 1.0, "value_scale": variant.scale, "reverse": True}
    dq, _ = fold(do, v, k, _pool(entering.swapaxes(-1, -2)))
    dk, _ = fold(v, do, q, _pool(leaving.swapaxes(-1, -2)), **back)
    dv, d_states = fold(k, q, do, _pool(leaving), **back)
    return dq, dk, dv, d_states[1:]


def _pool(states: jax.Array) -> jax.Array:
    """With an empty slot 0 before them."""
    return jnp.pad(states, ((1, 0), (0, 0), (0, 0), (0, 0)))


_prefill.defvjp(_forward, _backward)
