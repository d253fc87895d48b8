"""Paged attention for tests: calls over scattered pages with poison around them, and an oracle.

A call is built from whole sequences: their context goes to pages in random order, the new tokens
come as rows. Everything else is NaN: page 0, freed pages, what lies behind a sequence's tokens,
rows of padding. The pages after a call are known bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from checks import normal, poison


@dataclass(frozen=True)
class Seq:
    """One sequence of a call: tokens in its pages, and new ones. Padding has no pages."""

    context: int
    new: int
    pad: bool = False


@dataclass(frozen=True)
class Call:
    """Arguments of a paged operator, its tokens by sequence, and the pages it must leave."""

    sequences: list[Seq]
    tokens: list[np.ndarray]
    q: np.ndarray
    rows: np.ndarray
    pages: np.ndarray
    pages_after: np.ndarray
    page_table: np.ndarray
    context_lengths: np.ndarray
    cu_seqlens: np.ndarray | None

    def row_ranges(self) -> list[slice]:
        """The rows of each sequence."""
        ends = np.cumsum([s.new for s in self.sequences]).tolist()
        return [slice(e - s.new, e) for e, s in zip(ends, self.sequences, strict=True)]

    def rename_pages(self, place: np.ndarray) -> Call:
        """The same call with page i at place[i]."""
        pages, after = np.empty_like(self.pages), np.empty_like(self.pages)
        pages[place], after[place] = self.pages, self.pages_after
        table = place[self.page_table].astype(np.int32)
        return replace(self, pages=pages, pages_after=after, page_table=table)


def build(
    rng: np.random.Generator,
    sequences: Sequence[Seq],
    *,
    token: tuple[int, ...],
    query: tuple[int, int],
    page_size: int,
    width: int,
    num_pages: int,
    num_rows: int | None,
    dtype: str = "float32",
    tokens: Sequence[np.ndarray] | None = None,
    q: Sequence[np.ndarray] | None = None,
) -> Call:
    """A call of `num_rows` rows of packed segments, or of one row a sequence (None).

    Args:
        rng: the random numbers.
        sequences: who takes part, in order.
        token: shape of what is kept of a token.
        query: heads and width of a query.
        page_size: tokens a page.
        width: entries a row of the page table.
        num_pages: pages of the pool.
        num_rows: rows of the call, padding included; None for decode.
        dtype: of everything.
        tokens: each sequence's tokens, context and new; random ones if None.
        q: each sequence's queries; random ones if None.
    """
    if tokens is None:
        tokens = [normal(rng, (s.context + s.new, *token), dtype) for s in sequences]
    if q is None:
        q = [normal(rng, (s.new, *query), dtype) for s in sequences]
    free = iter(rng.permutation(np.arange(1, num_pages)).tolist())
    pages = poison(rng, (num_pages, page_size, *token), dtype)
    needs = [0 if s.pad else -(-(s.context + s.new) // page_size) for s in sequences]
    owned = [[next(free) for _ in range(max(need, 1))] for need in needs]
    # Entries nobody needs name pages of nobody: NaN, should they be read.
    freed = list(free)
    table = rng.choice(freed, (len(sequences), width)).astype(np.int32)
    after = pages.copy()
    total = sum(s.new for s in sequences) if num_rows is None else num_rows
    rows = poison(rng, (total, *token), dtype)
    queries = poison(rng, (total, *query), dtype)
    start = 0
    for i, s in enumerate(sequences):
        own = np.array(owned[i])
        table[i, : len(own)] = 0 if s.pad else own
        if not s.pad:
            at = np.arange(s.context + s.new)
            page, within = own[at // page_size], at % page_size
            pages[page[: s.context], within[: s.context]] = tokens[i][: s.context]
            after[page, within] = tokens[i]
            rows[start : start + s.new] = tokens[i][s.context :]
            queries[start : start + s.new] = q[i]
        start += s.new
    cu = None if num_rows is None else np.cumsum([0, *(s.new for s in sequences)]).astype(np.int32)
    contexts = np.array([s.context for s in sequences], np.int32)
    return Call(list(sequences), list(tokens), queries, rows, pages, after, table, contexts, cu)


def keys_and_values(tokens: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """What grouped-query attention keeps of tokens [..., heads * 2 * H]: each [..., heads, H]."""
    tokens = tokens.reshape(*tokens.shape[:-1], heads, 2, -1)
    return tokens[..., 0, :], tokens[..., 1, :]


def kept(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The inverse of `keys_and_values`."""
    return np.stack([keys, values], axis=-2).reshape(*keys.shape[:-2], -1)


def causal_attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, context: int, scale: float
) -> np.ndarray:
    """Dense softmax attention in float64: q [n, N, H], keys [s, N, H], values [s, N, V]."""
    q, keys, values = (x.astype(np.float64) for x in (q, keys, values))
    o = np.zeros((*q.shape[:2], values.shape[2]))
    for i in range(len(q)):
        seen = context + i + 1
        scores = scale * np.einsum("nh,snh->ns", q[i], keys[:seen])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        o[i] = np.einsum("ns,snv->nv", weights, values[:seen])
    return o
