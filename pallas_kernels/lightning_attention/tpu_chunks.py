"""One chunk of the TPU prefill, on chip: its outputs, and the state behind it.

With b_i = (i + 1) g inside a chunk of n rows:

    o_i = scale * ( sum_{j<=i} exp((i - j) g) (q_i . k_j) v_j  +  exp(b_i) S_prev^T q_i )
    S   = exp(n g) S_prev + sum_j exp((n - 1 - j) g) k_j v_j^T

Every exponent is <= 0. `tpu_prefill` brings the rows and takes them away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lightning_attention import tpu_blocks

Ref = Any
Scalar = jax.Array | int


class Rows(NamedTuple):
    """Two buffers of a chunk's rows, in the order of the packed arrays: [2, C, n, K or V]."""

    q: Ref
    k: Ref
    v: Ref
    o: Ref


class Heads(NamedTuple):
    """A chunk with heads in front, [n, C, K or V], and what is kept for each head."""

    q: Ref
    k: Ref
    v: Ref
    o: Ref
    within: Ref  # float32 [n, C, C]: scale exp((i - j) g) on and below the diagonal, else 0
    from_before: Ref  # float32 [n, C, V]: scale exp((i + 1) g)
    state: Ref  # float32 [n, K, V]


def split_heads(rows: Rows, heads: Heads, count: jax.Array, buffer: jax.Array) -> None:
    """Rows of a chunk, head by head; those that do not exist become zeros."""
    pairs = ((rows.q, heads.q), (rows.k, heads.k), (rows.v, heads.v))
    chunk = rows.q.shape[1]

    @pl.when(count < chunk)
    def _():
        # What an earlier chunk left there, or NaN: selected, not multiplied by zero.
        for packed, _ in pairs:
            row = lax.broadcasted_iota(jnp.int32, packed.shape[1:], 0)
            found = packed[buffer].astype(jnp.float32)
            packed[buffer] = jnp.where(row < count, found, 0).astype(packed.dtype)

    for packed, split in pairs:
        split[...] = jnp.swapaxes(packed[buffer], 0, 1)


def tabulate(heads: Heads, log_decay: Ref, first_head: Scalar, scale: float) -> None:
    """The two tables of every head of the block."""
    num_heads, chunk, value_dim = heads.from_before.shape

    def head(n, _):
        g = log_decay[first_head + n]

        def decay(age):
            return scale * jnp.exp(age.astype(jnp.float32) * g)

        i = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
        j = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
        heads.within[n] = jnp.where(i >= j, decay(jnp.maximum(i - j, 0)), 0)
        i = lax.broadcasted_iota(jnp.int32, (chunk, value_dim), 0)
        heads.from_before[n] = decay(i + 1)

    lax.fori_loop(0, num_heads, head, None)


def fold_chunk(heads: Heads, log_decay: Ref, first_head: Scalar, count: jax.Array) -> None:
    """The chunk's outputs and the state behind it, head by head."""
    num_heads, chunk, _ = heads.q.shape
    value_dim = heads.v.shape[-1]

    def head(n):
        g = log_decay[first_head + n]
        q, k_t, v = heads.q[n], heads.k[n].T, heads.v[n]
        before = heads.state[n]
        o = _dot_wide(_dot(q, k_t) * heads.within[n], v, 2)
        o += _dot_wide(q, before, 2) * heads.from_before[n]
        heads.o[n] = o.astype(heads.o.dtype)
        left = jnp.maximum(count - 1 - lax.broadcasted_iota(jnp.int32, (1, chunk), 1), 0)
        weighted = k_t.astype(jnp.float32) * jnp.exp(left.astype(jnp.float32) * g)
        whole = jnp.full((1, value_dim), count.astype(jnp.float32) * g)
        # The state keeps all of float32: three pieces. An output is rounded to v's dtype anyway.
        heads.state[n] = jnp.exp(whole) * before + _dot_wide(weighted, v, 3)

    # As many heads are scheduled together as keep the units busy; their number bounds the code.
    together = tpu_blocks.together(heads.q, heads.v)

    def group(i, _):
        for n in range(together):
            head(i * together + n)

    lax.fori_loop(0, num_heads // together, group, None)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in float32: one pass of the matrix unit for bfloat16, which it multiplies exactly."""
    wide = a.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _dot_wide(a: jax.Array, b: jax.Array, number: int) -> jax.Array:
    """a @ b where one of them is float32; the other's dtype says how.

    Beside bfloat16 the float32 one is cut into `number` bfloat16 pieces of 8 bits each, where a
    float32 product takes six passes: x y = (x1 + x2) y = [x1 x2] [y; y].
    """
    if a.dtype == b.dtype:
        return _dot(a, b)
    if a.dtype == jnp.float32:
        return _dot(jnp.concatenate(_pieces(a, number), axis=1), jnp.concatenate([b] * number))
    return _dot(jnp.concatenate([a] * number, axis=1), jnp.concatenate(_pieces(b, number)))


def _pieces(x: jax.Array, number: int) -> list[jax.Array]:
    """bfloat16 arrays whose sum is x but for its last 24 - 8 * number bits."""
    found = []
    for _ in range(number):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return found
