"""Which part of a parameter each checkpoint tensor is: `params.Source` applied to arrays.

Reading a released checkpoint and converting one use the same few lines, and `unplace` is their
inverse. numpy only.
"""

from __future__ import annotations

import numpy as np

from bailing_jax.params import Source


def place(source: Source, tensor: np.ndarray, out: np.ndarray) -> None:
    """Write the part of a checkpoint tensor that belongs to the parameter array `out`."""
    part = tensor.reshape(source.view)
    if source.take is not None:
        part = part[_cut(source)]
    target = out if source.index is None else out[source.index]
    target[...] = part.transpose(source.order)


def unplace(source: Source, parameter: np.ndarray, out: np.ndarray) -> None:
    """Write the parameter's part of a checkpoint tensor into `out`, an array of source.shape."""
    part = parameter if source.index is None else parameter[source.index]
    view = out.reshape(source.view)
    target = view if source.take is None else view[_cut(source)]
    target[...] = part.transpose(np.argsort(source.order))


def _cut(source: Source) -> tuple[slice, ...]:
    if source.take is None:
        return ()
    axis, start, stop = source.take
    return (slice(None),) * axis + (slice(start, stop),)
