"""Which part of a parameter each checkpoint tensor is: `params.Source` applied to arrays.

Everything rests on one view: the part of a checkpoint tensor that belongs to a parameter, its
axes in the parameter's order. Read through it and a tensor is converted; write through it and it
is restored. `slabs` cuts that view so that a whole parameter never needs to be in memory. numpy
only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bailing_jax.params import Shape, Source

SLAB_BYTES = 4 * 2**20  # stays in the last cache between transposing, hashing and writing

# Transposed copies go by tiles through a small buffer with a gap after each row. Without the gap
# rows a power of two apart, as most are, share a few places of the cache and push each other out:
# 4 to 6 GB/s measured on bfloat16, tiles without the buffer 1 to 2.7, numpy's own order 0.3.
_TILE, _GAP = 256, 16


def in_order(source: Source, tensor: np.ndarray) -> np.ndarray:
    """The part of a checkpoint tensor that `source` takes, as a view in the parameter's order.

    `tensor` is C-ordered. The view has the parameter's shape, without the leading axis of experts.
    """
    part = tensor.reshape(source.view)
    if source.take is not None:
        axis, start, stop = source.take
        part = part[(slice(None),) * axis + (slice(start, stop),)]
    return part.transpose(source.order)


def place(source: Source, tensor: np.ndarray, out: np.ndarray) -> None:
    """Write the part of a checkpoint tensor that belongs to the parameter array `out`."""
    copy(in_order(source, tensor), out if source.index is None else out[source.index])


def unplace(source: Source, parameter: np.ndarray, out: np.ndarray) -> None:
    """Write the parameter's part of a checkpoint tensor into `out`, an array of source.shape."""
    copy(parameter if source.index is None else parameter[source.index], in_order(source, out))


def slab_rows(shape: Shape, itemsize: int) -> Iterator[slice]:
    """Slices of the first axis of an array of `shape`, each about SLAB_BYTES."""
    row = itemsize * int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, SLAB_BYTES // max(row, 1))
    # Full tiles where the rows allow it.
    step = step // _TILE * _TILE or step
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def copy(values: np.ndarray, out: np.ndarray) -> None:
    """`out[...] = values` for arrays of one shape, fast also where one of them is transposed."""
    if values.dtype != out.dtype:
        out[...] = values
        return
    # numpy copies its own integers several times faster than the dtypes it does not know.
    bits = np.dtype(f"u{values.dtype.itemsize}")
    values, out = values.view(bits), out.view(bits)
    if values.ndim != 2 or _is_transposed(values) == _is_transposed(out):
        out[...] = values
    elif _is_transposed(values):
        _copy_tiles(values.T, out.T)
    else:
        _copy_tiles(values, out)


def _is_transposed(array: np.ndarray) -> bool:
    return array.strides[0] < array.strides[1]


def _copy_tiles(values: np.ndarray, out: np.ndarray) -> None:
    """Copy rows to columns: `values` has contiguous rows, `out` contiguous columns."""
    rows, columns = values.shape
    buffer = np.empty((min(rows, _TILE), min(columns, _TILE) + _GAP), values.dtype)
    for column in range(0, columns, _TILE):
        for row in range(0, rows, _TILE):
            part = (slice(row, row + _TILE), slice(column, column + _TILE))
            height, width = values[part].shape
            tile = buffer[:height, :width]
            tile[...] = values[part]
            out[part] = tile
