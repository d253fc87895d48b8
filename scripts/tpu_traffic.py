"""What a TPU kernel moves to and from HBM, counted while the interpreter of TPU kernels runs it.

Every copy a kernel starts is counted when it is executed, once for each end that lies in HBM, and
so is every window that comes in or goes out between steps of the grid. Scalars are left out: slots
and lengths, a few bytes a row. Reads the interpreter's private functions, so it stands apart from
the package.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter


@dataclass
class Traffic:
    """Bytes moved."""

    copies: int = 0
    windows: int = 0

    @property
    def total(self) -> int:
        return self.copies + self.windows


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts for programs that are traced and run inside: make them anew with `jax.jit`."""
    traffic = Traffic()
    originals = interpreter.DMA.execute_read, interpreter.get, interpreter.store

    @functools.wraps(originals[0])
    def execute_read(dma):
        fresh = dma.state == interpreter.DmaState.STARTED
        originals[0](dma)
        if fresh:
            ends = (dma.src_memory_space, dma.dst_memory_space)
            traffic.copies += sum(_in_hbm(space) for space in ends) * dma.data_size

    @functools.wraps(originals[1])
    def get(token, device, core, space, buffer, transforms, *where, **names):
        token, value = originals[1](token, device, core, space, buffer, transforms, *where, **names)
        if where and _in_hbm(space):
            traffic.windows += np.asarray(value).nbytes
        return token, value

    @functools.wraps(originals[2])
    def store(token, device, core, space, buffer, transforms, value, *where, **names):
        if where and _in_hbm(space):
            traffic.windows += np.asarray(value).nbytes
        return originals[2](token, device, core, space, buffer, transforms, value, *where, **names)

    # Windows are told from the result's last reading by the step of the grid (`where`). A copy
    # calls what the two wrap, and is not counted twice.
    vars(get)["__wrapped__"] = vars(originals[1])["__wrapped__"]
    vars(store)["__wrapped__"] = vars(originals[2])["__wrapped__"]
    interpreter.DMA.execute_read, interpreter.get, interpreter.store = execute_read, get, store
    try:
        yield traffic
    finally:
        interpreter.DMA.execute_read, interpreter.get, interpreter.store = originals


def _in_hbm(space: object) -> bool:
    return interpreter.TPU_MEMORY_SPACE_NAMES[int(space)] in ("hbm", "any")
