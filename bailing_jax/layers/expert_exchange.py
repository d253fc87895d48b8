"""Routed experts that lie on several devices: every row meets its experts, wherever they are.

    gather: rows, choices and weights of all shards that divide the experts
    each device: the choices whose expert it has (a part of its width), nothing for the others
    back: each shard gets its own rows, summed over those devices

or, where there are more shards than that pays for, `expert_send`: each choice to its expert alone.

No choice is ever dropped, however unevenly rows choose. Both what is gathered and what the experts
work on at a time are bounded, however many shards there are. The sum over the devices of one shard
is left to the caller, who has more to add to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bailing_jax.layers import expert_send
from bailing_jax.layers.parallel import Parallel, num_blocks
from pallas_kernels.order import stable_order

# (x, ids, weights, exists) -> [t, d]
RunExperts = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# About what gathered rows and their sums may take, and the experts' results.
_GATHERED_BYTES = 2**29
_RESULT_BYTES = 2**28


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
        ids = jnp.where(here, ids - first, num_here)
        return _where_chosen(run, num_here, x, ids, weights, exists)

    if parallel.expert == 1:
        return local(x, ids, weights, exists)

    def gathered(arrays):
        return parallel.sum_of_rows(local(*map(parallel.gather_rows, arrays)))

    def sent(arrays):
        some = functools.partial(_where_chosen, run, num_here)
        return expert_send.send(parallel, some, num_here, *arrays)

    rows, d = x.shape
    moved = parallel.expert
    block = gathered
    if sends(parallel, ids.shape[1]):
        # Rounds have room for twice the choices, which come back into as many rows.
        moved, block = 3 * ids.shape[1], sent
    count = num_blocks(rows, moved * d * (x.dtype.itemsize + 4), _GATHERED_BYTES)
    if count == 1:
        return block((x, ids, weights, exists))
    cut = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), (x, ids, weights, exists))
    return jax.lax.map(block, cut).reshape(rows, d)


def sends(parallel: Parallel, choices: int) -> bool:
    """Whether choices are sent: it moves two rows a choice, where gathering moves one a shard."""
    return parallel.expert > 2 * choices


def in_words(parallel: Parallel, choices: int, platform: str) -> str:
    """Which way rows and experts meet, for a person."""
    if parallel.expert == 1:
        return "routed rows stay where they are"
    if not sends(parallel, choices):
        return f"routed rows are gathered from {parallel.expert} shards"
    ragged = " (ragged all-to-all)" * (platform in expert_send.RAGGED)
    return f"routed rows are sent to their experts among {parallel.expert} shards{ragged}"


def _where_chosen(
    run: RunExperts,
    num_here: int,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    exists: jax.Array,
) -> jax.Array:
    """`run` on the rows that chose an expert here, so many at a time that results stay small."""
    rows, choices = ids.shape
    # A choice has its result in float32, by expert and once more by row.
    results = choices * x.shape[1] * 8
    size = rows // num_blocks(rows, results, _RESULT_BYTES)
    if size == rows:
        return run(x, ids, weights, exists)
    chosen = ((ids < num_here).any(axis=1)) & exists
    order, num_chosen = stable_order(jnp.where(chosen, 0, 1), 2), chosen.sum()

    def part(number: jax.Array, y: jax.Array) -> jax.Array:
        at = jax.lax.dynamic_slice_in_dim(order, number * size, size)
        mine = number * size + jnp.arange(size) < num_chosen
        return y.at[at].set(run(x[at], ids[at], weights[at], mine), unique_indices=True)

    y = jnp.zeros(x.shape, jnp.float32)
    # Rows of the last part that nobody chose get the zero they have.
    return jax.lax.fori_loop(0, -(-num_chosen // size), part, y)
