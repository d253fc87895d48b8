"""Grouped-query attention over pages against dense float64 softmax."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from paged_cases import Call, Seq, causal_attention, kept, keys_and_values
from paged_laws import IMPLEMENTATIONS, PagedLaws

from pallas_kernels import paged_attention

pytestmark = pytest.mark.unoptimised

# 6 query heads on 3 key heads: groups of 2, so that no transposed grouping passes.
N, KH, H = 6, 3, 7
SCALE = 0.37


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestPagedAttention(PagedLaws):
    token = (KH * 2 * H,)
    query = (N, H)

    def run(self, implementation: str, call: Call) -> tuple[np.ndarray, np.ndarray]:
        o, pages = paged_attention(
            *(jnp.asarray(x) for x in (call.q, *keys_and_values(call.rows, KH), call.pages)),
            page_table=jnp.asarray(call.page_table),
            context_lengths=jnp.asarray(call.context_lengths),
            cu_seqlens=None if call.cu_seqlens is None else jnp.asarray(call.cu_seqlens),
            scale=SCALE,
            implementation=implementation,
        )
        return np.asarray(o), np.asarray(pages)

    def attend(self, q: np.ndarray, tokens: np.ndarray, context: int) -> np.ndarray:
        reads = [n * KH // N for n in range(N)]
        keys, values = keys_and_values(tokens, KH)
        return causal_attention(q, keys[:, reads], values[:, reads], context, SCALE)

    def test_one_key_head_each_and_one_for_all(self, rng, implementation):
        """A group of one and a group of all heads are grouped-query attention too."""
        call = self.small(rng, [Seq(5, 6), Seq(0, 9)])
        where = {
            "page_table": jnp.asarray(call.page_table),
            "context_lengths": jnp.asarray(call.context_lengths),
            "cu_seqlens": jnp.asarray(call.cu_seqlens),
            "scale": SCALE,
            "implementation": implementation,
        }
        q, (k, v), cached = call.q, keys_and_values(call.rows, KH), keys_and_values(call.pages, KH)
        grouped, _ = self.run(implementation, call)
        # Every query head brings its own copy of the key head it reads.
        reads = [n * KH // N for n in range(N)]
        pages = kept(*(x[:, :, reads] for x in cached))
        arrays = (jnp.asarray(x) for x in (q, k[:, reads], v[:, reads], pages))
        single, _ = paged_attention(*arrays, **where)
        assert_close(single, grouped, "attention", head_axis=1)
        # The heads of one group alone.
        pages = kept(*(x[:, :, 1:2] for x in cached))
        arrays = (jnp.asarray(x) for x in (q[:, 2:4], k[:, 1:2], v[:, 1:2], pages))
        one, _ = paged_attention(*arrays, **where)
        assert_close(one, grouped[:, 2:4], "attention", head_axis=1)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"pages": (41, 4, 2, KH, H)}, r"pages: want \[pages,size,42\], got"),
            ({"pages": (41, 4, KH * H)}, r"pages: want \[pages,size,42\], got"),
            ({"k": (5, KH + 1, H)}, "k "),
            ({"v": (5, KH, H + 1)}, "v "),
            ({"q": (5, N + 1, H)}, r"Kh\|N"),
            ({"page_table": (4, 9)}, "page_table"),
            ({"context_lengths": (4,)}, "context_lengths"),
            ({"cu_seqlens": (5,)}, "cu_seqlens"),
        ],
    )
    def test_r039_wrong_shapes_are_refused(self, implementation, changed, said):
        shapes = {
            "q": (5, N, H), "k": (5, KH, H), "v": (5, KH, H), "pages": (41, 4, KH * 2 * H),
            "page_table": (5, 9), "context_lengths": (5,), **changed,
        }  # fmt: skip
        arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        with pytest.raises(ValueError, match=said):
            paged_attention(**arrays, scale=SCALE, implementation=implementation)
