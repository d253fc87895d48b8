"""DecodeState: what the model remembers between steps, one leaf a layer.

A lightning layer keeps a recurrent state a slot, [slots, N, K, V] (`Lightning.state_width` columns
on a TPU); a softmax layer keeps pages, [pages, page_size, Kh * 2 * H] (GQA) or
[pages, page_size, r + p] (MLA; `Mla.page_width` on a TPU).
Slot 0 and page 0 are NULL: zero, never handed out. The state enters and leaves the jitted step
donated. Who owns which slot or page is the engine's business and is not in here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bailing_jax import plugins
from bailing_jax.config import ModelConfig
from bailing_jax.errors import UserError
from bailing_jax.layer_plan import layer_plan

PAGE_SIZE = 64
# The axis of a leaf along which the devices of a shard divide it by heads; None: all hold it whole.
TENSOR_AXES: Mapping[str, int | None] = {"lightning": 1, "gqa": 2, "mla": None}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The leaves, in layer order."""

    layers: tuple[jax.Array, ...]


@dataclass(frozen=True)
class StateSpec:
    """How much state to keep and in which dtypes.

    Attributes:
        num_slots: recurrent slots, NULL included.
        num_pages: pages, NULL included.
        page_dtype: of keys, values and latents (the model's dtype).
        state_dtype: of the recurrent state: float32 or bfloat16.
        page_size: tokens a page.
        whole_lanes: latents and states are kept with zeros behind them, `Mla.page_width` and
            `Lightning.state_width`: on a TPU.
    """

    num_slots: int
    num_pages: int
    page_dtype: str
    state_dtype: str = "float32"
    page_size: int = PAGE_SIZE
    whole_lanes: bool = False


def leaf_shapes(config: ModelConfig, spec: StateSpec) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape and dtype of every leaf, as whoever replaces its layer declares it."""

    def leaf(kind: str) -> jax.ShapeDtypeStruct:
        replaced = plugins.layer(kind)
        if replaced is None:
            return built_in_leaf(kind, config, spec)
        found = replaced.state_spec(config, spec)
        places = spec.num_slots if kind == "lightning" else spec.num_pages
        if not isinstance(found, jax.ShapeDtypeStruct) or found.shape[:1] != (places,):
            raise UserError(
                f"{replaced.__module__}.{replaced.__qualname__}.state_spec gave {found}",
                f"It gives a jax.ShapeDtypeStruct whose first dimension is {places} here: "
                "spec.num_slots in place of lightning attention, else spec.num_pages.",
            )
        return found

    return tuple(leaf(layer.attention) for layer in layer_plan(config))


def built_in_leaf(kind: str, config: ModelConfig, spec: StateSpec) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what the built-in layer of an attention kind keeps."""
    pages = (spec.num_pages, spec.page_size)
    if kind == "lightning" and (att := config.lightning) is not None:
        width = att.state_width if spec.whole_lanes else att.head_dim
        shape = (spec.num_slots, att.num_heads, att.head_dim, width)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(spec.state_dtype))
    if kind == "gqa" and (att := config.gqa) is not None:
        shape = (*pages, att.num_kv_heads * 2 * att.head_dim)
    elif kind == "mla" and (att := config.mla) is not None:
        width = att.page_width if spec.whole_lanes else att.kv_lora_rank + att.rope_dim
        shape = (*pages, width)
    else:
        raise ValueError(f"{config.architecture} has no {kind} attention")
    return jax.ShapeDtypeStruct(shape, jnp.dtype(spec.page_dtype))


def tensor_axes(config: ModelConfig, tensor: int) -> tuple[int | None, ...]:
    """The axis by which `tensor` devices divide each leaf.

    Raises:
        UserError: a layer from outside does not say how its state is divided.
    """

    def axis(kind: str) -> int | None:
        replaced = plugins.layer(kind)
        if replaced is None or tensor == 1:
            return TENSOR_AXES[kind]
        if not hasattr(replaced, "tensor_axis"):
            raise UserError(
                f"mesh: {replaced.__module__}.{replaced.__qualname__} does not run on "
                f"tensor={tensor} devices: it has no tensor_axis",
                "Use tensor=1; or see docs/plugins.md for what such a layer has to do.",
                options=("mesh",),
            )
        return replaced.tensor_axis

    return tuple(axis(layer.attention) for layer in layer_plan(config))


def allocate(config: ModelConfig, spec: StateSpec) -> DecodeState:
    """A state of zeros."""
    return DecodeState(tuple(jnp.zeros(s.shape, s.dtype) for s in leaf_shapes(config, spec)))


def state_bytes(config: ModelConfig, spec: StateSpec) -> int:
    """Bytes of the whole state."""
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in leaf_shapes(config, spec))
