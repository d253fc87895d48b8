"""The exact form of each operator: a row's bits depend on its sequence and static sizes only."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_bits, normal, poison
from paged_cases import keys_and_values

from pallas_kernels import (
    dispatch,
    expert_mlp,
    latent_attention,
    lightning_decode,
    lightning_prefill,
    paged_attention,
)

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
OPERATORS = (
    "lightning_prefill", "lightning_decode", "paged_attention", "latent_attention", "expert_mlp",
)  # fmt: skip


def experts(x, weights, ids, probabilities, exists) -> np.ndarray:
    arrays = (x, *weights, ids, probabilities, exists)
    return np.asarray(expert_mlp(*(jnp.asarray(a) for a in arrays), exact=True))


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 6, 13, 64])
def test_r108_an_experts_load_and_lane_change_no_bit(rng, dtype, rows):
    """One row in every place: its experts crowded, shared with nobody, or with pads all around."""
    e, d, f, x = 7, 36, 14, 3
    weights = [normal(rng, shape, dtype) for shape in ((e, d, f), (e, d, f), (e, f, d))]
    mine, ids = normal(rng, (1, d), dtype), np.array([[4, 0, 5]], np.int32)
    probabilities = rng.random((1, x), np.float32)
    results = []
    for place in range(rows):
        for company in ("crowd", "others", "nobody"):
            xs = normal(rng, (rows, d), dtype)
            chosen = np.stack([rng.permutation(e)[:x] for _ in range(rows)]).astype(np.int32)
            if company == "crowd":
                chosen[:] = ids
            elif company == "others":
                chosen[:] = [1, 2, 6]
            exists = np.ones(rows, bool)
            if company == "nobody":
                exists[:] = False
                xs[:] = poison(rng, (rows, d), dtype)
            shares = rng.random((rows, x), np.float32)
            xs[place], chosen[place], shares[place], exists[place] = mine, ids, probabilities, True
            results.append(experts(xs, weights, chosen, shares, exists)[place])
    for other in results[1:]:
        assert_same_bits(other, results[0])


def attention(kind, rng, dtype, lengths, width, mine, place):
    """One call whose sequence `place` is `mine` (q, tokens); the others are random, or pads (0)."""
    size, num_pages = 16, 1 + len(lengths) * 30
    token = (48,) if kind == "paged" else (20,)
    order = iter(rng.permutation(np.arange(1, num_pages)).tolist())
    pages = poison(rng, (num_pages, size, *token), dtype)
    table = np.zeros((len(lengths), width), np.int32)
    new, q = [], []
    for i, length in enumerate(lengths):
        tokens = normal(rng, (max(length, 1), *token), dtype)
        query = normal(rng, (1, 6, 12 if kind == "paged" else 20), dtype)
        if i == place:
            query, tokens = mine
        if length:
            table[i, : -(-length // size)] = [next(order) for _ in range(-(-length // size))]
        for position in range(length - 1):
            pages[table[i, position // size], position % size] = tokens[position]
        new.append(tokens[-1:])
        q.append(query)
    q, new = np.concatenate(q), np.concatenate(new)
    where = {
        "page_table": jnp.asarray(table),
        "context_lengths": jnp.asarray(np.maximum(np.array(lengths) - 1, 0), jnp.int32),
        "scale": 0.3,
        "exact": True,
    }
    if kind == "paged":
        o, _ = paged_attention(
            *(jnp.asarray(a) for a in (q, *keys_and_values(new, 2), pages)), **where
        )
    else:
        o, _ = latent_attention(*(jnp.asarray(a) for a in (q, new, pages)), value_dim=12, **where)
    return np.asarray(o)[place]


@DTYPES
@pytest.mark.parametrize("kind", ["paged", "latent"])
@pytest.mark.parametrize("length", [1, 33, 255, 257, 300])
def test_r039_neighbours_and_a_wider_table_change_no_bit_of_attention(rng, dtype, kind, length):
    """KV blocks have one size and count from token 0, in tables 19, 29 and 4 pages wide."""
    token = (48,) if kind == "paged" else (20,)
    mine = (
        normal(rng, (1, 6, 12 if kind == "paged" else 20), dtype),
        normal(rng, (length, *token), dtype),
    )
    tables = [(w, [300, 20, 460 if w == 29 else 3, 0]) for w in (19, 29)]
    if length <= 64:
        tables.append((4, [64, 20, 3, 0]))
    results = []
    for width, others in tables:
        for place in range(4):
            lengths = [*others[:place], length, *others[place + 1 :]]
            results.append(attention(kind, rng, dtype, lengths, width, mine, place))
        alone = [length, 0, 0, 0]
        results.append(attention(kind, rng, dtype, alone, width, mine, 0))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@DTYPES
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_r046_lightning_chunks_count_from_the_segments_own_start(rng, dtype, length):
    """The recurrence among segments of any length before and behind it, in any slot."""
    n, k, v, rows, slots = 3, 6, 7, 200, 9
    decay = jnp.asarray([0.0, -0.3, -4.0], jnp.float32)
    mine = [normal(rng, (length, n, w), dtype) for w in (k, k, v)]
    old = normal(rng, (n, k, v), "float32")
    results = []
    for before, behind, slot, fresh in ((0, 0, 1, False), (13, 50, 4, False), (64, 1, 8, False)):
        q, kk, vv = (poison(rng, (rows, n, w), dtype) for w in (k, k, v))
        total = before + length + behind
        for x, own in zip((q, kk, vv), mine, strict=True):
            x[:total] = normal(rng, x[:total].shape, dtype)
            x[before : before + length] = own
        pool = poison(rng, (slots, n, k, v), "float32")
        pool[slot] = old
        o, state = lightning_prefill(
            *(jnp.asarray(a) for a in (q, kk, vv)),
            decay,
            jnp.asarray(pool),
            slots=jnp.asarray([5 * (before > 0), slot, 6 * (behind > 0)], jnp.int32),
            cu_seqlens=jnp.asarray([0, before, before + length, total], jnp.int32),
            is_fresh=jnp.asarray([True, fresh, True]),
            scale=0.4,
            exact=True,
        )
        results.append((np.asarray(o)[before : before + length], np.asarray(state)[slot]))
    for o, state in results[1:]:
        assert_same_bits(o, results[0][0])
        assert_same_bits(state, results[0][1])


@DTYPES
def test_r023_lightning_decode_is_the_same_in_every_row_and_slot(rng, dtype):
    n, k, v, rows = 3, 6, 7, 5
    decay = jnp.asarray([0.0, -0.3, -4.0], jnp.float32)
    mine = [normal(rng, (n, w), dtype) for w in (k, k, v)]
    old = normal(rng, (n, k, v), dtype)
    results = []
    for place in range(rows):
        inputs = [normal(rng, (rows, n, w), dtype) for w in (k, k, v)]
        for x, own in zip(inputs, mine, strict=True):
            x[place] = own
        pool = poison(rng, (rows + 3, n, k, v), dtype)
        pool[place + 2] = old
        slots = np.zeros(rows, np.int32)
        slots[place], slots[(place + 1) % rows] = place + 2, 1
        o, state = lightning_decode(
            *(jnp.asarray(a) for a in inputs),
            decay,
            jnp.asarray(pool),
            slots=jnp.asarray(slots),
            scale=0.4,
            exact=True,
        )
        results.append((np.asarray(o)[place], np.asarray(state)[place + 2]))
    for o, state in results[1:]:
        assert_same_bits(o, results[0][0])
        assert_same_bits(state, results[0][1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_what_promises_an_exact_form_is_taken(operator: str) -> None:
    exact = {"xla", "tpu"} if operator.startswith("lightning") else {"xla"}
    assert set(dispatch.implementations(operator, exact=True)) == exact
    for name in set(dispatch.implementations(operator)) - exact:
        with pytest.raises(ValueError, match=rf"{operator}: '{name}' can't run: it has no exact"):
            dispatch.choose(operator, name, exact=True)
