"""Latent attention over pages against dense float64 softmax."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import Call, causal_attention
from paged_laws import IMPLEMENTATIONS, PagedLaws

from pallas_kernels import latent_attention

pytestmark = pytest.mark.unoptimised

# Heads, latent rank, roped channels.
N, R, P = 3, 7, 5
SCALE = 0.37


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestLatentAttention(PagedLaws):
    token = (R + P,)
    query = (N, R + P)

    def run(self, implementation: str, call: Call) -> tuple[np.ndarray, np.ndarray]:
        o, pages = latent_attention(
            *(jnp.asarray(x) for x in (call.q, call.rows, call.pages)),
            value_dim=R,
            page_table=jnp.asarray(call.page_table),
            context_lengths=jnp.asarray(call.context_lengths),
            cu_seqlens=None if call.cu_seqlens is None else jnp.asarray(call.cu_seqlens),
            scale=SCALE,
            implementation=implementation,
        )
        return np.asarray(o), np.asarray(pages)

    def attend(self, q: np.ndarray, tokens: np.ndarray, context: int) -> np.ndarray:
        keys = np.repeat(tokens[:, None], N, axis=1)
        return causal_attention(q, keys, keys[:, :, :R], context, SCALE)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"latents": (5, R)}, "latents"),
            ({"pages": (41, 4, R)}, r"pages"),
            ({"pages": (41, 4, 1, R + P)}, r"pages"),
            ({"value_dim": R + P + 1}, "value_dim 13: want 1 to 12"),
            ({"value_dim": 0}, "value_dim 0"),
            ({"page_table": (4, 9)}, "page_table"),
            ({"cu_seqlens": (5,)}, "cu_seqlens"),
        ],
    )
    def test_r039_wrong_shapes_are_refused(self, implementation, changed, said):
        shapes = {
            "q": (5, N, R + P), "latents": (5, R + P), "pages": (41, 4, R + P),
            "page_table": (5, 9), "context_lengths": (5,), "value_dim": R, **changed,
        }  # fmt: skip
        arrays = {
            name: shape if name == "value_dim" else jnp.zeros(shape)
            for name, shape in shapes.items()
        }
        with pytest.raises(ValueError, match=said):
            latent_attention(**arrays, scale=SCALE, implementation=implementation)
