"""Which device holds what: the one table from logical axes to axes of the mesh.

The step runs as one program a device, each on arrays of its own (`jax.shard_map`), so a global
array is the local ones laid side by side: dimension by dimension, in the order of the mesh axes
that divide it. That is the parameter itself, except where a dimension holds several things one
behind the other (q, k and v in one matrix): each device's part then has its own q, k and v. jax's
mesh splits `tensor` in two, because the routed experts may divide by whole experts first and by
their width after that. Plain numbers for loader and planner alike; no jax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from bailing_jax.config import Lightning, ModelConfig
from bailing_jax.errors import UserError
from bailing_jax.mesh import MeshShape, tensor_axes
from bailing_jax.params import Param

# The axes of jax's mesh, the slowest first.
DATA, EXPERT, TENSOR_EXPERTS, TENSOR_WIDTH = "data", "expert", "tensor_experts", "tensor_width"
AXES: tuple[str, ...] = (DATA, EXPERT, TENSOR_EXPERTS, TENSOR_WIDTH)
ROWS = (DATA, EXPERT)
TENSOR = (TENSOR_EXPERTS, TENSOR_WIDTH)

# (start, stop) of a part of a parameter along each dimension.
Box: TypeAlias = tuple[tuple[int, int], ...]

# Logical axes that nobody divides.
_WHOLE = ("embed", "head_dim", "q_rank", "kv_rank", "latent", "router_experts")
_BY = {
    **dict.fromkeys(_WHOLE, ()),
    "vocab": TENSOR,
    "heads": TENSOR,
    "qkv": TENSOR,
    "grouped_qkv": TENSOR,
    "ffn": TENSOR,
    "experts": (EXPERT, TENSOR_EXPERTS),
    "expert_ffn": (TENSOR_WIDTH,),
}


@dataclass(frozen=True)
class Split:
    """How one dimension is divided.

    Attributes:
        size: of the whole dimension.
        axes: mesh axes that divide it, the slowest first; () for none.
        count: devices along them.
        parts: sizes of what lies in it one behind the other, each divided by itself.
        copies: of each part, how many neighbours hold the same piece.
    """

    size: int
    axes: tuple[str, ...]
    count: int
    parts: tuple[int, ...]
    copies: tuple[int, ...]

    @property
    def local_size(self) -> int:
        """Elements a device holds."""
        return sum(
            part * copies // self.count
            for part, copies in zip(self.parts, self.copies, strict=True)
        )

    def ranges(self, index: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each piece that device `index` of `count` holds, in its order."""
        found, offset = [], 0
        for part, copies in zip(self.parts, self.copies, strict=True):
            length = part * copies // self.count
            start = offset + index // copies * length
            found.append((start, start + length))
            offset += part
        return tuple(found)


def axis_sizes(config: ModelConfig, mesh: MeshShape) -> Mapping[str, int]:
    """Devices along each of AXES."""
    return dict(zip(AXES, (mesh.data, mesh.expert, *tensor_axes(config, mesh)), strict=True))


def splits(config: ModelConfig, param: Param, mesh: MeshShape) -> tuple[Split, ...]:
    """How each dimension of a parameter is divided.

    Raises:
        UserError: a layer from outside has a logical axis that the table does not know.
    """
    sizes = axis_sizes(config, mesh)
    found = []
    for size, axis in zip(param.shape, param.axes, strict=True):
        if axis not in _BY and mesh.tensor > 1:
            raise UserError(
                f"mesh: {param.path} has an axis {axis!r} that nothing divides, "
                f"so tensor={mesh.tensor} is not possible",
                f"Use tensor=1, or one of the axes {', '.join(_BY)} in the layer's parameters.",
                options=("mesh",),
            )
        by = _BY.get(axis, ())
        count = math.prod(sizes[name] for name in by)
        parts, copies = _fused(config, axis, size, count)
        found.append(Split(size, by, count, parts, copies))
    return tuple(found)


def _fused(
    config: ModelConfig, axis: str, size: int, count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parts of a dimension, and how many neighbours share a piece of each."""
    if axis == "qkv":
        return (size // 3,) * 3, (1, 1, 1)
    if axis == "grouped_qkv" and (att := config.gqa) is not None:
        keys = att.num_kv_heads * att.head_dim
        # With more devices than key-value heads, neighbours hold copies of one.
        copies = max(1, count // att.num_kv_heads)
        return (att.num_heads * att.head_dim, keys, keys), (1, copies, copies)
    return (size,), (1,)


def norm_parts(lightning: Lightning, tensor: int) -> tuple[int, int]:
    """The largest parts of the norm's groups that lie whole on one device each.

    Returns:
        (parts a device, parts a group); 1 a group: no device shares one with another.
    """
    width = lightning.num_heads * lightning.head_dim
    here, of_group = width // tensor, width // lightning.num_norm_groups
    part = math.gcd(here, of_group)
    return here // part, of_group // part


def local_config(config: ModelConfig, tensor: int) -> ModelConfig:
    """The model as one device's layers see it: its share of the heads and of the norm's groups.

    Other sizes are those of its arrays, or whole: every device routes among all experts.
    """
    lightning, gqa, mla = config.lightning, config.gqa, config.mla
    if lightning is not None:
        heads = lightning.num_heads // tensor
        parts, _ = norm_parts(lightning, tensor)
        lightning = replace(lightning, num_heads=heads, num_norm_groups=parts)
    if gqa is not None:
        kv_heads = max(1, gqa.num_kv_heads // tensor)
        gqa = replace(gqa, num_heads=gqa.num_heads // tensor, num_kv_heads=kv_heads)
    if mla is not None:
        mla = replace(mla, num_heads=mla.num_heads // tensor)
    return replace(config, lightning=lightning, gqa=gqa, mla=mla)


def local_shape(config: ModelConfig, param: Param, mesh: MeshShape) -> tuple[int, ...]:
    """What one device holds of a parameter."""
    return tuple(split.local_size for split in splits(config, param, mesh))


def global_shape(config: ModelConfig, param: Param, mesh: MeshShape) -> tuple[int, ...]:
    """The local arrays side by side; more than the parameter where neighbours hold copies."""
    return tuple(split.local_size * split.count for split in splits(config, param, mesh))


def regions(
    config: ModelConfig, param: Param, mesh: MeshShape, position: Mapping[str, int]
) -> tuple[Box, ...]:
    """The boxes of a parameter that make up one device's array.

    Args:
        config: the model.
        param: the parameter.
        mesh: the mesh.
        position: the device's index along each of AXES.

    Returns:
        Boxes, each with a (start, stop) a dimension. They lie side by side along the one dimension
        that has several parts, in this order.
    """
    sizes = axis_sizes(config, mesh)
    found, indices = splits(config, param, mesh), []
    for split in found:
        index = 0
        for name in split.axes:
            index = index * sizes[name] + position[name]
        indices.append(index)
    return boxes(found, indices)


def boxes(found: Sequence[Split], indices: Sequence[int]) -> tuple[Box, ...]:
    """The same for a device that is `indices[i]`-th along the axes that divide dimension i."""
    return tuple(
        itertools.product(*(s.ranges(i) for s, i in zip(found, indices, strict=True)))
    )
