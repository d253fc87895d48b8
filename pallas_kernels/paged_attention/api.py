"""Grouped-query attention over pages: the public function and its checks.

One call serves decode rows (one new token a sequence) or packed prefill segments. New keys and
values are written to their pages first, then every row attends to its sequence up to itself.
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import reference, train, xla

dispatch.register(
    "paged_attention",
    "xla",
    xla.paged_attention,
    exact=functools.partial(xla.paged_attention, fixed_blocks=True),
)
for _name, _module in (("reference", reference), ("train", train)):
    dispatch.register("paged_attention", _name, _module.paged_attention)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    *,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None = None,
    scale: float,
    implementation: str = "auto",
    exact: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Append new tokens and attend causally.

    Args:
        q: [T, N, H] roped queries.
        k: [T, Kh, H] roped keys of the new tokens; query head n reads key head n * Kh // N.
        v: [T, Kh, H].
        pages: [num_pages, page_size, Kh * 2 * H], of each head its key, then its value; donate it.
            Page 0 is NULL. Flat, because a TPU keeps arrays in tiles of their last two axes: with
            heads among those it would lay out the whole pool anew, in every step, to write a row.
        page_table: int32 [B, W]; a first entry of 0 marks a padding sequence.
        context_lengths: int32 [B], tokens in the pages before this call.
        cu_seqlens: int32 [B + 1] for packed segments, None when row t is sequence t.
        scale: factor of the scores, head_dim ** -0.5.
        implementation: "auto" or a registered name.
        exact: a row's bits depend on nothing but its sequence and the static number of rows.

    Returns:
        o [T, N, H] in v's dtype (zero for rows that do not exist), and the pages.

    Raises:
        ValueError: shapes do not fit, or no implementation can run.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (rows, kv_heads, head_dim) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: want [T,N,H] and [T,Kh,H], Kh|N")
    width = kv_heads * 2 * head_dim
    if pages.ndim != 3 or pages.shape[2] != width:
        raise ValueError(f"pages: want [pages,size,{width}], got {pages.shape}")
    check_sequences(rows, page_table, context_lengths, cu_seqlens)
    run = dispatch.choose("paged_attention", implementation, q, k, v, pages, exact=exact)
    return _jit(run)(
        q, k, v, pages, page_table=page_table, context_lengths=context_lengths,
        cu_seqlens=cu_seqlens, scale=scale,
    )  # fmt: skip


def check_sequences(
    rows: int,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None,
) -> None:
    """Raise ValueError unless the sequence arrays of a paged operator agree."""
    batch = page_table.shape[0]
    if not rows or not batch:
        raise ValueError(f"{rows} rows of {batch} sequences: leave the call out")
    fits = context_lengths.shape == (batch,) and (
        batch == rows if cu_seqlens is None else cu_seqlens.shape == (batch + 1,)
    )
    if not fits:
        lengths = None if cu_seqlens is None else cu_seqlens.shape
        raise ValueError(
            f"{rows} rows, page_table {page_table.shape}, context_lengths "
            f"{context_lengths.shape}, cu_seqlens {lengths}"
        )


@functools.cache
def _jit(run):
    return jax.jit(run, static_argnames=("scale",))
