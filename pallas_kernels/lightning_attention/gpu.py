"""Lightning attention on NVIDIA Hopper GPUs: what `api` registers as "gpu".

The kernels (`gpu_prefill`, `gpu_scan`, `gpu_decode`) and Mosaic GPU under them are loaded by the
first call that can run: elsewhere that would only make every start slower.
"""

from __future__ import annotations

import jax

from pallas_kernels import compat


def prefill_supports(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array
) -> str | None:
    """Why "gpu" can't run this prefill, or None."""
    reason = _why_no_gpu(q, k)
    if reason is not None:
        return reason
    from pallas_kernels.lightning_attention import gpu_grad

    return gpu_grad.why_not(q, v, state)


def lightning_prefill(q, k, v, log_decay, state, **options) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_prefill`."""
    from pallas_kernels.lightning_attention import gpu_grad

    return gpu_grad.lightning_prefill(q, k, v, log_decay, state, **options)


def decode_supports(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array
) -> str | None:
    """Why "gpu" can't run this decode, or None."""
    reason = _why_no_gpu(q, k)
    if reason is not None:
        return reason
    from pallas_kernels.lightning_attention import gpu_decode

    return gpu_decode.why_not(q, v, state)


def lightning_decode(q, k, v, log_decay, state, **options) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_decode`."""
    from pallas_kernels.lightning_attention import gpu_decode

    return gpu_decode.lightning_decode(q, k, v, log_decay, state, **options)


def _why_no_gpu(q: jax.Array, k: jax.Array) -> str | None:
    if q.dtype != k.dtype:
        return f"q is {q.dtype} and k {k.dtype}: want one dtype"
    return compat.why_no_mosaic_gpu()
