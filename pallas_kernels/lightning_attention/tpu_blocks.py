"""Block sizes of the TPU kernels, from a bound on the VMEM they take, and what they refuse.

A TPU keeps arrays in tiles of 8 rows of 128 32-bit lanes (16 rows of 16-bit numbers), so the two
last dimensions count as rounded up. Heads are cut in blocks of 8 where they can be; another number
of heads is one block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# The smallest VMEM is 64 MiB (v5p, tpu7x). Blocks keep to half of it; the compiler may use more
# for what it moves out of registers.
VMEM_BUDGET = 32 << 20
VMEM_LIMIT = 48 << 20
# The smallest scalar memory is 1 MiB; it holds slots and lengths.
SCALAR_BUDGET = 896 << 10
# Decode: buffers for states, and loads under way.
DEPTH, AHEAD = 4, 2
# Prefill: tokens a chunk, where the caller leaves it open.
CHUNKS = (128, 64)
HEAD_BLOCK = 8
# Rows of q, k, v and o that decode moves at once.
MAX_ROWS = 32
WIDTHS = range(32, 257, 8)
_MIB = 1 << 20


@dataclass(frozen=True)
class DecodeBlocks:
    """Heads a task, rows a window, bytes of VMEM, and why they do not fit (None if they do)."""

    heads: int
    rows: int
    vmem: int
    refusal: str | None


@dataclass(frozen=True)
class PrefillBlocks:
    """Heads a program, tokens a chunk, bytes of VMEM, and why they do not fit."""

    heads: int
    chunk: int
    vmem: int
    refusal: str | None


def refusal(q: jax.Array, v: jax.Array, state: jax.Array) -> str | None:
    """Why neither kernel takes these arrays, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype} and {v.dtype}, not both float32 or both bfloat16"
    if state.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the state is {state.dtype}, not float32 or bfloat16"
    for name, width in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if width not in WIDTHS:
            return f"{name} is {width}, not a multiple of 8 from {WIDTHS[0]} to {WIDTHS[-1]}"
    return None


def head_block(num_heads: int) -> int:
    """Heads that are worked on together."""
    return HEAD_BLOCK if num_heads % HEAD_BLOCK == 0 else num_heads


def together(q: jax.Array, v: jax.Array) -> int:
    """How many heads of a chunk [n, C, K | V] are scheduled together: a divisor of n.

    Eight of the usual size keep the units busy; wider ones, and float32's six passes, fill them
    and the program sooner.
    """
    passes = 6 if q.dtype == jnp.float32 else 1
    work = passes * q.shape[-1] * v.shape[-1]
    return math.gcd(q.shape[0], max(1, HEAD_BLOCK * 128 * 128 // max(work, 128 * 128)))


def decode_blocks(q: jax.Array, v: jax.Array, state: jax.Array) -> DecodeBlocks:
    """The blocks of a decode call, by shapes and dtypes."""
    batch, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    heads = head_block(num_heads)
    fixed = (
        DEPTH * tiled_bytes((heads, key_dim, value_dim), state.dtype)
        + tiled_bytes((num_heads, value_dim), jnp.float32)
        + 2 * tiled_bytes((heads, key_dim), jnp.float32)
        + 2 * tiled_bytes((heads, value_dim), jnp.float32)
    )
    # Windows are doubled: one is worked on, one is on its way.
    row = 4 * tiled_bytes((num_heads, key_dim), q.dtype)
    row += 4 * tiled_bytes((num_heads, value_dim), v.dtype)
    rows = min(batch, MAX_ROWS)
    while rows > 1 and fixed + rows * row > VMEM_BUDGET:
        rows //= 2
    vmem = fixed + rows * row
    refused = _too_large(vmem, num_heads) or _too_many(4 * (batch + num_heads), batch, "rows")
    return DecodeBlocks(heads, rows, vmem, refused)


def prefill_blocks(
    q: jax.Array, v: jax.Array, state: jax.Array, chunk: int | None = None
) -> PrefillBlocks:
    """The blocks of a prefill call, by shapes and dtypes.

    `chunk` None: the longest of CHUNKS that fits, else the shortest.
    """
    _, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    heads = head_block(num_heads)
    states = tiled_bytes((heads, key_dim, value_dim), jnp.float32)
    states += 2 * tiled_bytes((heads, key_dim, value_dim), state.dtype)

    def vmem(chunk: int) -> int:
        rows = 4 * tiled_bytes((chunk, heads, key_dim), q.dtype)
        rows += 4 * tiled_bytes((chunk, heads, value_dim), v.dtype)
        split = 2 * tiled_bytes((heads, chunk, key_dim), q.dtype)
        split += 2 * tiled_bytes((heads, chunk, value_dim), v.dtype)
        tables = tiled_bytes((heads, chunk, chunk), jnp.float32)
        tables += tiled_bytes((heads, chunk, value_dim), jnp.float32)
        return rows + split + tables + states

    chunk = chunk or next((c for c in CHUNKS if vmem(c) <= VMEM_BUDGET), CHUNKS[-1])
    return PrefillBlocks(heads, chunk, vmem(chunk), _too_large(vmem(chunk), num_heads))


def tiled_bytes(shape: tuple[int, ...], dtype: jnp.dtype | type) -> int:
    """Bytes of an array in VMEM."""
    size = jnp.dtype(dtype).itemsize
    *outer, rows, lanes = shape
    packed = 8 * 4 // size
    return math.prod(outer) * _up(rows, packed) * _up(lanes, 128) * size


def _too_large(vmem: int, num_heads: int) -> str | None:
    if vmem <= VMEM_BUDGET:
        return None
    return (
        f"a block of {head_block(num_heads)} heads takes {vmem / _MIB:.0f} MiB of VMEM, more than "
        f"{VMEM_BUDGET // _MIB}; a number of heads that {HEAD_BLOCK} divides goes in smaller blocks"
    )


def _too_many(size: int, number: int, what: str) -> str | None:
    if size <= SCALAR_BUDGET:
        return None
    allowed = SCALAR_BUDGET >> 10
    return f"{number} {what} take {size >> 10} KiB of scalar memory, more than {allowed}"


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
