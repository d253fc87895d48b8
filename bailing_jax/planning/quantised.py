"""fp8 matrices with a float32 scale an output channel, as the layers would meet them.

For compiling only: no checkpoint with such weights is read yet. A `Scaled` stands where a layer has
its array, so that a device holds one byte an element; products widen it where they read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bailing_jax.params import Param
from bailing_jax.placement import Placement
from bailing_jax.planning.footprint import input_axis
from bailing_jax.planning.workload import FP8
from pallas_kernels.scaled import Scaled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaledRows(Scaled):
    """A scale for each row, scales [..., in, 1]: the key half of kv_b_proj, absorbed, sums over the
    checkpoint's output channels. It is widened as a whole."""

    def __getitem__(self, index: Any) -> Any:
        return self.values[index].astype(self.dtype) * self.scales[index].astype(self.dtype)


def scaled_shape(placement: Placement, param: Param) -> Scaled:
    """A parameter's global arrays, to trace with."""
    values = placement.param_shape(param, jnp.dtype(FP8))
    axis = input_axis(param)
    divided = list(placement.param_spec(param))
    divided[axis] = None
    size = (*values.shape[:axis], 1, *values.shape[axis + 1 :])
    place = placement.sharded(PartitionSpec(*divided))
    scales = jax.ShapeDtypeStruct(size, jnp.float32, sharding=place)
    kind = ScaledRows if axis == len(values.shape) - 1 else Scaled
    return kind(values, scales)  # pyright: ignore[reportArgumentType]
