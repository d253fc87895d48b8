"""The best columns: both forms against a stable sort, and which form a platform compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.top_k import by_rounds, top_k_ids

FORMS = {"this platform's": top_k_ids, "by rounds": by_rounds}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("k", [1, 2, 8, 19])
@pytest.mark.parametrize("excluded", [0, 4])
def test_r109_the_best_first_and_of_equals_the_first(
    rng: np.random.Generator, form: Callable[[jax.Array, int], jax.Array], k: int, excluded: int
) -> None:
    """Every other row has ties, also at the edge; dropped groups are -infinity."""
    scores = rng.standard_normal((37, 23)).astype(np.float32)
    scores[::2] = np.round(scores[::2] * 2) / 2 + 0.0  # no -0.0
    for row in scores:
        row[rng.permutation(23)[:excluded]] = -np.inf
    got = jax.jit(functools.partial(form, k=k))(scores)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argsort(-scores, axis=1, kind="stable")[:, :k])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_of_nan_gets_columns_and_disturbs_no_other(
    rng: np.random.Generator, form: Callable[[jax.Array, int], jax.Array]
) -> None:
    scores = rng.standard_normal((7, 11)).astype(np.float32)
    want = np.asarray(form(jnp.asarray(scores), 3))
    scores[2], scores[5, 4] = np.nan, np.nan
    got = np.asarray(form(jnp.asarray(scores), 3))
    others = [0, 1, 3, 4, 6]
    np.testing.assert_array_equal(got[others], want[others])
    assert ((got >= 0) & (got < 11)).all()


def test_a_tpu_gets_rounds_and_others_their_own_top_k() -> None:
    traced = jax.jit(lambda scores: top_k_ids(scores, 8)).trace(jnp.zeros((64, 256)))
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu")}
    assert "top_k" not in texts["tpu"]
    assert "top_k" in texts["cpu"]
