"""The training forms of the operators: the numbers of the others, and the right gradients.

Numbers are compared with the float64 oracles of the operators' own tests, gradients with those of
the references, differentiated as they stand.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal
from lightning_cases import LOG_DECAY, SCALE, K, N, Rows, S, Segment, V, fold, pool, prefill
from lightning_cases import spoil_pads as spoil
from paged_cases import Seq, build, causal_attention, keys_and_values
from test_experts import TOLERANCE as EXPERTS_TOLERANCE
from test_experts import mixture
from test_experts import spoil as spoil_rows

from pallas_kernels import expert_mlp, latent_attention, lightning_prefill, paged_attention
from pallas_kernels.tiles import put_rows, take_rows, tile_segments

pytestmark = pytest.mark.unoptimised

DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [4, 16, 64])
def test_prefill_is_the_fold(rng, chunk, dtype):
    """Fresh and continuing segments, empty ones, and NaN in every slot and row of nobody."""
    lengths = [0, 1, 3, 4, 5, 16, 17, 63, 65, 0, 130]
    slots = rng.permutation(np.arange(1, S))[: len(lengths)].tolist()
    segments = [
        Segment(slot, n, bool(i % 2))
        for i, (slot, n) in enumerate(zip(slots, lengths, strict=True))
    ]
    segments = [Segment(0, 7, False), *segments[:4], Segment(0, 5, True), *segments[4:]]
    total = sum(s.length for s in segments)
    before = pool(rng, "float32", [s.slot for s in segments if s.slot])
    rows = spoil(rng, Rows.random(rng, total, dtype).padded(rng, total + 6), segments)
    o, after = prefill("train", rows, before, segments, num_segments=16, chunk_size=chunk)
    want_o, want_states = fold(rows, before, segments)
    owner = np.repeat([s.slot for s in segments], [s.length for s in segments])
    real = np.flatnonzero(owner)
    assert (np.delete(o, real, axis=0) == 0).all()
    name = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}[dtype]
    assert_close(o[real], want_o[real], name, head_axis=1)
    for slot, want in want_states.items():
        assert_close(after[slot], want, "lightning", head_axis=0)
    others = [slot for slot in range(S) if slot not in want_states]
    assert_same_bits(after[others], before[others])


def test_gradients_of_prefill(rng):
    """Of q, k, v and of the state a segment continues, through outputs and states left behind."""
    segments = [Segment(3, 9, True), Segment(7, 0, True), Segment(2, 13), Segment(5, 1, True)]
    total = sum(s.length for s in segments)
    rows = Rows.random(rng, total + 3)
    state = normal(rng, (S, N, K, V), "float32")
    of_o, of_state = normal(rng, (total + 3, N, V), "float32"), normal(rng, state.shape, "float32")

    def value(implementation, q, k, v, state):
        o, after = lightning_prefill(
            q, k, v, jnp.asarray(LOG_DECAY), state,
            slots=jnp.asarray([s.slot for s in segments]),
            cu_seqlens=jnp.asarray(np.cumsum([0, *(s.length for s in segments)]), jnp.int32),
            is_fresh=jnp.asarray([s.fresh for s in segments]),
            scale=SCALE, chunk_size=4, implementation=implementation,
        )  # fmt: skip
        return (o * of_o).sum() + (after * of_state).sum()

    arrays = tuple(jnp.asarray(x) for x in (rows.q, rows.k, rows.v, state))
    got, want = (
        jax.grad(lambda *a, name=name: value(name, *a), argnums=(0, 1, 2, 3))(*arrays)
        for name in ("train", "reference")
    )
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, np.asarray(theirs), "lightning")


N_Q, N_KV, WIDTH, VALUE = 6, 3, 8, 5
SEQUENCES = [Seq(0, 9), Seq(0, 0), Seq(0, 1), Seq(0, 23), Seq(0, 24)]


def run_paged(call, implementation, q=None, rows=None):
    q, rows = call.q if q is None else q, call.rows if rows is None else rows
    k, v = keys_and_values(rows, N_KV)
    return paged_attention(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(call.pages),
        page_table=jnp.asarray(call.page_table), cu_seqlens=jnp.asarray(call.cu_seqlens),
        context_lengths=jnp.asarray(call.context_lengths), scale=SCALE,
        implementation=implementation,
    )  # fmt: skip


def run_latent(call, implementation, q=None, rows=None):
    q, rows = call.q if q is None else q, call.rows if rows is None else rows
    return latent_attention(
        jnp.asarray(q), jnp.asarray(rows), jnp.asarray(call.pages), value_dim=VALUE,
        page_table=jnp.asarray(call.page_table), cu_seqlens=jnp.asarray(call.cu_seqlens),
        context_lengths=jnp.asarray(call.context_lengths), scale=SCALE,
        implementation=implementation,
    )  # fmt: skip


def paged_oracle(q, tokens):
    reads = [n * N_KV // N_Q for n in range(N_Q)]
    keys, values = keys_and_values(tokens, N_KV)
    return causal_attention(q, keys[:, reads], values[:, reads], 0, SCALE)


def latent_oracle(q, tokens):
    keys = np.repeat(tokens[:, None], N_Q, axis=1)
    return causal_attention(q, keys, keys[:, :, :VALUE], 0, SCALE)


PAGED = pytest.mark.parametrize(
    ("run", "oracle", "token"),
    [(run_paged, paged_oracle, (N_KV * 2 * WIDTH,)), (run_latent, latent_oracle, (WIDTH,))],
    ids=["paged", "latent"],
)


def attention_call(rng, token, sequences=SEQUENCES, dtype="float32", num_rows=64):
    call = build(
        rng, [*sequences, Seq(0, 4, pad=True)], token=token, query=(N_Q, WIDTH), page_size=4,
        width=7, num_pages=40, num_rows=num_rows, dtype=dtype,
    )  # fmt: skip
    return replace(call, page_table=call.page_table[:, :6])


@PAGED
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_inside_each_segment(rng, run, oracle, token, dtype):
    """Up to a full window (6 pages of 4); pages, full of NaN, are neither read nor written."""
    call = attention_call(rng, token, dtype=dtype)
    o, pages = run(call, "train")
    assert_same_bits(pages, call.pages)
    o, real = np.asarray(o), np.zeros(len(call.q), bool)
    name = {"float32": "attention", "bfloat16": "attention_bfloat16"}[dtype]
    for sequence, tokens, rows in zip(call.sequences, call.tokens, call.row_ranges(), strict=True):
        if sequence.new and not sequence.pad:
            real[rows] = True
            assert_close(o[rows], oracle(call.q[rows], tokens), name, head_axis=1)
    assert (o[~real] == 0).all()


@PAGED
@pytest.mark.parametrize("wrong", [Seq(1, 5), Seq(0, 25)], ids=["context", "too long"])
def test_what_it_cannot_do_gives_nan(rng, run, oracle, token, wrong):
    """And leaves the neighbours alone."""
    call = attention_call(rng, token, [Seq(0, 7), wrong, Seq(0, 6)], num_rows=50)
    o = np.asarray(run(call, "train")[0])
    before, bad, after = (o[rows] for rows in call.row_ranges()[:3])
    assert np.isnan(bad).all()
    assert_close(before, oracle(call.q[:7], call.tokens[0]), "attention", head_axis=1)
    assert_close(
        after, oracle(call.q[call.row_ranges()[2]], call.tokens[2]), "attention", head_axis=1
    )


def test_decode_rows_are_refused():
    with pytest.raises(ValueError, match="no decode rows"):
        latent_attention(
            jnp.zeros((3, N_Q, WIDTH)), jnp.zeros((3, WIDTH)), jnp.zeros((2, 4, WIDTH)),
            value_dim=VALUE, page_table=jnp.ones((3, 6), jnp.int32),
            context_lengths=jnp.zeros(3, jnp.int32), scale=SCALE, implementation="train",
        )  # fmt: skip


@PAGED
def test_gradients_of_attention(rng, run, oracle, token):
    call = attention_call(rng, token)
    # The reference can't be differentiated past poison.
    call = replace(call, pages=np.zeros_like(call.pages))
    q, rows = np.nan_to_num(call.q), np.nan_to_num(call.rows)
    weight = normal(rng, run(call, "train")[0].shape, "float32")
    got, want = (
        jax.grad(lambda q, rows, name=name: (run(call, name, q, rows)[0] * weight).sum(), (0, 1))(
            jnp.asarray(q), jnp.asarray(rows)
        )
        for name in ("train", "reference")
    )
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, np.asarray(theirs), "attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 129])
def test_experts_are_the_loop(rng, rows, dtype):
    m = spoil_rows(rng, mixture(rng, rows, dtype), rng.random(rows) < 0.3)
    y = m.run("train")
    assert (y[~m.exists] == 0).all()
    assert_close(y, m.loop(), EXPERTS_TOLERANCE[dtype])


def test_gradients_of_experts(rng):
    m = mixture(rng, 37)
    m.exists[5:9] = False
    weight = normal(rng, m.x.shape, "float32")

    def value(name, *arrays):
        x, gate, up, down, weights = arrays
        y = expert_mlp(
            x, gate, up, down, jnp.asarray(m.ids), weights, jnp.asarray(m.exists),
            implementation=name,
        )  # fmt: skip
        return (y * weight).sum()

    arrays = tuple(map(jnp.asarray, (m.x, m.gate, m.up, m.down, m.weights)))
    got, want = (
        jax.grad(lambda *a, name=name: value(name, *a), argnums=range(5))(*arrays)
        for name in ("train", "reference")
    )
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, np.asarray(theirs), "experts")


def test_taking_and_putting_rows_are_transposes(rng):
    """<take(x), y> = <x, put(y)>, and the gradients JAX is told are those two."""
    tiles = tile_segments(jnp.asarray([0, 3, 3, 12, 14], jnp.int32), 17, 4)
    x = jnp.asarray(normal(rng, (17, 5), "float32"))
    taken, take_back = jax.vjp(lambda x: take_rows(x, tiles), x)
    y = jnp.asarray(normal(rng, taken.shape, "float32"))
    put, put_back = jax.vjp(lambda y: put_rows(y, tiles), y)
    assert_same_bits(take_back(y)[0], put)
    assert_same_bits(put_back(x)[0], taken)
    np.testing.assert_allclose((taken * y).sum(), (x * put).sum(), rtol=1e-5)
