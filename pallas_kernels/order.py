"""Numbers in the order of small keys, and where each number went; sorted the cheapest way.

Keys and numbers become one integer, so that all keys differ and one array is sorted without
comparing pairs. `jnp.argsort` costs a TPU's compiler more, and one of its sorts of pairs inside
`shard_map` is what XLA's older partitioner dies of (jaxlib 0.11.2, decode steps of one row on two
GPUs).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def stable_order(keys: jax.Array, num_keys: int) -> jax.Array:
    """The places of `keys` from the smallest key up, of equal ones the first first: int32 [n].

    Args:
        keys: int32 [n], of 0 to num_keys - 1.
        num_keys: Python int.

    Raises:
        ValueError: keys and places do not fit 31 bits together.
    """
    places = keys.shape[0]
    bits = (places - 1).bit_length()
    if num_keys << bits > 1 << 31:
        raise ValueError(f"{places} places of {num_keys} keys do not fit 31 bits")
    numbered = keys << bits | jnp.arange(places, dtype=jnp.int32)
    return jax.lax.sort(numbered, is_stable=False) & ((1 << bits) - 1)


def inverse(order: jax.Array) -> jax.Array:
    """Where each place stands in `order`, a permutation of them: int32 [n]."""
    place = jnp.arange(order.shape[0], dtype=jnp.int32)

    def sorted_(order: jax.Array) -> jax.Array:
        return jax.lax.sort((order, place), num_keys=1, is_stable=False)[1]

    def scattered(order: jax.Array) -> jax.Array:
        places = jnp.zeros_like(order)
        return places.at[order].set(place, mode="promise_in_bounds", unique_indices=True)

    # A TPU scatters one number after the other.
    return jax.lax.platform_dependent(order, tpu=sorted_, default=scattered)
