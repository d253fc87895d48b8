"""What the operators rely on of gather, scatter and sort, on the backend the tests run on.

Several pads name slot 0 and rewrite its own bits in one scatter; everything else promises indices
in bounds. None of this is checked at run time, and backends have broken each of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_bits, normal, poison

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@DTYPES
def test_r104_duplicates_with_equal_values_leave_that_value(rng, dtype):
    x, new = normal(rng, (7, 3, 5), dtype), normal(rng, (3, 5), dtype)
    index = np.array([4, 0, 4, 2, 0, 4, 0], np.int32)
    values = np.stack([new if i == 4 else x[i] for i in index])
    x[0] = values[index == 0] = poison(rng, (3, 5), dtype)
    want = x.copy()
    want[4] = new
    got = jax.jit(lambda x, i, v: x.at[i].set(v, mode="promise_in_bounds"), donate_argnums=0)(
        jnp.asarray(x), index, values
    )
    assert_same_bits(got, want)


@DTYPES
def test_r104_what_is_not_named_keeps_its_bits(rng, dtype):
    """The first and the last row among the named, NaN everywhere else."""
    x, values = poison(rng, (7, 3, 5), dtype), normal(rng, (3, 3, 5), dtype)
    index = np.array([6, 0, 3], np.int32)
    want = x.copy()
    want[index] = values
    got = jax.jit(lambda x, i, v: x.at[i].set(v, mode="promise_in_bounds"))(x, index, values)
    assert_same_bits(got, want)


@DTYPES
def test_r104_pairs_of_indices_name_page_and_row(rng, dtype):
    pages, values = poison(rng, (5, 4, 3), dtype), normal(rng, (6, 3), dtype)
    page, within = np.array([[4, 0, 2, 0, 1, 4], [0, 0, 3, 0, 1, 3]], np.int32)
    values[page == 0] = pages[0, 0]
    want = pages.copy()
    want[page, within] = values
    got = jax.jit(lambda p, i, j, v: p.at[i, j].set(v, mode="promise_in_bounds"))(
        pages, page, within, values
    )
    assert_same_bits(got, want)


@DTYPES
def test_r104_a_gather_returns_the_bits(rng, dtype):
    x = poison(rng, (7, 3, 5), dtype)
    index = np.array([[6, 0, 0], [3, 6, 1]], np.int32)
    assert_same_bits(jax.jit(lambda x, i: x[i])(x, index), x[index])


def test_r104_select_keeps_nan_out():
    """0 x NaN is NaN, so masks select; a branch not taken leaves nothing behind."""
    x = jnp.asarray([np.nan, np.inf, -np.inf, 1.0])
    kept = jax.jit(lambda x: jnp.where(jnp.arange(4) == 3, x, 0) * 2)(x)
    assert kept.tolist() == [0, 0, 0, 2]


def test_r100_search_passes_over_empty_segments():
    """Of several segments starting at a row, the last one holds it: the others are empty."""
    ends = jnp.asarray([0, 0, 3, 3, 3, 5, 5], jnp.int32)
    got = jax.jit(lambda e: jnp.searchsorted(e, jnp.arange(7), side="right"))(ends)
    assert got.tolist() == [2, 2, 2, 5, 5, 7, 7]


def test_r104_sorting_is_stable(rng):
    """Pairs of one expert stay in the order of their rows."""
    keys = rng.integers(0, 4, 999).astype(np.int32)
    got = jax.jit(lambda k: jnp.argsort(k, stable=True))(keys)
    np.testing.assert_array_equal(got, np.argsort(keys, kind="stable"))


def test_r104_counting_leaves_out_what_is_past_the_end():
    ids = jnp.asarray([3, 0, 3, 4, 4, 4, 1], jnp.int32)
    assert jax.jit(lambda i: jnp.bincount(i, length=5)[:4])(ids).tolist() == [1, 1, 0, 2]
