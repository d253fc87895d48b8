"""Lightning decode on the GPU against the float64 fold: interpreted on a CPU, and on the GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal
from lightning_cases import Segment
from lightning_gpu_cases import MACHINES, SCALE, Call, on

from pallas_kernels import lightning_decode
from pallas_kernels.lightning_attention import gpu_decode
from pallas_kernels.lightning_attention.gpu_decode import state_tile

LOG_DECAY = [0.0, -0.004, -8.0]
# NULL in between, not in order, the pool's last slot too.
SLOTS = [4, 0, 1, 6, 0, 3]
SIZES = [(k, v) for k in (32, 64, 80, 128, 192, 256) for v in (32, 48, 64, 128, 160, 256)]
ROUNDING = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}


def run(machine, call, **options):
    with on(machine, detect_races=machine == "interpreter"):
        return jax.jit(
            lambda *arrays: lightning_decode(
                *arrays, slots=call.places["slots"], scale=SCALE, implementation="gpu", **options
            )
        )(*call.arrays)


def random_call(rng, size, *, slots=SLOTS, log_decay=LOG_DECAY, **dtypes):
    return Call.random(rng, [Segment(slot, 1) for slot in slots], log_decay, *size, **dtypes)


def check(rng, machine, size, dtype, state_dtype, **options):
    call = random_call(rng, size, dtype=dtype, state_dtype=state_dtype, **options)
    o, after = run(machine, call)
    call.check(o, after, ROUNDING[dtype], ROUNDING[state_dtype])


@MACHINES
@pytest.mark.parametrize(
    ("size", "dtype", "state_dtype", "entries"),
    [
        ((128, 112), "bfloat16", "float32", None),
        ((64, 96), "float32", "bfloat16", 64),
        ((256, 32), "float32", "float32", 64),
        ((48, 80), "bfloat16", "bfloat16", None),
        ((128, 192), "bfloat16", "bfloat16", 128),
    ],
)
def test_decode_is_one_step_of_the_fold(rng, machine, size, dtype, state_dtype, entries):
    """NaN in pad rows, in NULL and in parked slots; every slot of nobody keeps its bits."""
    call = random_call(rng, size, dtype=dtype, state_dtype=state_dtype)
    with on(machine, detect_races=machine == "interpreter"):
        o, after = jax.jit(
            lambda *arrays: gpu_decode.lightning_decode(
                *arrays, slots=call.places["slots"], scale=SCALE, entries=entries
            )
        )(*call.arrays)
    call.check(o, after, ROUNDING[dtype], ROUNDING[state_dtype])


def test_what_a_thread_holds_follows_from_the_bytes_of_all_rows():
    def entries(rows, dtype):
        return gpu_decode.entries_a_thread(rows, jnp.zeros((2, 16, 128, 128), dtype))

    assert [entries(rows, jnp.float32) for rows in (1, 4, 5, 256)] == [16, 16, 64, 64]
    assert [entries(rows, jnp.bfloat16) for rows in (1, 8, 9, 128, 256)] == [32, 32, 64, 128, 128]


@pytest.mark.gpu
def test_many_rows_of_a_bfloat16_state(rng):
    """Enough for the widest tiles."""
    slots = rng.permutation(np.arange(1, 720))[:700].tolist()
    check(rng, "gpu", (128, 128), "bfloat16", "bfloat16", slots=[0, *slots, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size(rng, size, state_dtype):
    slots = rng.permutation(np.arange(1, 40))[:33].tolist()
    check(rng, "gpu", size, "float32", state_dtype, slots=[0, *slots, 0])


@MACHINES
def test_company_and_slots_do_not_matter(rng, machine):
    """A row alone, elsewhere and beside other rows: the same bits."""
    call = random_call(rng, (64, 32), slots=[4, 0, 1])
    o, after = run(machine, call)
    moved = random_call(rng, (64, 32), slots=[2, 5, 0])
    for name in "qkv":
        getattr(moved, name)[1] = getattr(call, name)[0]
    moved.state[5] = call.state[4]
    o_moved, after_moved = run(machine, moved)
    assert_same_bits(o_moved[1], o[0])
    assert_same_bits(after_moved[5], after[4])


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31_elements(rng):
    """A pool of one head whose last slots lie past the reach of a 32-bit offset."""
    heads, key_dim, value_dim, num_slots = 1, 128, 128, 140_000
    slots = np.array([131_071, 131_072, 139_999, 7], np.int32)
    rows = [normal(rng, (4, heads, width), "float32") for width in (key_dim, key_dim, value_dim)]
    old = normal(rng, (4, heads, key_dim, value_dim), "bfloat16")

    def step(q, k, v, old):
        pool = jnp.zeros((num_slots, heads, key_dim, value_dim), jnp.bfloat16)
        o, pool = lightning_decode(
            q, k, v, jnp.array([-0.02]), pool.at[slots].set(old), slots=jnp.asarray(slots),
            scale=SCALE, implementation="gpu",
        )  # fmt: skip
        others = jnp.ones(num_slots, bool).at[slots].set(False)
        changed = (pool != 0).any(axis=(1, 2, 3)) & others
        return o, pool[slots], changed.sum()

    o, new, changed = jax.jit(step)(*rows, old)
    assert changed == 0
    q, k, v, s = (x.astype(np.float64) for x in (*rows, old))
    s = np.exp(-0.02) * s + k[..., :, None] * v[..., None, :]
    assert_close(new, s, "bfloat16_rounding")
    assert_close(o, SCALE * np.einsum("bnkv,bnk->bnv", s, q), "lightning")


@pytest.mark.gpu
def test_r099_more_rows_than_a_grid_axis(rng):
    """CUDA's second and third grid axes end at 65,535."""
    num = 65_600
    slots = 1 + rng.permutation(num).astype(np.int32)
    q, k, v = (normal(rng, (num, 1, 32), "float32") for _ in range(3))
    state = normal(rng, (num + 1, 1, 32, 32), "float32")
    o, after = jax.jit(
        lambda *arrays: lightning_decode(
            *arrays, slots=jnp.asarray(slots), scale=SCALE, implementation="gpu"
        )
    )(q, k, v, jnp.array([-0.3]), state)
    s = np.float32(np.exp(-0.3)) * state[slots] + k[..., :, None] * v[..., None, :]
    assert_close(np.asarray(after)[slots], s, "lightning")
    assert_close(o, SCALE * np.einsum("bnkv,bnk->bnv", s, q), "lightning")


def test_tiles_cover_every_multiple_of_16():
    for key_dim in range(32, 257, 16):
        for value_dim in range(32, 257, 16):
            tile = state_tile(key_dim, value_dim, 64)
            assert tile is not None
            assert tile.columns * tile.rows == 32 * tile.vector
            assert value_dim % tile.columns == 0
            assert key_dim % (4 * tile.rows) == 0
    assert state_tile(128, 36, 64) is None
