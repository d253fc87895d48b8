"""Laws of lightning attention: how a sequence is cut, placed and accompanied does not matter."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, error, normal
from lightning_cases import (
    IMPLEMENTATIONS,
    K,
    N,
    Rows,
    S,
    Segment,
    V,
    decode,
    pool,
    prefill,
)
from tolerances import TOLERANCES

from pallas_kernels import lightning_decode

CHUNK, NUM_ROWS, NUM_SEGMENTS = 4, 41, 8
STATE_TOLERANCE = {"float32": "lightning", "bfloat16": "bfloat16_cut"}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def run(rng, implementation, state, *parts: tuple[Segment, Rows]):
    """One call with the given segments in order; each segment's outputs, and the pool."""
    segments = [segment for segment, _ in parts]
    rows = Rows.join([rows for _, rows in parts]).padded(rng, NUM_ROWS)
    o, state = prefill(
        implementation, rows, state, segments, num_segments=NUM_SEGMENTS, chunk_size=CHUNK
    )
    return np.split(o, np.cumsum([s.length for s in segments]))[:-1], state


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fresh", [True, False])
def test_r047_r051_every_cut_of_a_prompt_is_the_whole(rng, implementation, fresh, state_dtype):
    """Two prompts are cut at once, at different places and in either order."""
    a, b = Rows.random(rng, 2 * CHUNK + 3), Rows.random(rng, 11)
    before = pool(rng, state_dtype, live=[6, 15])
    (whole_a, whole_b), after = run(
        rng, implementation, before, (Segment(6, 11, fresh), a), (Segment(15, 11, fresh), b)
    )
    for cut in range(12):
        other = (cut + 5) % 12
        (a0, b0), middle = run(
            rng, implementation, before,
            (Segment(6, cut, fresh), a[:cut]), (Segment(15, other, fresh), b[:other]),
        )  # fmt: skip
        (b1, a1), end = run(
            rng, implementation, middle,
            (Segment(15, 11 - other, fresh and not other), b[other:]),
            (Segment(6, 11 - cut, fresh and not cut), a[cut:]),
        )  # fmt: skip
        for head, tail, whole in ((a0, a1, whole_a), (b0, b1, whole_b)):
            got = np.concatenate([head, tail])
            assert_close(got, whole, STATE_TOLERANCE[state_dtype], head_axis=1)
        for slot in (6, 15):
            assert_close(end[slot], after[slot], STATE_TOLERANCE[state_dtype], head_axis=0)
        untouched = [slot for slot in range(S) if slot not in (6, 15)]
        assert_same_bits(end[untouched], before[untouched])


def test_r056_cuts_at_chunk_borders_are_the_whole_bit_for_bit(rng, implementation):
    prompt = Rows.random(rng, 11)
    before = pool(rng, "float32")
    (whole,), after = run(rng, implementation, before, (Segment(6, 11, True), prompt))
    for cut in (CHUNK, 2 * CHUNK):
        (head,), middle = run(rng, implementation, before, (Segment(6, cut, True), prompt[:cut]))
        (tail,), end = run(rng, implementation, middle, (Segment(6, 11 - cut), prompt[cut:]))
        assert_same_bits(np.concatenate([head, tail]), whole)
        assert_same_bits(end, after)


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 9])
def test_r011_r015_prefill_then_decode_is_a_longer_prefill(rng, implementation, length):
    prompt = Rows.random(rng, 11)
    before = pool(rng, "float32")
    (whole,), after = run(rng, implementation, before, (Segment(6, 11, True), prompt))
    (got,), state = run(rng, implementation, before, (Segment(6, length, True), prompt[:length]))
    outputs = [got]
    for t in range(length, 11):
        o, state = decode(implementation, prompt[t : t + 1].padded(rng, 3), state, [6, 0, 0])
        outputs.append(o[:1])
    assert_close(np.concatenate(outputs), whole, "lightning", head_axis=1)
    assert_close(state[6], after[6], "lightning", head_axis=0)


def test_r010_decode_is_a_segment_of_one_token(rng, implementation):
    """Whichever way a scheduler sends single tokens, outputs and states agree."""
    slots = [6, 15, 2]
    rows = Rows.random(rng, 3)
    before = pool(rng, "float32", live=slots)
    o, after = decode(implementation, rows, before, slots)
    as_segments = [(Segment(slot, 1), rows[i : i + 1]) for i, slot in enumerate(slots)]
    outputs, prefilled = run(rng, implementation, before, *as_segments)
    assert_close(np.concatenate(outputs), o, "lightning", head_axis=1)
    for slot in slots:
        assert_close(prefilled[slot], after[slot], "lightning", head_axis=0)


def company(rng):
    """Five segments of several kinds, and the pool they continue from."""
    segments = [
        Segment(6, 9, True), Segment(15, 5), Segment(2, 1), Segment(11, 13, True), Segment(4, 0),
    ]  # fmt: skip
    return [(s, Rows.random(rng, s.length)) for s in segments], pool(rng, "float32", live=[15, 2])


def test_r022_the_order_of_segments_does_not_matter(rng, implementation):
    parts, before = company(rng)
    outputs, after = run(rng, implementation, before, *parts)
    for order in ([4, 3, 2, 1, 0], rng.permutation(5)):
        permuted, end = run(rng, implementation, before, *(parts[i] for i in order))
        for i, o in zip(order, permuted, strict=True):
            assert_same_bits(o, outputs[i])
        assert_same_bits(end, after)


def test_r023_the_choice_of_slots_does_not_matter(rng, implementation):
    parts, before = company(rng)
    outputs, after = run(rng, implementation, before, *parts)
    place = np.concatenate([[0], 1 + rng.permutation(S - 1)])
    moved = [(Segment(int(place[s.slot]), s.length, s.fresh), rows) for s, rows in parts]
    elsewhere = np.empty_like(before)
    elsewhere[place] = before
    o, end = run(rng, implementation, elsewhere, *moved)
    for got, want in zip(o, outputs, strict=True):
        assert_same_bits(got, want)
    assert_same_bits(end[place], after)


def test_r102_neighbours_do_not_matter(rng, implementation):
    """Alone, in company, and beside segments and slots full of NaN: the same bits."""
    parts, before = company(rng)
    outputs, after = run(rng, implementation, before, *parts)
    for i, (mine, rows) in enumerate(parts):
        alone, end = run(rng, implementation, before, (mine, rows))
        assert_same_bits(alone[0], outputs[i])
        assert_same_bits(end[mine.slot], after[mine.slot])
        sick = [
            (s, rows if s is mine else Rows.random(rng, 0).padded(rng, s.length))
            for s, rows in parts
        ]
        bad = pool(rng, "float32")
        bad[mine.slot] = before[mine.slot]
        o, end = run(rng, implementation, bad, *sick)
        assert_same_bits(o[i], outputs[i])
        assert_same_bits(end[mine.slot], after[mine.slot])


def test_r102_decode_neighbours_do_not_matter(rng, implementation):
    rows, slots = Rows.random(rng, 3), [6, 15, 2]
    before = pool(rng, "float32", live=slots)
    o, after = decode(implementation, rows, before, slots)
    for i in range(3):
        order = np.roll(np.arange(3), i + 1)
        moved = Rows.random(rng, 0).padded(rng, 3)
        for name in "qkv":
            getattr(moved, name)[order[i]] = getattr(rows, name)[i]
        bad = pool(rng, "float32")
        bad[slots[i]] = before[slots[i]]
        taken = [0, 0, 0]
        taken[order[i]] = slots[i]
        # One neighbour is padding, the other a live sequence of NaN.
        taken[order[i] - 1] = 9
        got, end = decode(implementation, moved, bad, taken)
        assert_same_bits(got[order[i]], o[i])
        assert_same_bits(end[slots[i]], after[slots[i]])


STEPS = 32_768
# The second is what the slowest heads of the deepest layers have.
DRIFT_LOG_DECAY = np.array([0.0, -1e-5, -0.004, -0.3, -8.0], np.float32)


@functools.partial(jax.jit, static_argnames="implementation")
def decode_many(rows, state, implementation):
    """STEPS tokens one at a time into slot 2: the last output and the state."""

    def step(state, row):
        q, k, v = (x[None] for x in row)
        o, state = lightning_decode(
            q, k, v, jnp.asarray(DRIFT_LOG_DECAY), state,
            slots=jnp.full(1, 2, jnp.int32), scale=1.0, implementation=implementation,
        )  # fmt: skip
        return state, o[0]

    state, o = jax.lax.scan(step, state, rows)
    return o[-1], state[2]


# Interpreting so many calls of a TPU kernel would take hours.
@pytest.mark.parametrize("implementation", [x for x in IMPLEMENTATIONS if x != "tpu"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_r003_drift_over_long_decoding(rng, implementation, state_dtype, record_property):
    """A head that keeps m tokens piles up m roundings, a random walk of sqrt(m) steps.

    The decay itself, exp(g) in float32, errs the same way in every token: m steps of 2^-24.
    """
    rows = [normal(rng, (STEPS, N, width), "float32") for width in (K, K, V)]
    state = jnp.zeros((3, N, K, V), state_dtype)
    o, after = decode_many([jnp.asarray(x) for x in rows], state, implementation)
    want = np.zeros((N, K, V))
    decay = np.exp(DRIFT_LOG_DECAY.astype(np.float64))[:, None, None]
    for k, v in zip(rows[1].astype(np.float64), rows[2].astype(np.float64), strict=True):
        want = decay * want + k[:, :, None] * v[:, None, :]
    want_o = np.einsum("nkv,nk->nv", want, rows[0][-1].astype(np.float64))
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[state_dtype]
    for head, g in enumerate(DRIFT_LOG_DECAY.astype(np.float64)):
        kept = min(STEPS, -1 / np.expm1(g)) if g else STEPS
        walk, bias = unit * np.sqrt(kept), 2.0**-24 * kept if g else 0
        for what, got, wanted in (("state", after, want), ("output", o, want_o)):
            drift = error(np.asarray(got[head]), wanted[head])
            name = f"{what} drift, {state_dtype} state, log decay {g:g}"
            record_property(name, f"{drift:.2e}")
            assert drift <= TOLERANCES["drift"] * (walk + bias), name
