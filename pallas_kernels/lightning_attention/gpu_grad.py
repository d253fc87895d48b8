"""Lightning prefill on Hopper GPUs, differentiable: the gradients are three prefills more.

With dS_t the gradient of the state after token t, and the scale left out:

    dq_t = S_t do_t                                the fold of (do, v, k) over S^T
    dS_t = exp(g) dS_{t+1} + q_t do_t^T            from the last row to the first
    dv_t = dS_t^T k_t      dk_t = dS_t v_t         the reverse folds of (k, q, do) and (v, do, q)

so every product runs on the kernels of the forward pass and no state of a chunk is kept. The decay
is a constant of the model; who asks for its gradient gets that of the `train` form.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_attention import gpu_prefill, train
from pallas_kernels.lightning_attention.gpu_prefill import Segments, Variant


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
    **tuning: int | None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_prefill`; the chunk is the kernel's own, `tuning` as in `Variant`.

    `chunk_size` is that of the decay's gradient.
    """
    segments = Segments(slots, cu_seqlens, is_fresh)
    return _prefill(Variant(scale, **tuning), chunk_size, q, k, v, log_decay, state, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _prefill(variant: Variant, chunk_size: int, q, k, v, log_decay, state, segments):
    return gpu_prefill.run(q, k, v, log_decay, state, segments, variant)


def _forward(variant: Variant, chunk_size: int, q, k, v, log_decay, state, segments):
    # The rows of the pool that are read, not the pool: it is overwritten.
    fresh = segments.is_fresh[:, None, None, None]
    entering = jnp.where(fresh, 0, state[segments.slots].astype(jnp.float32))
    out = gpu_prefill.run(q, k, v, log_decay, state, segments, variant)
    return out, (q, k, v, log_decay, entering, segments)


def _backward(variant: Variant, chunk_size: int, saved, gradients):
    q, k, v, log_decay, entering, segments = saved
    do, d_pool = gradients
    slots, cu_seqlens, is_fresh = segments
    dtype = d_pool.dtype
    d_pool = d_pool.astype(jnp.float32)
    # A small pool for the folds over transposed states: segment p has slot p + 1.
    own = jnp.where(slots != 0, jnp.arange(1, slots.shape[0] + 1, dtype=slots.dtype), 0)
    going_on = jnp.zeros_like(is_fresh)
    by_slot, by_segment = Segments(slots, cu_seqlens, going_on), Segments(own, cu_seqlens, going_on)

    def fold(q, k, v, pool, segments, **how):
        return gpu_prefill.run(q, k, v, log_decay, pool, segments, variant._replace(**how))

    def small_pool(states):
        return jnp.pad(states, ((1, 0), (0, 0), (0, 0), (0, 0)))

    def transposed(states):
        return small_pool(states.swapaxes(-1, -2))

    back = {"scale": 1.0, "value_scale": variant.scale, "reverse": True}
    dq, _ = fold(do, v, k, transposed(entering), by_segment)
    dk, _ = fold(v, do, q, transposed(d_pool[slots]), by_segment, **back)
    dv, d_state = fold(k, q, do, d_pool, by_slot, **back)
    # What a fresh segment's slot held has no influence.
    runs = (cu_seqlens[1:] > cu_seqlens[:-1]) & (slots != 0)
    ignored = jnp.where(runs & is_fresh, slots, d_state.shape[0])
    d_state = d_state.at[ignored].set(0, mode="drop").astype(dtype)

    def by_decay(log_decay):
        return train.lightning_prefill(
            q, k, v, log_decay, small_pool(entering), slots=own, cu_seqlens=cu_seqlens,
            is_fresh=going_on, scale=variant.scale, chunk_size=chunk_size,
        )  # fmt: skip

    # Left out of a compiled program that does not use it.
    (d_log_decay,) = jax.vjp(by_decay, log_decay)[1]((do, small_pool(d_pool[slots])))
    return dq, dk, dv, d_log_decay, d_state, None


_prefill.defvjp(_forward, _backward)
