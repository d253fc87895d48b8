"""Lightning prefill on the GPU against the float64 fold: interpreted on a CPU, and on the GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal
from lightning_cases import Segment
from lightning_gpu_cases import MACHINES, SCALE, Call, close, on, rms_error
from tolerances import TOLERANCES

from pallas_kernels import lightning_decode, lightning_prefill
from pallas_kernels.lightning_attention import gpu_grad
from pallas_kernels.lightning_attention.gpu_work import cut

# Chunks are of 128 rows where keys divide by 128, else of 64.
RAGGED = [
    Segment(5, 70), Segment(3, 1, True), Segment(2, 0, True), Segment(0, 13), Segment(1, 133),
    Segment(0, 0), Segment(6, 4, True), Segment(7, 0), Segment(4, 64, True),
]  # fmt: skip
# From "never forgets" over the fastest that takes whole chunks to what steps of 8 rows are for.
LOG_DECAY = [0.0, -1e-5, -0.99, -1.01, -2.1, -8.0, -200.0]


def run(machine, call, *, races=False, **tuning):
    """Through the public function; with tuning, past it."""
    with on(machine, detect_races=races and machine == "interpreter"):
        if tuning:
            return jax.jit(
                lambda *a: gpu_grad.lightning_prefill(*a, **call.places, scale=SCALE, **tuning)
            )(*call.arrays)
        return lightning_prefill(*call.arrays, **call.places, scale=SCALE, implementation="gpu")


def check(machine, call, **options):
    o, after = run(machine, call, **options)
    call.check(o, after, "wgmma", "wgmma")
    return o, after


@MACHINES
@pytest.mark.parametrize(
    ("size", "log_decay", "state_dtype", "pads"),
    [((128, 64), [-0.01, -0.7], "float32", 21), ((64, 128), [-0.004], "bfloat16", 3)],
    ids=["128", "64"],
)
def test_prefill_is_the_fold(rng, machine, size, log_decay, state_dtype, pads):
    """Segments fresh, going on, empty and of NULL; NaN in all rows and slots of nobody."""
    call = Call.random(rng, RAGGED, log_decay, *size, pads=pads, state_dtype=state_dtype)
    check(machine, call)


@MACHINES
@pytest.mark.parametrize(
    ("size", "dtype", "state_dtype"),
    [((96, 48), "float32", "float32"), ((32, 80), "bfloat16", "bfloat16")],
    ids=["float32", "narrow heads"],
)
def test_token_by_token_is_the_fold(rng, machine, size, dtype, state_dtype):
    """What the matrix units do not take."""
    segments = [Segment(5, 19), Segment(3, 1, True), Segment(0, 7), Segment(2, 0), Segment(1, 40)]
    call = Call.random(
        rng, segments, [0.0, -0.3, -8.0], *size, pads=5, dtype=dtype, state_dtype=state_dtype
    )
    o, after = run(machine, call, races=True)
    rounding = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}
    call.check(o, after, rounding[dtype], rounding[state_dtype])


@MACHINES
def test_decays_of_any_size(rng, machine):
    call = Call.random(rng, [Segment(3, 66), Segment(1, 20, True)], LOG_DECAY, 64, 64)
    check(machine, call)


@MACHINES
def test_no_races(rng, machine):
    segments = [Segment(3, 129), Segment(0, 5), Segment(1, 70, True)]
    check(machine, Call.random(rng, segments, [-0.1], 128, 64), races=True)


@MACHINES
def test_fewer_rows_than_a_chunk(rng, machine):
    check(machine, Call.random(rng, [Segment(2, 2), Segment(1, 1, True)], [-0.3], 64, 64))


@MACHINES
@pytest.mark.parametrize("beside", ["NULL", "empty", "nothing", "many"])
@pytest.mark.parametrize("size", [(64, 64), (128, 64)], ids=["64", "128"])
def test_a_long_segment_is_cut(rng, machine, size, beside):
    """Into pieces that start from the sums of those before; others beside it are left whole."""
    long, short = (1_050, 520) if size[0] == 128 else (530, 260)
    segments = {
        "NULL": [Segment(6, 3), Segment(2, long), Segment(0, short)],
        "empty": [Segment(3, short, True), Segment(5, 0, True), Segment(2, long)],
        "nothing": [Segment(2, long)],
        "many": [
            Segment(1, 0), Segment(4, 9, True), Segment(2, long), Segment(3, 30), Segment(0, 0),
        ],
    }[beside]  # fmt: skip
    call = Call.random(rng, segments, [-0.004], *size, pads=20)
    # What it starts from outweighs the rest, so that a token of decay too many is a wrong result.
    call.state *= 100
    # The long one makes three pieces.
    blocks = 8 if short in [s.length for s in segments] else 4
    shares = cut(len(call.q), len(segments), 1, size[0], blocks)
    assert shares.windows
    assert long // 3 < shares.span < long // 2
    check(machine, call, races=size[0] == 64, blocks=blocks)


@MACHINES
@pytest.mark.parametrize("beside", ["NULL", "empty"])
def test_a_long_segment_is_cut_token_by_token(rng, machine, beside):
    """As above where the matrix units are not used: V in three parts, rows of float32."""
    segments = {
        "NULL": [Segment(6, 3), Segment(2, 150), Segment(0, 70)],
        "empty": [Segment(3, 70), Segment(5, 0, True), Segment(2, 150, True)],
    }[beside]
    call = Call.random(rng, segments, [-0.02], 64, 48, pads=20, dtype="float32")
    call.state *= 100
    # The long one makes three pieces, the short one one.
    shares = cut(len(call.q), len(segments), 3, 16, 12)
    assert (shares.span, shares.windows) == (64, 3)
    o, after = run(machine, call, races=True, blocks=12)
    call.check(o, after, "lightning", "lightning")


@MACHINES
@pytest.mark.parametrize("length", [75, 430], ids=["whole", "cut"])
def test_slots_places_and_neighbours_do_not_matter(rng, machine, length):
    """The same bits in another slot, 16 rows further, beside rows and slots of NaN."""
    segments = [Segment(4, 16), Segment(2, length), Segment(1, 27, True)]
    call = Call.random(rng, segments, [-0.05], 64, 64)
    o, after = run(machine, call, blocks=1 if length == 75 else 4)
    segments = [Segment(0, 32), Segment(3, length), Segment(0, 11)]
    moved = Call.random(rng, segments, [-0.05], 64, 64)
    for name in "qkv":
        getattr(moved, name)[32 : 32 + length] = getattr(call, name)[16 : 16 + length]
    moved.state[3] = call.state[2]
    o_moved, after_moved = run(machine, moved, blocks=1 if length == 75 else 4)
    assert_same_bits(o_moved[32 : 32 + length], o[16 : 16 + length])
    assert_same_bits(after_moved[3], after[2])


@MACHINES
def test_cuts_of_a_prompt_and_decoding_are_the_whole(rng, machine):
    """Prefill of a part, of more from another place, then one token at a time."""
    call = Call.random(rng, [Segment(2, 100)], [-0.03, -0.4], 64, 64)
    q, k, v, log_decay, state = call.arrays
    outputs = []
    for start, stop, beside in ((0, 37, 0), (37, 98, 5)):
        segments = [Segment(0, beside), Segment(2, stop - start)]
        part = Call.random(rng, segments, call.log_decay, 64, 64)
        for name in "qkv":
            getattr(part, name)[beside:] = getattr(call, name)[start:stop]
        part.state = np.asarray(state)
        o, state = run(machine, part)
        outputs.append(np.asarray(o)[beside:])
    with on(machine):
        for t in (98, 99):
            rows = (x[t : t + 1] for x in (q, k, v))
            o, state = lightning_decode(
                *rows, log_decay, state, slots=jnp.array([2]), scale=SCALE, implementation="gpu"
            )
            outputs.append(np.asarray(o))
    want_o, want = call.fold()
    close(np.concatenate(outputs), want_o, "wgmma", 1)
    close(np.asarray(state)[2], want[2], "wgmma", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size", [(64, 64), (64, 256), (128, 128), (128, 64), (192, 64), (256, 128)]
)
def test_every_size(rng, size, state_dtype):
    segments = [
        Segment(s + 1, n, bool(s % 2)) for s, n in enumerate(rng.integers(0, 700, 12).tolist())
    ]
    segments += [Segment(0, 77), Segment(20, 2_000)]
    call = Call.random(
        rng, segments, [-0.001, -0.08, -0.9], *size, pads=99, state_dtype=state_dtype
    )
    check("gpu", call)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (80, 112), (128, 128), (256, 48), (48, 256)])
def test_every_size_token_by_token(rng, size, state_dtype):
    segments = [
        Segment(s + 1, n, bool(s % 2)) for s, n in enumerate(rng.integers(0, 90, 9).tolist())
    ]
    segments += [Segment(0, 77), Segment(20, 300)]
    decays = [-0.001, -0.08, -0.9]
    call = Call.random(
        rng, segments, decays, *size, pads=99, dtype="float32", state_dtype=state_dtype
    )
    o, after = run("gpu", call)
    rounding = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}
    call.check(o, after, "lightning", rounding[state_dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[8_192], [9_000, 1, 5_000], [300] * 16 + [9_000, 1, 777]])
def test_long_prompts(rng, lengths):
    """Cut and whole; twenty repeats give the same bits."""
    segments = [Segment(i + 1, n, bool(i)) for i, n in enumerate(lengths)]
    call = Call.random(rng, segments, [-0.0005, -0.03], 128, 128, pads=7)
    o, after = check("gpu", call)
    for _ in range(20):
        again = run("gpu", call)
        assert_same_bits(again[0], o)
        assert_same_bits(again[1], after)


@pytest.mark.gpu
def test_r099_65_536_segments(rng):
    """Most are empty; against the same call through XLA."""
    num = 65_536
    lengths = rng.choice([0, 0, 0, 1, 2, 70], num, p=[0.3, 0.3, 0.2, 0.1, 0.09, 0.01])
    slots = 1 + rng.permutation(num)
    rows = int(lengths.sum())
    q, k, v = (jnp.asarray(normal(rng, (rows, 1, 64), "bfloat16")) for _ in range(3))
    places = {
        "slots": jnp.asarray(slots, jnp.int32),
        "cu_seqlens": jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
        "is_fresh": jnp.asarray(rng.random(num) < 0.5),
    }
    state = jnp.asarray(normal(rng, (num + 1, 1, 64, 64), "bfloat16"))
    args = q, k, v, jnp.array([-0.1]), state
    got, want = (
        lightning_prefill(*args, **places, scale=SCALE, implementation=name)
        for name in ("gpu", "xla")
    )
    assert_close(got[0], np.asarray(want[0]), "wgmma")
    # Worst of 10^8 entries.
    assert rms_error(got[1], np.asarray(want[1]), 1) <= TOLERANCES["wgmma_rms"]
    empty = slots[lengths == 0]
    assert_same_bits(np.asarray(got[1])[empty], np.asarray(state)[empty])
