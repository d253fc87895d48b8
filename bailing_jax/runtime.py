"""What the machine offers: platform, memory and whether a model fits."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from bailing_jax import distributed
from bailing_jax.errors import EXIT_DOES_NOT_FIT, UserError
from convert.progress import peak_memory

GIB = 2**30


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def memory_bytes(num_devices: int = 1) -> int | None:
    """Memory of one device, or None when it can't be told.

    Args:
        num_devices: that are used; on a CPU those of all processes on a host share its memory
            evenly.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if platform() != "cpu":
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    used_here = min(num_devices, jax.local_device_count())
    return machine // (distributed.processes_here() * used_here)


def peak_memory_bytes() -> int:
    """The most memory used so far: the device's where it is counted, else the process's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return peak_memory()


def check_fits(needs: Mapping[str, int], memory_fraction: float, num_devices: int = 1) -> None:
    """Refuse what does not fit before anything is allocated.

    Args:
        needs: bytes of a device by purpose.
        memory_fraction: the share of the device's memory that may be used.
        num_devices: that are used.

    Raises:
        UserError: with the table and the flags that help (exit code 3).
    """
    memory = memory_bytes(num_devices)
    total = sum(needs.values())
    if memory is None or total <= memory * memory_fraction:
        return
    table = "\n".join(
        f"  {what.replace('_', ' '):<16}{size / GIB:10.2f} GiB" for what, size in needs.items()
    )
    raise UserError(
        f"the model does not fit{' a device' * (num_devices > 1)}: {total / GIB:.2f} GiB needed, "
        f"{memory * memory_fraction / GIB:.2f} GiB allowed "
        f"({memory_fraction:g} of {memory / GIB:.2f} GiB)\n{table}",
        "Smaller: max_num_seqs, max_model_len, dtype bfloat16. Larger: memory_fraction, mesh.",
        EXIT_DOES_NOT_FIT,
        options=("max_num_seqs", "max_model_len", "dtype", "memory_fraction", "mesh"),
    )
