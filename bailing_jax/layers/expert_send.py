"""Routed rows sent to the devices that hold their experts, and the results sent back.

    sort a shard's choices by their expert (of this device's share of experts), so by its shard too
    tell the others how many there are of each
    round by round, until nobody has any left:
        each sends at most `quota` choices to each; the experts run; the results go back
    y = sum_i w_i result_i, in the order of the choices

What moves are the choices themselves, where `expert_exchange` otherwise moves every row everywhere.
A round has room for twice an even share; choices that are less even take more rounds and none is
dropped. Receivers keep a place of `quota` rows for each sender, so that the two ways to send, whole
places or (on TPUs) just the rows in them, leave the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bailing_jax.layers.parallel import Parallel
from pallas_kernels import compat
from pallas_kernels.order import inverse, stable_order

# Experts of one choice a row: (x, ids [t, 1], weights [t, 1], exists) -> float32 [t, d]
RunExperts = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# The platforms where just the rows move; XLA's CPU can't, and on GPUs nobody has tried it.
RAGGED = ("tpu",)
# Rows from one sender to one receiver in a round, at least.
_LEAST_QUOTA = 4


class _Plan(NamedTuple):
    """Who sends how much, the same on all devices of an exchange.

    Attributes:
        each: int32 [senders, receivers, experts]: choices of each of a receiver's experts.
        me: which of them this device is.
        quota: rows from one to another in a round.
        rounds: how many until nobody has any left, the same on all devices of the mesh.
    """

    each: jax.Array
    me: jax.Array
    quota: int
    rounds: jax.Array

    def counts(self) -> jax.Array:
        """int32 [senders, receivers]."""
        return self.each.sum(axis=2)

    def first(self) -> jax.Array:
        """int32 [senders, receivers]: where a receiver's choices begin among a sender's."""
        counts = self.counts()
        return jnp.cumsum(counts, axis=1) - counts

    def in_round(self, number: jax.Array) -> jax.Array:
        """int32 [senders, receivers]: how many go in this round."""
        return jnp.clip(self.counts() - number * self.quota, 0, self.quota)

    def coming_ids(self, number: jax.Array) -> jax.Array:
        """int32 [senders * quota]: the expert of each row that comes, from 0 on; where none comes,
        the number of experts. A sender's are in the order of the experts."""
        ends = jnp.cumsum(self.each[:, self.me], axis=1)
        place = number * self.quota + jnp.arange(self.quota)
        ids = (place[:, None] >= ends[:, None, :]).sum(axis=2, dtype=jnp.int32)
        return ids.reshape(-1)


def quota_of(parallel: Parallel, rows: int, choices: int) -> int:
    """Rows from one shard to another in a round: twice as many as if choices were even."""
    even = rows * choices / (parallel.expert * parallel.tensor_experts)
    return max(_LEAST_QUOTA, math.ceil(2 * even))


def send(
    parallel: Parallel,
    run: RunExperts,
    num_here: int,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    exists: jax.Array,
) -> jax.Array:
    """As `expert_exchange.exchange`, of one block of rows."""
    rows, choices = ids.shape
    shards, quota = parallel.expert, quota_of(parallel, rows, choices)
    # Expert e is on device e // num_here of those that divide experts: shard first, then TENSOR.
    owner = ids // num_here
    on_my_line = owner % parallel.tensor_experts == parallel.experts_index()
    goes = exists[:, None] & on_my_line
    expert = owner // parallel.tensor_experts * num_here + ids % num_here
    order = stable_order(
        jnp.where(goes, expert, shards * num_here).reshape(-1), shards * num_here + 1
    )
    plan = _plan(parallel, jnp.where(exists[:, None], ids, -1), num_here, quota)
    rows_of = x[order // choices]
    transport = _ragged if compat.target_platform() in RAGGED else _places

    def one_round(number: jax.Array, y: jax.Array) -> jax.Array:
        there, back = transport(parallel, plan, number)
        coming = plan.in_round(number)[:, plan.me]
        is_row = (jnp.arange(quota) < coming[:, None]).reshape(-1)
        ones = jnp.ones((shards * quota, 1), jnp.float32)
        got = run(there(rows_of), plan.coming_ids(number)[:, None], ones, is_row)
        return back(got, y)

    y = jnp.zeros((rows * choices, x.shape[1]), jnp.float32)
    y = jax.lax.fori_loop(0, plan.rounds, one_round, y)
    # Choices come first: as an axis beside the rows a TPU would lay it all out anew.
    y = y[inverse(order).reshape(rows, choices).T] * weights.T[..., None]
    return jnp.where(goes.T[..., None], y, 0).sum(axis=0)


def _plan(parallel: Parallel, ids: jax.Array, num_here: int, quota: int) -> _Plan:
    """The plan for choices of the experts `ids`, -1 for none, of which a device has `num_here`.

    A shard's devices all know its choices, so each counts for all of them: what the shards tell
    one another is enough to know the most rounds that any device needs, without asking across
    `tensor`. Devices that meet in a round have it from one gather and so from the same numbers.
    """
    experts = jnp.arange(parallel.expert * parallel.tensor_experts * num_here, dtype=jnp.int32)
    each = (ids.reshape(-1, 1) == experts).sum(axis=0, dtype=jnp.int32)
    each = parallel.gather_counts(each.reshape(parallel.expert, parallel.tensor_experts, num_here))
    rounds = -(-each.sum(axis=-1).max() // quota)
    mine = each[parallel.data_index(), :, :, parallel.experts_index()]
    return _Plan(mine, parallel.expert_index(), quota, rounds)


def _places(parallel: Parallel, plan: _Plan, number: jax.Array):
    """Whole places move, full or not."""
    quota, places = plan.quota, jnp.arange(plan.quota)
    going = plan.in_round(number)[plan.me]
    at = plan.first()[plan.me][:, None] + number * quota + places
    is_row = (places < going[:, None]).reshape(-1)
    at = at.reshape(-1)

    def there(values: jax.Array) -> jax.Array:
        filled = values[jnp.where(is_row, at, 0)]
        return parallel.swap_places(filled)

    def back(results: jax.Array, y: jax.Array) -> jax.Array:
        # Places without a row write behind the end, which is dropped.
        return y.at[jnp.where(is_row, at, y.shape[0])].set(parallel.swap_places(results))

    return there, back


def _ragged(parallel: Parallel, plan: _Plan, number: jax.Array):
    """Only the rows move."""
    moving, first = plan.in_round(number), plan.first() + number * plan.quota
    going, coming = moving[plan.me], moving[:, plan.me]
    my_place = jnp.full_like(going, plan.me * plan.quota)
    places = jnp.arange(parallel.expert, dtype=jnp.int32) * plan.quota

    def there(values: jax.Array) -> jax.Array:
        room = jnp.zeros((parallel.expert * plan.quota, *values.shape[1:]), values.dtype)
        return parallel.ragged(values, room, first[plan.me], going, my_place, coming)

    def back(results: jax.Array, y: jax.Array) -> jax.Array:
        return parallel.ragged(results, y, places, coming, first[:, plan.me], going)

    return there, back
