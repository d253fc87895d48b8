"""Operators on arrays: lightning attention, paged attention, experts. Knows nothing of models.

Every operator has one public function with all shape checks (`api.py`), a plain reference that
is its specification (`reference.py`) and implementations for the machines. State and pages are
given and returned; callers donate them, so that a step updates them in place.
"""

from pallas_kernels.grouped_matmul.api import expert_mlp
from pallas_kernels.latent_attention.api import latent_attention
from pallas_kernels.lightning_attention.api import lightning_decode, lightning_prefill
from pallas_kernels.lightning_attention.fused import choose_fused_decode
from pallas_kernels.paged_attention.api import paged_attention

__all__ = [
    "choose_fused_decode",
    "expert_mlp",
    "latent_attention",
    "lightning_decode",
    "lightning_prefill",
    "paged_attention",
]
