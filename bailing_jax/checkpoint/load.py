"""Reading a checkpoint, released or native, into the model's parameters, one at a time.

Names, shapes and dtypes are matched before any data is read. A released checkpoint is converted
as it is read, and refused where values are not finite; host memory holds one parameter and one
tensor beyond what has been handed to the device. A native folder, whose values were checked when
it was made, is mapped: where its dtype is the model's, a CPU device uses the file's pages as
they are, and an accelerator copies straight from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import BailingForCausalLM, build, param_dtype
from bailing_jax.params import Param
from convert.mapping import place
from convert.native import NativeFolder, check_params
from convert.plan import match
from convert.source import CheckpointSource

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Weights:
    """What a folder holds for a model: matched, not yet read.

    Attributes:
        unused: names of recognised tensors that are not used, by group.
        num_bytes: bytes to be read.
        read: a parameter in the dtype given, and how many bytes of the folder that took.
    """

    unused: Mapping[str, Sequence[str]]
    num_bytes: int
    read: Callable[[Param, np.dtype[Any]], tuple[np.ndarray, int]]


def match_released(config: ModelConfig, source: CheckpointSource) -> Weights:
    """Pair the model's parameters with a released checkpoint's tensors.

    Raises:
        UserError: see `convert.plan.match`.
    """
    matched = match(config, source.tensors, str(source.folder))
    pairs_of = {param.path: pairs for param, pairs in matched.params}

    def read(param: Param, dtype: np.dtype[Any]) -> tuple[np.ndarray, int]:
        array = np.zeros(param.shape, dtype)
        pairs = [(piece, info) for piece, info in pairs_of[param.path] if info is not None]
        for piece, info in pairs:
            place(piece, source.read_finite(info.name), array)
        return array, sum(info.nbytes for _, info in pairs)

    return Weights(matched.unused, matched.num_bytes, read)


def match_native(config: ModelConfig, native: NativeFolder) -> Weights:
    """Pair the model's parameters with a native folder's.

    Raises:
        UserError: see `convert.native.check_params`.
    """
    params = check_params(native, config)
    sizes = {param.path: native.params[param.path].info.nbytes for param in params}
    unused = {"kept for the way back to Hugging Face": tuple(native.extra)} if native.extra else {}

    def read(param: Param, dtype: np.dtype[Any]) -> tuple[np.ndarray, int]:
        return native.map(param.path).astype(dtype, copy=False), sizes[param.path]

    return Weights(unused, sum(sizes.values()), read)


def load_model(
    config: ModelConfig, options: RuntimeOptions, weights: Weights, progress: Progress
) -> BailingForCausalLM:
    """Read every parameter.

    Args:
        config: the model.
        options: its dtype.
        weights: from `match_released` or `match_native`; its folder is still open.
        progress: called with (bytes read, bytes in all) after every parameter.

    Raises:
        UserError: a value is NaN, infinite or absurd, or a file changed or can't be read.
    """
    done = 0

    def make(param: Param) -> jax.Array:
        nonlocal done
        array, num_bytes = weights.read(param, np.dtype(param_dtype(param, options)))
        done += num_bytes
        progress(done, weights.num_bytes)
        return jax.device_put(array)

    return build(config, options, make)
