"""Random weights for a preset: to try sizes and speed where no checkpoint is at hand.

Each parameter is drawn from a generator of its own, keyed by the seed and the parameter's path,
so a weight does not depend on what else the model holds. Each routed expert has its own too, so
that whoever holds some of them, by far the most of a large model, draws no others.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import BailingForCausalLM, build, param_dtype
from bailing_jax.params import Param, Shape
from bailing_jax.placement import Placement
from bailing_jax.sharding import Box


def random_model(
    config: ModelConfig, options: RuntimeOptions, seed: int, placement: Placement | None = None
) -> BailingForCausalLM:
    """A model of normal weights (standard deviation fan_in ** -0.5), unit norms, zero biases.

    They are the same on every mesh. A process draws the experts that its own devices hold, and
    whole what is no expert.
    """

    def make(param: Param) -> jax.Array:
        dtype = param_dtype(param, options)
        if placement is None:
            return jax.device_put(draw(param, seed).astype(dtype))
        if _has_experts(param):
            return placement.make(param, lambda box: draw_experts(param, seed, box).astype(dtype))
        array = draw(param, seed).astype(dtype)
        return placement.make(param, lambda box: array[_slices(box)])

    return build(config, options, make)


def draw(param: Param, seed: int) -> np.ndarray:
    """A parameter's random values, float32."""
    if param.init != "normal":
        return np.full(param.shape, param.init == "ones", np.float32)
    if _has_experts(param):
        return draw_experts(param, seed, tuple((0, size) for size in param.shape))
    return _normal(param, param.shape, [seed, _key(param)])


def draw_experts(param: Param, seed: int, box: Box) -> np.ndarray:
    """Those values of stacked experts that lie in a box; no other expert is drawn."""
    (first, stop), *rest = box
    values = np.empty([end - start for start, end in box], np.float32)
    for expert in range(first, stop):
        whole = _normal(param, param.shape[1:], [seed, _key(param), expert])
        values[expert - first] = whole[_slices(rest)]
    return values


def _has_experts(param: Param) -> bool:
    return param.axes[0] == "experts" and param.init == "normal"


def _normal(param: Param, shape: Shape, key: Sequence[int]) -> np.ndarray:
    values = np.random.default_rng(key).standard_normal(shape, np.float32)
    values *= param.sources[0].shape[-1] ** -0.5
    return values


def _key(param: Param) -> int:
    return zlib.crc32(param.path.encode())


def _slices(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*side) for side in box)
