"""Weights to start from: a checkpoint's, widened to float32 and by path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bailing_jax.checkpoint.load import match_released
from bailing_jax.config import ModelConfig
from bailing_jax.params import describe
from convert.mapping import place
from convert.source import open_source


def read_weights(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every parameter, float32 by path.

    Raises:
        UserError: tensors are missing, strange, or hold values that are not finite.
    """
    with open_source(folder) as source:
        weights = match_released(config, source)
        return {p.path: weights.read(p, np.dtype(np.float32))[0] for p in describe(config)}


def weights_of(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every parameter, float32 by path, from checkpoint tensors in memory by name."""
    weights = {}
    for param in describe(config):
        weights[param.path] = np.zeros(param.shape, np.float32)
        for source in param.sources:
            place(source, np.ascontiguousarray(tensors[source.name]), weights[param.path])
    return weights
