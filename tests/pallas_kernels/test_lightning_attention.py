"""Lightning attention against a float64 fold: outputs and the whole pool of states.

One body for all implementations. Slots nobody names hold NaN and come back bit for bit; the same
goes for NULL and for slots of segments without rows.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal
from lightning_cases import (
    IMPLEMENTATIONS,
    SCALE,
    K,
    N,
    Rows,
    S,
    Segment,
    V,
    decode,
    fold,
    pool,
    prefill,
    spoil_pads,
)

from pallas_kernels import lightning_decode, lightning_prefill

pytestmark = pytest.mark.unoptimised

DTYPES = ("float32", "bfloat16")
# The shape most tests share, so that it compiles once.
SHARED = {"num_segments": 8, "chunk_size": 4}
NUM_ROWS = 37
# Interpreting a kernel is slow: not every chunk with every dtype, but each of them.
INTERPRETED = {
    (4, "float32", "float32"), (16, "float32", "bfloat16"), (16, "bfloat16", "float32"),
    (64, "bfloat16", "bfloat16"),
}  # fmt: skip
FOLDS = [
    (*fold, implementation)
    for fold in itertools.product((4, 16, 64), DTYPES, DTYPES)
    for implementation in IMPLEMENTATIONS
    if implementation != "tpu" or fold in INTERPRETED
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def compare(
    rows: Rows,
    before: np.ndarray,
    segments: list[Segment],
    o: np.ndarray,
    after: np.ndarray,
) -> None:
    """Every row and every slot of a call against the fold."""
    want_o, want_states = fold(rows, before, segments)
    owner = np.repeat([s.slot for s in segments], [s.length for s in segments])
    real = np.zeros(len(rows.q), bool)
    real[: len(owner)] = owner != 0
    assert (o[~real] == 0).all()
    rounding = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}
    assert_close(o[real], want_o[real], rounding[o.dtype.name], head_axis=1)
    for slot, want in want_states.items():
        assert_close(after[slot], want, rounding[after.dtype.name], head_axis=0)
    others = [slot for slot in range(S) if slot not in want_states]
    assert_same_bits(after[others], before[others])


def random_call(rng: np.random.Generator, lengths: list[int], pads: list[int]):
    """Each length once fresh and once continuing, and pad segments, in random order."""
    slots = iter(rng.permutation(np.arange(1, S))[: 2 * len(lengths)].tolist())
    segments = [Segment(next(slots), n, fresh) for n in lengths for fresh in (True, False)]
    segments += [Segment(0, n, fresh=True) for n in pads]
    return [segments[i] for i in rng.permutation(len(segments))]


@pytest.mark.parametrize(("chunk", "state_dtype", "dtype", "implementation"), FOLDS)
def test_r002_r005_r045_prefill_is_the_fold(rng, chunk, state_dtype, dtype, implementation):
    lengths = [0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 3]
    segments = random_call(rng, lengths, pads=[5, 0, chunk])
    continuing = [s.slot for s in segments if s.slot and not s.fresh]
    before = pool(rng, state_dtype, live=continuing)
    used = sum(s.length for s in segments)
    rows = spoil_pads(rng, Rows.random(rng, used, dtype), segments).padded(rng, used + 9)
    o, after = prefill(
        implementation, rows, before, segments, num_segments=len(segments), chunk_size=chunk
    )
    assert o.dtype == rows.v.dtype
    assert after.dtype == before.dtype
    compare(rows, before, segments, o, after)


@pytest.mark.parametrize("chunk", [4, 16])
def test_r045_fewer_rows_than_a_chunk(rng, implementation, chunk):
    rows = Rows.random(rng, 3)
    segments = [Segment(11, 2, fresh=False), Segment(4, 1, fresh=True)]
    before = pool(rng, "float32", live=[11])
    o, after = prefill(implementation, rows, before, segments, num_segments=2, chunk_size=chunk)
    compare(rows, before, segments, o, after)


def test_r020_fresh_segment_ignores_what_its_slot_held(rng, implementation):
    rows = Rows.random(rng, 14).padded(rng, NUM_ROWS)
    segments = [Segment(7, 9, fresh=True), Segment(3, 1, fresh=True), Segment(12, 4)]
    poisoned = pool(rng, "float32", live=[12])
    clean = poisoned.copy()
    clean[[7, 3]] = normal(rng, (2, N, K, V), "float32")
    o, after = prefill(implementation, rows, poisoned, segments, **SHARED)
    assert np.isfinite(o).all()
    o_clean, after_clean = prefill(implementation, rows, clean, segments, **SHARED)
    assert_same_bits(o, o_clean)
    assert_same_bits(after, after_clean)


@pytest.mark.parametrize("state_dtype", DTYPES)
def test_zeros_behind_a_states_columns_stay(rng, implementation, state_dtype):
    """A pool of whole lanes, as on a TPU: its V columns as without, then what was there before."""
    rows = Rows.random(rng, 15).padded(rng, NUM_ROWS)
    segments = [Segment(7, 9, fresh=True), Segment(12, 6)]
    narrow = pool(rng, state_dtype, live=[12, 3])
    wide = np.pad(narrow, ((0, 0), (0, 0), (0, 0), (0, 128 - V)))
    # What a slot held before a fresh segment, and what nobody's slot holds.
    wide[[7, 1], ..., V:] = np.nan
    o, after = prefill(implementation, rows, wide, segments, **SHARED)
    compare(rows, narrow, segments, o, after[..., :V])
    o, after_token = decode(implementation, rows[:2], after, [3, 7])
    before = after[..., :V].copy()
    want_o, want_states = fold(rows[:2], before, [Segment(3, 1), Segment(7, 1)])
    assert_close(o, want_o, "lightning", head_axis=1)
    rounding = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}
    for slot, want in want_states.items():
        assert_close(after_token[slot, ..., :V], want, rounding[state_dtype], head_axis=0)
    for slot in (3, 7, 12):
        assert (after_token[slot, ..., V:] == 0).all()
    assert_same_bits(after_token[1], wide[1])


def test_a_state_of_another_width_is_refused(rng):
    """Only its own and whole lanes: K and V the wrong way round would pass for zeros behind V."""
    rows = Rows.random(rng, 2)
    for width in (K, V - 8, 256):
        with pytest.raises(ValueError, match=rf"state: want \[S,5,40,32\], got .*{width}\)"):
            decode("reference", rows, np.zeros((S, N, K, width), np.float32), [1, 2])


def test_r012_a_segment_of_one_token_is_fresh_only_when_told(rng, implementation):
    rows = Rows.random(rng, 2).padded(rng, NUM_ROWS)
    before = pool(rng, "float32", live=[7, 3])
    for segments in (
        [Segment(7, 1, fresh=True), Segment(3, 1)],
        [Segment(7, 1), Segment(3, 1, fresh=True)],
    ):
        o, after = prefill(implementation, rows, before, segments, **SHARED)
        compare(rows, before, segments, o, after)


def test_r040_padding_rows_do_not_decay_the_state(rng, implementation):
    """Every length from 1 to 2C + 1 alone in a call, the rest of its rows padding."""
    rows = Rows.random(rng, 9)
    before = pool(rng, "float32", live=[5])
    for length in range(1, 2 * SHARED["chunk_size"] + 2):
        packed = rows[:length].padded(rng, NUM_ROWS)
        o, after = prefill(implementation, packed, before, [Segment(5, length)], **SHARED)
        compare(packed, before, [Segment(5, length)], o, after)


@pytest.mark.parametrize("turn", [0, 3])
@pytest.mark.parametrize("fresh", [True, False])
def test_r035_pad_segments_neither_read_nor_write_slot_0(rng, implementation, fresh, turn):
    """Several of them, with rows and without, fresh or not, around live segments.

    Whichever of the pads comes last: a write of another one would be lost in its own.
    """
    segments = [
        Segment(0, 3), Segment(0, 0, True), Segment(9, 6), Segment(0, 5, True), Segment(0, 0),
        Segment(2, 2, True), Segment(0, 1),
    ]  # fmt: skip
    segments = [segments[i - turn] for i in range(7)] + [Segment(0, 2, fresh)]
    before = pool(rng, "float32", live=[9])
    rows = spoil_pads(rng, Rows.random(rng, 19), segments).padded(rng, NUM_ROWS)
    o, after = prefill(implementation, rows, before, segments, **SHARED)
    compare(rows, before, segments, o, after)
    before[0] = 0
    o_zero, after_zero = prefill(implementation, rows, before, segments, **SHARED)
    assert (after_zero[0] == 0).all()
    assert_same_bits(o_zero, o)
    assert_same_bits(after_zero[1:], after[1:])


def test_r038_rows_of_no_segment_give_zero(rng, implementation):
    """The only rows are padding, all NaN, and no slot changes."""
    before = pool(rng, "float32", live=[4])
    nothing = Rows.random(rng, 0).padded(rng, NUM_ROWS)
    segments = [Segment(4, 0), Segment(8, 0, fresh=True)]
    o, after = prefill(implementation, nothing, before, segments, **SHARED)
    assert (o == 0).all()
    assert_same_bits(after, before)


@pytest.mark.parametrize("place", ["first", "middle", "last", "all", "twice"])
def test_r100_empty_segments_leave_their_slots(rng, implementation, place):
    live = [Segment(6, 5), Segment(10, 4, fresh=True)]
    empty, other = Segment(3, 0, fresh=True), Segment(14, 0)
    segments = {
        "first": [empty, other, *live],
        "middle": [live[0], empty, other, live[1]],
        "last": [*live, other, empty],
        "all": [other, empty],
        "twice": [other, *live, empty],
    }[place]
    before = pool(rng, "float32", live=[6])
    used = sum(s.length for s in segments)
    rows = Rows.random(rng, used).padded(rng, NUM_ROWS)
    o, after = prefill(implementation, rows, before, segments, **SHARED)
    compare(rows, before, segments, o, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_r036_r037_decode_is_one_step_of_the_fold(rng, implementation, state_dtype, dtype):
    """Pad rows hold NaN and name NULL, several at once; parked slots keep their bits."""
    slots = [13, 0, 1, 18, 0, 0, 5, 9]
    before = pool(rng, state_dtype, live=[1, 5, 9, 13, 18, 2, 17])
    segments = [Segment(slot, 1) for slot in slots]
    rows = spoil_pads(rng, Rows.random(rng, len(slots), dtype), segments)
    o, after = decode(implementation, rows, before, slots)
    assert o.dtype == rows.v.dtype
    compare(rows, before, segments, o, after)


def test_r035_decode_of_pads_alone_changes_nothing(rng, implementation):
    before = pool(rng, "float32", live=[3])
    rows = Rows.random(rng, 0).padded(rng, 8)
    o, after = decode(implementation, rows, before, [0] * 8)
    assert (o == 0).all()
    assert_same_bits(after, before)


def _arrays(**changed):
    shapes = {
        "q": (8, N, K), "k": (8, N, K), "v": (8, N, V), "log_decay": (N,), "state": (S, N, K, V)
    }  # fmt: skip
    kinds = dict.fromkeys(shapes, np.float32)
    for name, value in changed.items():
        if isinstance(value, tuple):
            shapes[name] = value
        else:
            kinds[name] = value
    return [jnp.zeros(shapes[name], kinds[name]) for name in shapes]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"state": (S, N, V, K)}, r"state: want \[S,5,40,32\], got \(19, 5, 32, 40\)"),
        ({"state": (S, N + 1, K, V)}, "state"),
        ({"state": np.float16}, "float32 or bfloat16, got float16"),
        ({"k": (8, N, V)}, "k "),
        ({"v": (7, N, V)}, "v "),
        ({"log_decay": (N - 1,)}, r"log_decay: want float32 \[5\]"),
        ({"log_decay": jnp.bfloat16}, "log_decay: want float32"),
    ],
)
def test_r004_r005_wrong_shapes_are_refused(implementation, changed, said):
    slots = jnp.zeros(8, jnp.int32)
    arrays = _arrays(**changed)
    chosen = {"scale": SCALE, "implementation": implementation}
    with pytest.raises(ValueError, match=said):
        lightning_decode(*arrays, slots=slots, **chosen)
    where = {"slots": slots, "cu_seqlens": jnp.zeros(9, jnp.int32), "is_fresh": slots == 1}
    with pytest.raises(ValueError, match=said):
        lightning_prefill(*arrays, **where, **chosen)


def test_r039_metadata_of_another_size_is_refused(implementation):
    arrays = _arrays()
    slots = jnp.zeros(8, jnp.int32)
    chosen = {"scale": SCALE, "implementation": implementation}
    with pytest.raises(ValueError, match="rows 8, slots"):
        lightning_decode(*arrays, slots=slots[:7], **chosen)
    for cu_seqlens, is_fresh in ((8, 8), (9, 7)):
        where = {"cu_seqlens": jnp.zeros(cu_seqlens, jnp.int32), "is_fresh": slots[:is_fresh] == 1}
        with pytest.raises(ValueError, match="8 slots need"):
            lightning_prefill(*arrays, slots=slots, **where, **chosen)
