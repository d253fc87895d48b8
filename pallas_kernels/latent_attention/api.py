"""Absorbed multi-head latent attention over pages: the public function and its checks.

A token's cache is one vector: the normalised latent (r numbers, which serve as key and value)
followed by the roped key (p numbers). Queries are already multiplied into latent space.
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels import dispatch
from pallas_kernels.latent_attention import reference, train, xla
from pallas_kernels.paged_attention.api import check_sequences

dispatch.register(
    "latent_attention",
    "xla",
    xla.latent_attention,
    exact=functools.partial(xla.latent_attention, fixed_blocks=True),
)
for _name, _module in (("reference", reference), ("train", train)):
    dispatch.register("latent_attention", _name, _module.latent_attention)


def latent_attention(
    q: jax.Array,
    latents: jax.Array,
    pages: jax.Array,
    *,
    value_dim: int,
    page_table: jax.Array,
    context_lengths: jax.Array,
    cu_seqlens: jax.Array | None = None,
    scale: float,
    implementation: str = "auto",
    exact: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Append new latents and attend causally.

    Args:
        q: [T, N, r + p], queries in latent space, then their roped channels.
        latents: [T, r + p] of the new tokens.
        pages: [num_pages, page_size, r + p]; donate it. Page 0 is NULL.
        value_dim: r.
        page_table: int32 [B, W]; a first entry of 0 marks a padding sequence.
        context_lengths: int32 [B], tokens in the pages before this call.
        cu_seqlens: int32 [B + 1] for packed segments, None when row t is sequence t.
        scale: factor of the scores.
        implementation: "auto" or a registered name.
        exact: a row's bits depend on nothing but its sequence and the static number of rows.

    Returns:
        o [T, N, r] in q's dtype, still in latent space (zero for rows that do not exist), and
        the pages.

    Raises:
        ValueError: shapes do not fit, or no implementation can run.
    """
    rows, _, width = q.shape
    if latents.shape != (rows, width) or pages.ndim != 3 or pages.shape[2] != width:
        raise ValueError(
            f"q {q.shape}, latents {latents.shape}, pages {pages.shape}: "
            f"want [T,N,{width}], [T,{width}] and [pages,size,{width}]"
        )
    if not 0 < value_dim <= width:
        raise ValueError(f"value_dim {value_dim}: want 1 to {width}")
    check_sequences(rows, page_table, context_lengths, cu_seqlens)
    run = dispatch.choose("latent_attention", implementation, q, latents, pages, exact=exact)
    return _jit(run)(
        q, latents, pages, value_dim=value_dim, page_table=page_table,
        context_lengths=context_lengths, cu_seqlens=cu_seqlens, scale=scale,
    )  # fmt: skip


@functools.cache
def _jit(run):
    return jax.jit(run, static_argnames=("value_dim", "scale"))
