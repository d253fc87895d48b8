"""Random weights for a preset: to try sizes and speed where no checkpoint is at hand.

Each parameter is drawn from a generator of its own, keyed by the seed and the parameter's path,
so a weight does not depend on what else the model holds.
"""

from __future__ import annotations

import zlib

import jax
import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import BailingForCausalLM, build, param_dtype
from bailing_jax.params import Param
from bailing_jax.placement import Placement


def random_model(
    config: ModelConfig, options: RuntimeOptions, seed: int, placement: Placement | None = None
) -> BailingForCausalLM:
    """A model of normal weights (standard deviation fan_in ** -0.5), unit norms, zero biases.

    They are the same on every mesh, for which each process draws a whole parameter at a time.
    """

    def make(param: Param) -> jax.Array:
        array = draw(param, seed).astype(param_dtype(param, options))
        if placement is None:
            return jax.device_put(array)
        return placement.make(param, lambda box: array[tuple(slice(*part) for part in box)])

    return build(config, options, make)


def draw(param: Param, seed: int) -> np.ndarray:
    """A parameter's random values, float32."""
    if param.init != "normal":
        return np.full(param.shape, param.init == "ones", np.float32)
    generator = np.random.default_rng([seed, zlib.crc32(param.path.encode())])
    values = generator.standard_normal(param.shape, np.float32)
    values *= param.sources[0].shape[-1] ** -0.5
    return values
