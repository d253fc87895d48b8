"""Places by their keys, and back: against numpy's stable sort, in every form a platform gets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.order import inverse, stable_order


@pytest.mark.parametrize(
    ("places", "num_keys"), [(1, 1), (1, 7), (2, 2), (37, 2), (64, 5), (65, 5), (1000, 257)]
)
def test_equal_keys_stay_in_order(rng: np.random.Generator, places: int, num_keys: int) -> None:
    keys = rng.integers(0, num_keys, places, dtype=np.int32)
    got = jax.jit(stable_order, static_argnums=1)(keys, num_keys)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argsort(keys, kind="stable"))


@pytest.mark.parametrize("places", [1, 2, 37, 1000])
def test_the_inverse_is_where_each_place_went(rng: np.random.Generator, places: int) -> None:
    order = rng.permutation(places).astype(np.int32)
    got = jax.jit(inverse)(order)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argsort(order))


def test_the_largest_integers_are_sorted_as_they_are() -> None:
    """Key and place fill 31 bits."""
    num_keys = 1 << 29
    keys = np.array([num_keys - 1, 0, num_keys - 1, num_keys - 2], np.int32)
    np.testing.assert_array_equal(stable_order(jnp.asarray(keys), num_keys), [1, 3, 0, 2])


def test_more_than_integers_can_number_is_refused() -> None:
    keys = jax.ShapeDtypeStruct((4,), "int32")
    with pytest.raises(ValueError, match="4 places of 536870913 keys do not fit 31 bits"):
        jax.eval_shape(lambda keys: stable_order(keys, (1 << 29) + 1), keys)
