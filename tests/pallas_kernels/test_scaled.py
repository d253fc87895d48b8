"""Products with matrices that have a scale for each column."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import einsum
from pallas_kernels.scaled import Scaled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_is_its_columns(dtype: str) -> None:
    """Of one of a stack of matrices, and of all, each with the head that it belongs to.

    Small integers and powers of two: no product is rounded.
    """
    random = np.random.default_rng(5)
    values = random.integers(-8, 9, (3, 8, 5))
    scales = 2.0 ** random.integers(-3, 4, (3, 1, 5))
    x = random.integers(-8, 9, (4, 3, 8))
    want = np.einsum("tni,nio->tno", x, values * scales)
    stack = Scaled(jnp.asarray(values, jnp.float8_e4m3fn), jnp.asarray(scales, jnp.float32))
    rows = jnp.asarray(x, dtype)
    np.testing.assert_array_equal(einsum("tni,nio->tno", rows, stack[...]), want)
    one = einsum("ti,io->to", rows[:, 1], stack[1])
    assert one.dtype == jnp.float32
    np.testing.assert_array_equal(one, want[:, 1])
