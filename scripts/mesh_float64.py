"""The logits of a preset's random weights in float64, by the tests' independent model.

What float32 itself is off by: a mesh that is as near to these as one device is, and differs from
it, adds up in another order and no worse. Weights are drawn when they are asked for, so of 1.3 B
parameters one matrix is in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from reference_numpy import reference_forward

from bailing_jax.checkpoint.random_weights import draw, draw_experts
from bailing_jax.config import ModelConfig
from bailing_jax.params import describe
from bailing_jax.presets import find_preset


class Drawn(Mapping[str, np.ndarray]):
    """The checkpoint tensors that the random weights of a seed would be read from, by name."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._seed = seed
        self._sources = {
            source.name: (param, source) for param in describe(config) for source in param.sources
        }

    def __getitem__(self, name: str) -> np.ndarray:
        param, source = self._sources[name]
        if source.take is not None:
            raise ValueError(f"{name} is only in part in {param.path}")
        if source.index is None:
            values = draw(param, self._seed)
        else:
            others = tuple((0, size) for size in param.shape[1:])
            box = ((source.index, source.index + 1), *others)
            values = draw_experts(param, self._seed, box)[0]
        return values.transpose(np.argsort(source.order))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def logits(name: str, hf_overrides: Mapping[str, object], ids: Sequence[int]) -> np.ndarray:
    """Float64 [T, vocab] of a preset's random weights from seed 0."""
    preset = find_preset(name)
    if preset is None:
        raise ValueError(f"no preset {name}")
    config = ModelConfig.from_hf(preset.hf_config, hf_overrides, where=name)
    hf_config = {**preset.hf_config, **hf_overrides}
    offset = config.decay_layer_offset
    return reference_forward(hf_config, Drawn(config), ids, decay_layer_offset=offset).logits
