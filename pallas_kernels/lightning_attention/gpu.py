"""When lightning attention runs on the kernels for NVIDIA Hopper GPUs.

The modules of the kernels import Mosaic GPU, so they are asked only where it can run at all.
"""

from __future__ import annotations

import jax

from pallas_kernels import compat
from pallas_kernels.dispatch import Supports, lazily


def _supports(module: str) -> Supports:
    """The `supports` of kernels whose module has a `why_not(q, v, state)`."""
    why_not = lazily(f"{__package__}.{module}", "why_not")

    def supports(
        q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array
    ) -> str | None:
        if q.dtype != k.dtype:
            return f"q is {q.dtype} and k {k.dtype}: want one dtype"
        return compat.why_no_mosaic_gpu() or why_not(q, v, state)

    return supports


prefill_supports = _supports("gpu_grad")
decode_supports = _supports("gpu_decode")
