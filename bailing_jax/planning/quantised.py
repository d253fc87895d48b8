"""fp8 matrices with a float32 scale an output channel, as the layers would meet them.

For compiling only: no checkpoint with such weights is read yet. A `Scaled` stands where a layer has
its array and is widened where the layer reads it, so that a device holds one byte an element. A
stack of experts is widened one expert at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bailing_jax.params import Param
from bailing_jax.placement import Placement
from bailing_jax.planning.footprint import input_axis
from bailing_jax.planning.workload import FP8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """A matrix, or a stack of experts' matrices.

    Attributes:
        values: float8_e4m3fn.
        scales: float32, of size 1 along the dimension that products sum over.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Its dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """What it is widened to."""
        return jnp.dtype("bfloat16")

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, EllipsisType):
            return _widened(self.values, self.scales)
        return _widened(self.values[index], self.scales[index])


class ScaledStack(Scaled):
    """Experts: `[...]` leaves them as they are, `[e]` widens one."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, EllipsisType) else super().__getitem__(index)


jax.tree_util.register_dataclass(ScaledStack, ["values", "scales"], [])


def _widened(values: jax.Array, scales: jax.Array) -> jax.Array:
    return values.astype(jnp.bfloat16) * scales.astype(jnp.bfloat16)


def scaled_shape(placement: Placement, param: Param) -> Scaled:
    """A parameter's global arrays, to trace with."""
    values = placement.param_shape(param, jnp.dtype(FP8))
    axis = input_axis(param)
    divided = list(placement.param_spec(param))
    divided[axis] = None
    size = (*values.shape[:axis], 1, *values.shape[axis + 1 :])
    place = placement.sharded(PartitionSpec(*divided))
    scales = jax.ShapeDtypeStruct(size, jnp.float32, sharding=place)
    kind = ScaledStack if param.axes[0] == "experts" else Scaled
    return kind(values, scales)  # pyright: ignore[reportArgumentType]
