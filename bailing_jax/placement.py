"""Placement: a model's arrays on the devices of a mesh.

It knows which device holds what of parameters and state (`sharding` has the table) and makes the
global arrays that jax sees, each device's part from its own bytes. A process makes the parts of its
own devices only. What runs on them is no business of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bailing_jax import sharding
from bailing_jax.config import ModelConfig
from bailing_jax.errors import UserError
from bailing_jax.mesh import MeshShape, check_devices, check_mesh
from bailing_jax.params import Param
from bailing_jax.sharding import AXES, ROWS, TENSOR, Box, local_config
from bailing_jax.state import DecodeState, StateSpec, leaf_shapes, tensor_axes
from pallas_kernels import compat

# A box of a parameter -> its values.
ReadBox = Callable[[Box], np.ndarray]


class Placement:
    """Where everything lies.

    Args:
        config: the model.
        shape: a mesh that divides it.
        devices: those to use; None: the first of all that there are.

    Attributes:
        config: the model.
        shape: devices along each axis.
        mesh: jax's.

    Raises:
        UserError: the mesh does not divide the model, there are fewer devices, or a process has
            none of them.
    """

    def __init__(
        self, config: ModelConfig, shape: MeshShape, devices: Sequence[Any] | None = None
    ) -> None:
        check_mesh(config, shape)
        compat.prepare_for_mesh()
        devices = jax.devices() if devices is None else devices
        check_devices(shape, len(devices))
        sizes = sharding.axis_sizes(config, shape)
        self.config = config
        self.shape = shape
        chosen = mesh_utils.create_device_mesh(
            tuple(sizes.values()),
            list(devices[: shape.num_devices]),
            allow_split_physical_axes=True,
        )
        self.mesh = Mesh(chosen, AXES)
        processes = jax.process_count()
        without = processes - len({device.process_index for device in chosen.flat})
        if without > 0:
            raise UserError(
                f"mesh: {shape} leaves {without} of {processes} processes without a device",
                f'Give a mesh of all {len(devices)} devices, or "auto".',
                2,
                options=("mesh",),
            )

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays with a leading axis of shards."""
        return PartitionSpec(ROWS)

    def param_spec(self, param: Param) -> PartitionSpec:
        """How a parameter's global array is divided."""
        splits = sharding.splits(self.config, param, self.shape)
        return PartitionSpec(*(split.axes or None for split in splits))

    def sharded(self, spec: PartitionSpec) -> NamedSharding:
        """That over this mesh."""
        return NamedSharding(self.mesh, spec)

    def param_shape(self, param: Param, dtype: Any) -> jax.ShapeDtypeStruct:
        """What a parameter's global array is, to trace with."""
        shape = sharding.global_shape(self.config, param, self.shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharded(self.param_spec(param)))

    def make(self, param: Param, read: ReadBox) -> jax.Array:
        """A parameter's global array; `read` gets each box that this process's devices need once.

        One device's part is in host memory at a time, beyond what has been handed on.
        """
        splits = sharding.splits(self.config, param, self.shape)
        shape = sharding.global_shape(self.config, param, self.shape)
        placed = self.sharded(self.param_spec(param))
        owners: dict[tuple[int, ...], list[Any]] = {}
        for device, index in placed.addressable_devices_indices_map(shape).items():
            starts = tuple(part.start or 0 for part in index or ())
            owners.setdefault(starts, []).append(device)
        parts = []
        for starts, devices in owners.items():
            array = _side_by_side(splits, starts, read)
            parts += [jax.device_put(array, device) for device in devices]
        return jax.make_array_from_single_device_arrays(shape, placed, parts)

    def state_specs(self) -> tuple[PartitionSpec, ...]:
        """How each leaf of the state is divided: shards side by side, heads among a shard's."""
        specs = []
        for axis in tensor_axes(self.config, self.shape.tensor):
            between = () if axis is None else (*(None,) * (axis - 1), TENSOR)
            specs.append(PartitionSpec(ROWS, *between))
        return tuple(specs)

    def state_shapes(self, spec: StateSpec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Every leaf of the state, all shards together; `spec` is one shard's."""
        local = leaf_shapes(local_config(self.config, self.shape.tensor), spec)
        axes = tensor_axes(self.config, self.shape.tensor)
        shapes = []
        for leaf, axis, part in zip(local, axes, self.state_specs(), strict=True):
            size = list(leaf.shape)
            size[0] *= self.shape.num_shards
            if axis is not None:
                size[axis] *= self.shape.tensor
            shapes.append(
                jax.ShapeDtypeStruct(tuple(size), leaf.dtype, sharding=self.sharded(part))
            )
        return tuple(shapes)

    def new_state(self, spec: StateSpec) -> DecodeState:
        """A state of zeros."""
        return DecodeState(
            tuple(
                jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
                for leaf in self.state_shapes(spec)
            )
        )


def _side_by_side(
    splits: Sequence[sharding.Split], starts: Sequence[int], read: ReadBox
) -> np.ndarray:
    """One device's part, whose place in the global array begins at `starts`."""
    indices = [start // split.local_size for start, split in zip(starts, splits, strict=True)]
    boxes = sharding.boxes(splits, indices)
    if len(boxes) == 1:
        return read(boxes[0])
    axis = next(i for i, split in enumerate(splits) if len(split.parts) > 1)
    return np.concatenate([read(box) for box in boxes], axis)
