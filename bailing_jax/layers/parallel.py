"""What the layers know of the mesh: how to sum and gather over the devices that share a model.

Inside the step every device runs the same layers on arrays of its own. `Parallel` names how many
there are along each axis; where there is one, each function here is the identity, so that on one
device nothing is left of it. Must not know of models, batches or jax's meshes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bailing_jax.config import ModelConfig
from bailing_jax.mesh import MeshShape, tensor_axes
from bailing_jax.sharding import DATA, EXPERT, ROWS, TENSOR, TENSOR_EXPERTS, norm_parts


@dataclass(frozen=True)
class Parallel:
    """Devices along each axis.

    Attributes:
        data: shards that divide nothing.
        expert: shards that divide the routed experts.
        tensor_experts: devices of a shard that divide a shard's experts.
        tensor_width: those that divide the width of each expert.
        parts_a_group: parts of one group of lightning attention's norm, which lie on neighbours
            along TENSOR, or some of them on one device.
        ordered: sums are made in the order of the devices, so that a row's bits do not depend on
            where it lies; a ring adds different rows in different orders.
    """

    data: int = 1
    expert: int = 1
    tensor_experts: int = 1
    tensor_width: int = 1
    parts_a_group: int = 1
    ordered: bool = False

    @classmethod
    def of(cls, config: ModelConfig, mesh: MeshShape, *, ordered: bool = False) -> Parallel:
        """The devices of a mesh that divides this model."""
        parts = norm_parts(config.lightning, mesh.tensor)[1] if config.lightning else 1
        return cls(mesh.data, mesh.expert, *tensor_axes(config, mesh), parts, ordered)

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.num_shards * self.tensor

    @property
    def tensor(self) -> int:
        """Devices that share each row."""
        return self.tensor_experts * self.tensor_width

    @property
    def num_shards(self) -> int:
        """Sets of devices with rows of their own."""
        return self.data * self.expert

    def partial_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """What a device's part of a sum is kept in, of which the whole is in `dtype`."""
        return dtype if self.tensor == 1 else jnp.dtype(jnp.float32)

    def sum_over_tensor(self, y: jax.Array) -> jax.Array:
        """The sum of every device's part."""
        return self._sum(y, TENSOR) if self.tensor > 1 else y

    def gather_over_tensor(self, y: jax.Array, axis: int) -> jax.Array:
        """Every device's part, one behind the other."""
        if self.tensor == 1:
            return y
        return jax.lax.all_gather(y, TENSOR, axis=axis, tiled=True)

    def part_of_tensor(self, y: jax.Array, axis: int) -> jax.Array:
        """This device's part of what all hold."""
        if self.tensor == 1:
            return y
        size = y.shape[axis] // self.tensor
        return jax.lax.dynamic_slice_in_dim(y, self.tensor_index() * size, size, axis)

    def tensor_index(self) -> jax.Array:
        """This device's place among those that share its rows."""
        return jax.lax.axis_index(TENSOR)

    def mean_over_groups(self, means: jax.Array) -> jax.Array:
        """For each part [..., parts, 1] of a norm's groups here, the mean over its whole group."""
        if self.parts_a_group == 1:
            return means
        here = means.shape[-2]
        every = jax.lax.all_gather(means[..., 0], TENSOR, axis=-1, tiled=True)
        groups = every.reshape(*every.shape[:-1], -1, self.parts_a_group)
        whole = _in_order(jnp.moveaxis(groups, -1, 0)) / self.parts_a_group
        mine = (self.tensor_index() * here + jnp.arange(here)) // self.parts_a_group
        return whole[..., mine, None]

    def any_shard(self, flag: jax.Array) -> jax.Array:
        """Whether a flag is up in any shard: the same answer on every device."""
        if self.num_shards == 1:
            return flag
        return jax.lax.pmax(flag.astype(jnp.int32), ROWS) > 0

    def gather_shards(self, y: jax.Array) -> jax.Array:
        """[shards, ...]: every shard's."""
        return jax.lax.all_gather(y, ROWS) if self.num_shards > 1 else y[None]

    def of_first_shard(self, y: jax.Array) -> jax.Array:
        """What the first shard has, everywhere."""
        if self.num_shards == 1:
            return y
        is_first = jax.lax.axis_index(ROWS) == 0
        return jax.lax.psum(jnp.where(is_first, y, jnp.zeros_like(y)), ROWS)

    def first_expert(self, num_here: int) -> jax.Array | int:
        """The number of the first routed expert that lies on this device, of `num_here`."""
        if self.expert * self.tensor_experts == 1:
            return 0
        return jax.lax.axis_index((EXPERT, TENSOR_EXPERTS)) * num_here

    def gather_rows(self, y: jax.Array) -> jax.Array:
        """Rows of all shards that divide the experts, one shard's behind the other's."""
        return jax.lax.all_gather(y, EXPERT, tiled=True)

    def sum_of_rows(self, y: jax.Array) -> jax.Array:
        """Back from `gather_rows`: a shard's rows, summed over what every device made of them."""
        if not self.ordered:
            return jax.lax.psum_scatter(y, EXPERT, tiled=True)
        parts = y.reshape(self.expert, -1, *y.shape[1:])
        return _in_order(jax.lax.all_to_all(parts, EXPERT, 0, 0))

    def expert_index(self) -> jax.Array:
        """This device's place among the shards that divide the experts."""
        return jax.lax.axis_index(EXPERT)

    def experts_index(self) -> jax.Array | int:
        """Its place among the devices of a shard that divide the shard's experts."""
        return jax.lax.axis_index(TENSOR_EXPERTS) if self.tensor_experts > 1 else 0

    def gather_counts(self, counts: jax.Array) -> jax.Array:
        """[data, expert, ...]: those of every shard, by its place along each axis."""
        every = jax.lax.all_gather(counts, ROWS)
        return every.reshape(self.data, self.expert, *counts.shape)

    def data_index(self) -> jax.Array:
        """This device's place among the shards that divide nothing."""
        return jax.lax.axis_index(DATA)

    def swap_places(self, y: jax.Array) -> jax.Array:
        """Of [shards x places, ...], part i goes to shard i and comes from shard i."""
        return jax.lax.all_to_all(y, EXPERT, 0, 0, tiled=True)

    def ragged(
        self,
        values: jax.Array,
        room: jax.Array,
        starts: jax.Array,
        going: jax.Array,
        places: jax.Array,
        coming: jax.Array,
    ) -> jax.Array:
        """`room` with the rows of others written into it; XLA has it for TPUs and GPUs only.

        Args:
            values: rows to send.
            room: where the others' rows go.
            starts: int32 [shards], where each shard's rows begin among `values`.
            going: int32 [shards], how many.
            places: int32 [shards], where they begin in that shard's room.
            coming: int32 [shards], how many that shard sends.
        """
        return jax.lax.ragged_all_to_all(
            values, room, starts, going, places, coming, axis_name=EXPERT
        )

    def _sum(self, y: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        if not self.ordered:
            return jax.lax.psum(y, axes)
        return _in_order(jax.lax.all_gather(y, axes))


ONE = Parallel()


def _in_order(parts: jax.Array) -> jax.Array:
    """The sum over the first axis, from the first on."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def num_blocks(rows: int, row_bytes: int, allowed_bytes: int) -> int:
    """Into how many equal blocks rows are cut, so that one takes about what is allowed."""
    wanted = min(rows, math.ceil(rows * row_bytes / allowed_bytes))
    return next(n for n in range(wanted, rows + 1) if rows % n == 0)
