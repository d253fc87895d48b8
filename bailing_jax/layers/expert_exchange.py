"""Routed experts that lie on several devices: every row meets its experts, wherever they are.

    gather: rows, choices and weights of all shards that divide the experts
    each device: the choices whose expert it has (a part of its width), nothing for the others
    back: each shard gets its own rows, summed over those devices

No choice is ever dropped and nothing depends on how evenly rows choose. It is done a block of rows
at a time, so that what is gathered stays small however many shards there are. The sum over the
devices of one shard is left to the caller, who has more to add to it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bailing_jax.layers.parallel import Parallel, num_blocks

# (x, ids, weights, exists) -> [t, d]
RunExperts = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# About what a block's rows may take on a device, with what the experts make of them.
_BLOCK_BYTES = 2**28


def exchange(
    parallel: Parallel,
    run: RunExperts,
    num_here: int,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    exists: jax.Array,
) -> jax.Array:
    """What this device's share of the experts and of their width adds to its rows.

    Args:
        parallel: the devices.
        run: the experts on this device; the id `num_here` means one that is elsewhere.
        num_here: how many there are.
        x: [t, d], the same on all devices of a shard.
        ids: int32 [t, x] among all experts.
        weights: float32 [t, x].
        exists: bool [t].

    Returns:
        [t, d]; its sum over `tensor` is the mixture.
    """
    if parallel.expert == parallel.tensor == 1:
        return run(x, ids, weights, exists)
    first = parallel.first_expert(num_here)

    def local(x, ids, weights, exists):
        here = (ids >= first) & (ids < first + num_here)
        return run(x, jnp.where(here, ids - first, num_here), weights, exists)

    if parallel.expert == 1:
        return local(x, ids, weights, exists)

    def block(arrays):
        return parallel.sum_of_rows(local(*map(parallel.gather_rows, arrays)))

    rows, choices = ids.shape
    # Of a choice: the row copied, its result in float32, and that once more in its row's order.
    row_bytes = parallel.expert * choices * x.shape[1] * (x.dtype.itemsize + 8)
    count = num_blocks(rows, row_bytes, _BLOCK_BYTES)
    if count == 1:
        return block((x, ids, weights, exists))
    cut = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), (x, ids, weights, exists))
    y = jax.lax.map(block, cut)
    return y.reshape(rows, -1)
