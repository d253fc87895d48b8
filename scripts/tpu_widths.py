"""Lightning attention of other head sizes, compiled for a TPU: is the pool left where it is?

The public functions with pools as a TPU keeps them, with zeros up to whole lanes behind V
(`Lightning.state_width`). For `tpu_check.py`, which sets up the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from bailing_jax.planning import hlo
from pallas_kernels import lightning_decode, lightning_prefill
from pallas_kernels.lightning_attention.api import LANES

# (N, K, V): as XLA would put K, the slots, or nothing else along the lanes, were V not padded.
SIZES = ((6, 64, 64), (4, 96, 48), (16, 128, 192), (8, 256, 96), (5, 32, 256))
SLOTS, ROWS, SEGMENTS = 257, 256, 8


def compiled(place: NamedSharding) -> Iterator[dict[str, Any]]:
    """Each size, operator and dtype of the pool; inside the mesh of the device that is meant."""
    for heads, key_dim, value_dim in SIZES:
        for state_dtype in ("float32", "bfloat16"):
            width = -(-value_dim // LANES) * LANES
            pool = (SLOTS, heads, key_dim, width)
            shapes = [
                *[((ROWS, heads, w), "bfloat16") for w in (key_dim, key_dim, value_dim)],
                ((heads,), "float32"),
                (pool, state_dtype),
            ]
            for operator, (run, where) in OPERATORS.items():
                given = [
                    jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
                    for shape, dtype in (*shapes, *where)
                ]
                program = jax.jit(run, donate_argnums=4).lower(*given).compile()
                memory = program.memory_analysis()
                pool_bytes = given[4].size * given[4].dtype.itemsize
                yield {
                    "operator": operator, "heads": heads, "K": key_dim, "V": value_dim,
                    "state_dtype": state_dtype,
                    "state_copies": hlo.state_copies(program.as_text()),
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "pool_in_place": memory.alias_size_in_bytes >= pool_bytes,
                }  # fmt: skip


def _decode(q, k, v, log_decay, state, slots):
    return lightning_decode(
        q, k, v, log_decay, state, slots=slots, scale=0.1, implementation="tpu"
    )  # fmt: skip


def _prefill(q, k, v, log_decay, state, slots, cu_seqlens, is_fresh):
    return lightning_prefill(
        q, k, v, log_decay, state, slots=slots, cu_seqlens=cu_seqlens, is_fresh=is_fresh,
        scale=0.1, implementation="tpu",
    )  # fmt: skip


# By operator: its call, and shapes and dtypes of what says which slots.
OPERATORS: dict[str, tuple[Callable, list[tuple[tuple[int, ...], str]]]] = {
    "decode": (_decode, [((ROWS,), "int32")]),
    "prefill": (
        _prefill,
        [((SEGMENTS,), "int32"), ((SEGMENTS + 1,), "int32"), ((SEGMENTS,), "bool")],
    ),
}
