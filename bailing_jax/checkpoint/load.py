"""Reading a checkpoint, released or native, into the model's parameters, one at a time.

Names, shapes and dtypes are matched before any data is read. A released checkpoint is converted
as it is read, and refused where values are not finite; host memory holds one parameter and one
tensor beyond what has been handed to the device. A native folder, whose values were checked when
it was made, is mapped: where its dtype is the model's, a CPU device uses the file's pages as
they are, and an accelerator copies straight from them. On a mesh either kind of folder is mapped
and each process reads the parts that its own devices hold, one device's part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.errors import UserError
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import BailingForCausalLM, build, param_dtype
from bailing_jax.params import Param, Source
from bailing_jax.placement import Placement
from bailing_jax.sharding import Box
from convert.mapping import copy, in_order, place
from convert.native import NativeFolder, check_params
from convert.plan import match
from convert.source import CheckpointSource
from convert.values import check_values

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Weights:
    """What a folder holds for a model: matched, not yet read.

    Attributes:
        unused: names of recognised tensors that are not used, by group.
        num_bytes: bytes to be read.
        read: a parameter in the dtype given, and how many bytes of the folder that took.
        read_box: the same of a box of a parameter, of which nothing else is touched.
    """

    unused: Mapping[str, Sequence[str]]
    num_bytes: int
    read: Callable[[Param, np.dtype[Any]], tuple[np.ndarray, int]]
    read_box: Callable[[Param, Box, np.dtype[Any]], tuple[np.ndarray, int]]


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

    def read_box(param: Param, box: Box, dtype: np.dtype[Any]) -> tuple[np.ndarray, int]:
        array, num_bytes = np.zeros([stop - start for start, stop in box], dtype), 0
        for piece, info in pairs_of[param.path]:
            target, part = array, box
            if piece.index is not None:
                (first, stop), *part = box
                if not first <= piece.index < stop:
                    continue
                target = array[piece.index - first]
            if info is not None:
                num_bytes += _read_part(source, piece, info.name, tuple(part), target)
        return array, num_bytes

    return Weights(matched.unused, matched.num_bytes, read, read_box)


def _read_part(
    source: CheckpointSource, piece: Source, name: str, box: Box, out: np.ndarray
) -> int:
    """Write a box of a checkpoint tensor, in the parameter's order, into `out`; bytes read.

    Raises:
        UserError: the box holds values that no weight has.
    """
    part = np.copy(in_order(piece, source.map(name))[_slices(box)], order="K")
    try:
        check_values(part.ravel(order="K"), source.tensors[name].file, name)
    except UserError:
        source.read_finite(name)  # says where in the whole tensor they are
        raise
    copy(part, out)
    return part.nbytes


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


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

    def read_box(param: Param, box: Box, dtype: np.dtype[Any]) -> tuple[np.ndarray, int]:
        part = native.map(param.path)[_slices(box)]
        return np.ascontiguousarray(part, dtype), part.nbytes

    return Weights(unused, sum(sizes.values()), read, read_box)


def load_model(
    config: ModelConfig,
    options: RuntimeOptions,
    weights: Weights,
    progress: Progress,
    placement: Placement | None = None,
) -> BailingForCausalLM:
    """Read every parameter, or on a mesh what this process's devices hold of each.

    Args:
        config: the model.
        options: its dtype.
        weights: from `match_released` or `match_native`; its folder is still open.
        progress: called with (bytes read, bytes in all) after every parameter.
        placement: the mesh; None: one device.

    Raises:
        UserError: a value is NaN, infinite or absurd, or a file changed or can't be read.
    """
    done = 0

    def make(param: Param) -> jax.Array:
        nonlocal done
        dtype = np.dtype(param_dtype(param, options))
        if placement is None:
            array, num_bytes = weights.read(param, dtype)
            done += num_bytes
            made = jax.device_put(array)
        else:
            made = placement.make(param, lambda box: read_box(param, box, dtype))
        progress(done, weights.num_bytes)
        return made

    def read_box(param: Param, box: Box, dtype: np.dtype[Any]) -> np.ndarray:
        nonlocal done
        array, num_bytes = weights.read_box(param, box, dtype)
        done += num_bytes
        return array

    return build(config, options, make)
