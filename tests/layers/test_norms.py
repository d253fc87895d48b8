"""RMSNorm and GroupRMSNorm against plain float64, and where the publishers round."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from module_scope import scope_of
from tolerances import TOLERANCES

from bailing_jax.layers.norms import RMSNorm


def norm(weight: np.ndarray, eps: float, groups: int = 1) -> RMSNorm:
    return RMSNorm(scope_of({"weight": weight}), eps, groups)


def float64_norm(x: np.ndarray, weight: np.ndarray, eps: float, groups: int = 1) -> np.ndarray:
    """One mean of squares for each run of width / groups channels."""
    x, y = x.astype(np.float64), np.empty(x.shape)
    size = x.shape[-1] // groups
    for start in range(0, x.shape[-1], size):
        part = x[..., start : start + size]
        y[..., start : start + size] = part / np.sqrt((part**2).mean(-1, keepdims=True) + eps)
    return y * weight


def test_r009_golden_group_norm() -> None:
    x = np.sin(0.7 * np.arange(8) + 1.1)
    want = [
        1.22875189, 1.47696135, 0.99017195, -0.10462833,
        -1.28923039, -1.99574162, -1.78297226, -0.63600585,
    ]  # fmt: skip
    got = norm(1 + 0.1 * np.arange(8, dtype=np.float32), 1e-6, groups=2)(jnp.asarray(x[None]))
    np.testing.assert_allclose(got[0], want, rtol=TOLERANCES["norm"])


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_r009_group_size_counts_groups(groups: int, eps: float, rng: np.random.Generator) -> None:
    # Each channel has its own scale, so that the mean over other channels shows.
    x = (rng.standard_normal((5, 12)) * 2.0 ** np.arange(12)).astype(np.float32)
    weight = rng.standard_normal(12).astype(np.float32)
    got = norm(weight, eps, groups)(jnp.asarray(x))
    assert got.dtype == jnp.float32
    want = float64_norm(x, weight, eps, groups)
    np.testing.assert_allclose(got, want, rtol=TOLERANCES["norm"])


def test_one_group_is_the_plain_norm(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((3, 5, 14)), jnp.float32)
    weight = rng.standard_normal(14).astype(np.float32)
    assert (norm(weight, 1e-6, 1)(x) == norm(weight, 1e-6)(x)).all()
    assert not np.allclose(norm(weight, 1e-6, 2)(x), norm(weight, 1e-6)(x), rtol=0.1)


def test_a_group_does_not_see_its_neighbours(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 15)).astype(np.float32)
    other = x.copy()
    other[:, 5:10] *= 100
    module = norm(np.ones(15, np.float32), 1e-6, 3)
    a, b = np.asarray(module(jnp.asarray(x))), np.asarray(module(jnp.asarray(other)))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    np.testing.assert_array_equal(a[:, 10:], b[:, 10:])


def test_zero_rows_stay_zero() -> None:
    module = norm(np.full(6, 3.0, np.float32), 1e-6, 2)
    assert not np.asarray(module(jnp.zeros((2, 6)))).any()


def test_eps_sits_inside_the_root() -> None:
    x = np.full((1, 8), 1e-3, np.float32)
    got = np.asarray(norm(np.ones(8, np.float32), 1e-6)(jnp.asarray(x)))
    np.testing.assert_allclose(got, 2**-0.5, rtol=TOLERANCES["norm"])


def test_r009_bfloat16_rounds_once_before_the_weight(rng: np.random.Generator) -> None:
    """Statistics are float32; the normalised value is rounded, then the weight multiplies."""
    x = rng.standard_normal((7, 22)).astype(ml_dtypes.bfloat16)
    weight = rng.standard_normal(22).astype(ml_dtypes.bfloat16)
    got = norm(weight, 1e-6, 2)(jnp.asarray(x))
    assert got.dtype == jnp.bfloat16
    normalised = float64_norm(x, np.ones(22), 1e-6, 2).astype(ml_dtypes.bfloat16)
    want = (normalised.astype(np.float32) * weight.astype(np.float32)).astype(ml_dtypes.bfloat16)
    # The other order, one rounding at the end, differs in a tenth of the values or more.
    late = float64_norm(x, weight.astype(np.float64), 1e-6, 2).astype(ml_dtypes.bfloat16)
    assert (late != want).mean() > 0.1
    assert (np.asarray(got) != want).mean() < 0.02


def test_large_values_do_not_overflow_float32_statistics() -> None:
    x = jnp.full((1, 6), 2.0**60, jnp.bfloat16)
    got = norm(np.ones(6, ml_dtypes.bfloat16), 1e-6)(x)
    np.testing.assert_array_equal(jax.device_get(got).astype(np.float32), 1.0)
