"""One launch for a mixed step against the float64 fold and the two separate operators."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits
from lightning_cases import Segment
from lightning_gpu_cases import MACHINES, SCALE, Call, on

from pallas_kernels import lightning_decode, lightning_prefill
from pallas_kernels.lightning_attention.gpu_mixed import lightning_mixed, role, share, why_not

# NULL in between, not in order.
DECODES = [9, 0, 12, 4, 0]
SEGMENTS = [
    Segment(5, 70), Segment(3, 1, True), Segment(2, 0, True), Segment(0, 13), Segment(1, 133),
    Segment(0, 0), Segment(8, 64, True),
]  # fmt: skip


def mixed_call(rng, decodes, segments, *args, **options) -> Call:
    """Decode rows are segments of one row."""
    return Call.random(rng, [*(Segment(s, 1) for s in decodes), *segments], *args, **options)


def places(call: Call, num_decode: int) -> dict[str, jax.Array]:
    found = call.places
    return {
        "decode_slots": found["slots"][:num_decode],
        "slots": found["slots"][num_decode:],
        "cu_seqlens": found["cu_seqlens"][num_decode:] - num_decode,
        "is_fresh": found["is_fresh"][num_decode:],
    }


def run(machine, call, num_decode, *, races=False, **sharing):
    with on(machine, detect_races=races and machine == "interpreter"):
        return jax.jit(
            lambda *a: lightning_mixed(*a, **places(call, num_decode), scale=SCALE, **sharing)
        )(*call.arrays)


def run_apart(machine, call, num_decode):
    """Decode, then prefill, on the same pool."""
    q, k, v, log_decay, state = call.arrays
    found = places(call, num_decode)
    decode_slots = found.pop("decode_slots")
    with on(machine):
        o_decode, state = lightning_decode(
            *(x[:num_decode] for x in (q, k, v)), log_decay, state, slots=decode_slots,
            scale=SCALE, implementation="gpu",
        )  # fmt: skip
        o_prefill, state = lightning_prefill(
            *(x[num_decode:] for x in (q, k, v)), log_decay, state, **found, scale=SCALE,
            implementation="gpu",
        )  # fmt: skip
    return o_decode, o_prefill, state


@MACHINES
@pytest.mark.parametrize(
    ("size", "log_decay", "state_dtype", "sharing"),
    [
        ((128, 64), [-0.01, -0.7], "float32", {}),
        ((64, 128), [-0.004], "bfloat16", {"turns": 3, "first": 2}),
        ((64, 64), [0.0, -2.1, -8.0], "float32", {"turns": 2, "first": 0}),
    ],
    ids=["128", "64", "fast decays"],
)
def test_mixed_is_the_fold_and_the_two_operators(
    rng, machine, size, log_decay, state_dtype, sharing
):
    """Segments fresh, going on, empty and of NULL; NaN in all rows and slots of nobody."""
    call = mixed_call(rng, DECODES, SEGMENTS, log_decay, *size, pads=5, state_dtype=state_dtype)
    num = len(DECODES)
    o, after = run(machine, call, num, **sharing)
    call.check(o, after, "wgmma", "wgmma")
    o_decode, o_prefill, apart = run_apart(machine, call, num)
    assert_close(o[:num], np.asarray(o_decode), "bfloat16_rounding", head_axis=1)
    assert_close(o[num:], np.asarray(o_prefill), "wgmma", head_axis=1)
    decoded = [slot for slot in DECODES if slot]
    rounding = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}[state_dtype]
    assert_close(after[jnp.array(decoded)], np.asarray(apart)[decoded], rounding, head_axis=1)
    others = [slot for slot in range(len(apart)) if slot not in decoded]
    # NaN of nobody's slots: `check` has seen that they kept their bits.
    live = [s.slot for s in SEGMENTS if s.slot and s.length and s.slot in others]
    assert_close(after[jnp.array(live)], np.asarray(apart)[live], "wgmma", head_axis=1)


@MACHINES
@pytest.mark.parametrize("sharing", [{}, {"turns": 2, "first": 1}], ids=["first", "spread"])
def test_no_races(rng, machine, sharing):
    segments = [Segment(3, 129), Segment(0, 5), Segment(1, 70, True)]
    call = mixed_call(rng, [4, 0, 2], segments, [-0.1], 128, 64)
    o, after = run(machine, call, 3, races=True, **sharing)
    call.check(o, after, "wgmma", "wgmma")


@MACHINES
def test_fewer_rows_than_a_chunk(rng, machine):
    call = mixed_call(rng, [3], [Segment(2, 2), Segment(1, 1, True)], [-0.3], 64, 64)
    o, after = run(machine, call, 1)
    call.check(o, after, "wgmma", "wgmma")


@MACHINES
def test_a_decode_row_does_not_see_its_company(rng, machine):
    """The same bits in another row and slot, beside other rows and segments."""
    call = mixed_call(rng, [4, 0, 1], [Segment(2, 40)], [-0.05], 64, 64)
    o, after = run(machine, call, 3)
    moved = mixed_call(rng, [5, 3], [Segment(0, 9), Segment(1, 80, True)], [-0.05], 64, 64)
    for name in "qkv":
        getattr(moved, name)[1] = getattr(call, name)[0]
    moved.state[3] = call.state[4]
    o_moved, after_moved = run(machine, moved, 2, turns=2)
    assert_same_bits(o_moved[1], o[0])
    assert_same_bits(after_moved[3], after[4])


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (192, 64), (256, 128)])
def test_every_size(rng, size, state_dtype):
    lengths = rng.integers(0, 700, 12).tolist()
    segments = [Segment(s + 1, n, bool(s % 2)) for s, n in enumerate(lengths)]
    segments += [Segment(0, 77), Segment(20, 900)]
    decodes = [0, *(21 + rng.permutation(60)).tolist(), 0, 0]
    call = mixed_call(
        rng, decodes, segments, [-0.001, -0.08, -0.9], *size, pads=99, state_dtype=state_dtype
    )
    for sharing in ({}, {"first": 5}):
        o, after = run("gpu", call, len(decodes), **sharing)
        call.check(o, after, "wgmma", "wgmma")
    for _ in range(10):
        again = run("gpu", call, len(decodes), **sharing)
        assert_same_bits(again[0], o)
        assert_same_bits(again[1], after)


@pytest.mark.parametrize("segments", [1, 7, 132, 1056])
@pytest.mark.parametrize("items", [1, 100, 4096])
@pytest.mark.parametrize("first", [0, 5, 132])
def test_every_block_has_one_role(segments, items, first):
    sharing = share(segments, items, 3, None, first)
    assert sharing.rows * sharing.turns * 3 >= items
    blocks = jnp.arange(sharing.segments + sharing.rows)
    is_segments, number = map(np.asarray, role(sharing, blocks))
    assert sorted(number[is_segments]) == list(range(segments))
    assert sorted(number[~is_segments]) == list(range(sharing.rows))
    assert is_segments[: sharing.first].all()


def test_what_it_does_not_take_is_named():
    wide = jnp.zeros((4, 2, 64), jnp.float32)
    narrow = jnp.zeros((4, 2, 64), jnp.bfloat16)
    assert "float32" in str(why_not(wide, wide, jnp.zeros((3, 2, 64, 64))))
    assert "48" in str(why_not(narrow, narrow, jnp.zeros((3, 2, 64, 48))))
    assert why_not(narrow, narrow, jnp.zeros((3, 2, 64, 64), jnp.bfloat16)) is None
