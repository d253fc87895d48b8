"""The operators on small fixed inputs: against float64, and around slots and pages of others.

The same few shapes serve every check, so that each operator compiles once. The float64 folds are
written out here, apart from the operators and from their references.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import device_put  # unlike jnp.asarray compiles nothing, which is the time this takes

from pallas_kernels import (
    expert_mlp,
    latent_attention,
    lightning_decode,
    lightning_prefill,
    paged_attention,
)

# float32 products of at most 80 terms, sums of as many tokens; measured 1e-6 on a CPU.
TOLERANCE = 2e-5
SCALE = 0.3
_DECAY = np.array([0.0, -0.02, -1.5], np.float32)
_PAGE_SIZE, _WIDTH = 16, 6
# Rows of a decode call: three sequences, two pads. Tokens cached before.
_CONTEXTS = np.array([70, 0, 16, 0, 33], np.int32)
_HELD = np.array([True, False, True, False, True])
_SLOTS = np.array([5, 0, 2, 0, 4], np.int32)


class CheckFailed(RuntimeError):  # noqa: N818  (a finding, not a fault of this program)
    """What a check found."""


def close(what: str, got: object, want: np.ndarray) -> None:
    """Raise CheckFailed unless got is want within the tolerance, relative to want's size."""
    found = np.asarray(got).astype(np.float64)
    worst = np.max(np.abs(found - want) / (np.abs(want) + np.sqrt(np.mean(want**2))))
    if not worst <= TOLERANCE:  # NaN too
        raise CheckFailed(f"{what}: off by {worst:.2g}, allowed {TOLERANCE:g}")


def same(what: str, got: object, want: object) -> None:
    """Raise CheckFailed unless the bits are equal."""
    a, b = (np.ascontiguousarray(np.asarray(x)).view(np.uint8) for x in (got, want))
    if a.shape != b.shape or not np.array_equal(a, b):
        raise CheckFailed(f"{what}: the bits changed")


class Pool(NamedTuple):
    """Lightning inputs: rows of five sequences, and a pool with canaries in slots of nobody."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    state: np.ndarray


def _pool(rows: int) -> Pool:
    rng = np.random.default_rng(rows)
    q, k, v = (rng.standard_normal((rows, 3, w), np.float32) for w in (6, 6, 7))
    state = rng.standard_normal((8, 3, 6, 7), np.float32)
    state[0] = 0
    state[[1, 3, 6, 7]] = np.nan
    return Pool(q, k, v, state)


def lightning_decode_golden() -> None:
    """One token into three of eight slots, two pad rows among them."""
    pool = _pool(5)
    arrays = (pool.q, pool.k, pool.v, _DECAY, pool.state)
    o, state = lightning_decode(*device_put(arrays), slots=device_put(_SLOTS), scale=SCALE)
    o, state = np.asarray(o), np.asarray(state)
    decay = np.exp(_DECAY.astype(np.float64))[:, None, None]
    for row in np.flatnonzero(_HELD):
        old = pool.state[_SLOTS[row]].astype(np.float64)
        new = decay * old + pool.k[row][:, :, None].astype(np.float64) * pool.v[row][:, None, :]
        close("lightning_decode, state", state[_SLOTS[row]], new)
        want = SCALE * (new * pool.q[row][:, :, None]).sum(1)
        close("lightning_decode, output", o[row], want)
    _untouched("lightning_decode", o[~_HELD], state, pool.state, _SLOTS[_HELD])


def lightning_prefill_golden() -> None:
    """Segments of 1, 0 and 70 tokens, one fresh in a slot full of NaN, and a pad segment."""
    pool, slots = _pool(80), np.array([5, 2, 3, 0], np.int32)
    arrays = (pool.q, pool.k, pool.v, _DECAY, pool.state)
    o, state = lightning_prefill(
        *device_put(arrays),
        slots=device_put(slots),
        cu_seqlens=device_put(np.array([0, 1, 1, 71, 71], np.int32)),
        is_fresh=device_put(np.array([False, True, True, False])),
        scale=SCALE,
    )
    o, state = np.asarray(o), np.asarray(state)
    decay = np.exp(_DECAY.astype(np.float64))[:, None, None]
    for slot, start, stop, fresh in ((5, 0, 1, False), (3, 1, 71, True)):
        s = np.zeros((3, 6, 7)) if fresh else pool.state[slot].astype(np.float64)
        want = np.zeros((stop - start, 3, 7))
        for t in range(start, stop):
            s = decay * s + pool.k[t][:, :, None].astype(np.float64) * pool.v[t][:, None, :]
            want[t - start] = SCALE * (s * pool.q[t][:, :, None]).sum(1)
        close("lightning_prefill, output", o[start:stop], want)
        close("lightning_prefill, state", state[slot], s)
    _untouched("lightning_prefill", o[71:], state, pool.state, np.array([5, 3]))


def _untouched(
    operator: str, pads: np.ndarray, after: np.ndarray, before: np.ndarray, owned: np.ndarray
) -> None:
    """Canaries: output of padding is zero, places not named keep their bits."""
    if pads.any() or np.isnan(pads).any():
        raise CheckFailed(f"{operator}: the output of padding is not zero")
    others = np.setdiff1d(np.arange(len(before)), owned)
    same(f"{operator}: a place of nobody in the call", after[others], before[others])


class Cache(NamedTuple):
    """Five sequences, two of them padding, their tokens, and pages with NaN wherever nobody is."""

    tokens: list[np.ndarray]
    pages: np.ndarray
    table: np.ndarray


def _cache(token: int) -> Cache:
    rng = np.random.default_rng(7)
    tokens = [rng.standard_normal((n + 1, token), np.float32) for n in _CONTEXTS]
    pages = np.full((20, _PAGE_SIZE, token), np.nan, np.float32)
    pages[0] = 0
    table, free = np.zeros((5, _WIDTH), np.int32), iter(rng.permutation(np.arange(1, 20)).tolist())
    for i in np.flatnonzero(_HELD):
        for entry in range(_CONTEXTS[i] // _PAGE_SIZE + 1):
            table[i, entry] = next(free)
        for position in range(_CONTEXTS[i]):
            page = table[i, position // _PAGE_SIZE]
            pages[page, position % _PAGE_SIZE] = tokens[i][position]
    return Cache(tokens, pages, table)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _check_pages(operator: str, o: np.ndarray, after: np.ndarray, cache: Cache) -> None:
    """The new tokens stand behind the old ones, and nothing else has moved."""
    if o[~_HELD].any() or np.isnan(o[~_HELD]).any():
        raise CheckFailed(f"{operator}: the output of padding is not zero")
    want = cache.pages.copy()
    for i in np.flatnonzero(_HELD):
        page = cache.table[i, _CONTEXTS[i] // _PAGE_SIZE]
        want[page, _CONTEXTS[i] % _PAGE_SIZE] = cache.tokens[i][-1]
    same(f"{operator}: the pages", after, want)


def paged_attention_golden() -> None:
    """Grouped-query attention of a decode step: 4 query heads, 2 key heads."""
    cache, rng = _cache(2 * 2 * 12), np.random.default_rng(8)
    q = rng.standard_normal((5, 4, 12), np.float32)
    new = np.stack([tokens[-1] for tokens in cache.tokens]).reshape(5, 2, 2, 12)
    o, pages = paged_attention(
        *device_put((q, new[:, :, 0], new[:, :, 1], cache.pages)),
        page_table=device_put(cache.table),
        context_lengths=device_put(_CONTEXTS),
        scale=SCALE,
    )
    o = np.asarray(o)
    for i in np.flatnonzero(_HELD):
        kept = cache.tokens[i].astype(np.float64).reshape(-1, 2, 2, 12)
        keys, values = kept.transpose(2, 1, 0, 3)
        for head in range(4):
            weights = _softmax(SCALE * keys[head // 2] @ q[i, head])
            close("paged_attention, output", o[i, head], weights @ values[head // 2])
    _check_pages("paged_attention", o, np.asarray(pages), cache)


def latent_attention_golden() -> None:
    """Latent attention of a decode step: 4 heads over 12 latent and 8 roped numbers."""
    cache, rng = _cache(20), np.random.default_rng(9)
    q = rng.standard_normal((5, 4, 20), np.float32)
    new = np.stack([tokens[-1] for tokens in cache.tokens])
    o, pages = latent_attention(
        *device_put((q, new, cache.pages)),
        value_dim=12,
        page_table=device_put(cache.table),
        context_lengths=device_put(_CONTEXTS),
        scale=SCALE,
    )
    o = np.asarray(o)
    for i in np.flatnonzero(_HELD):
        latents = cache.tokens[i].astype(np.float64)
        for head in range(4):
            weights = _softmax(SCALE * latents @ q[i, head])
            close("latent_attention, output", o[i, head], weights @ latents[:, :12])
    _check_pages("latent_attention", o, np.asarray(pages), cache)


def experts_golden() -> None:
    """Six rows, one of them padding full of NaN, each through 2 of 5 experts."""
    rng = np.random.default_rng(10)
    x = rng.standard_normal((6, 11), np.float32)
    gate, up, down = (
        rng.standard_normal(shape, np.float32) for shape in ((5, 11, 6), (5, 11, 6), (5, 6, 11))
    )
    ids = np.stack([rng.permutation(5)[:2] for _ in range(6)]).astype(np.int32)
    weights, exists = rng.random((6, 2), np.float32), np.arange(6) != 3
    x[3] = np.nan
    y = np.asarray(expert_mlp(*device_put((x, gate, up, down, ids, weights, exists))))
    for row in np.flatnonzero(exists):
        wide, want = x[row].astype(np.float64), np.zeros(11)
        for e, weight in zip(ids[row], weights[row], strict=True):
            hidden = wide @ gate[e]
            want += weight * (hidden / (1 + np.exp(-hidden)) * (wide @ up[e])) @ down[e]
        close("expert_mlp, output", y[row], want)
    if y[3].any():
        raise CheckFailed("expert_mlp: the output of padding is not zero")
