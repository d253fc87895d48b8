"""Decode from the projected row against the layer's own steps and the float64 fold."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, error, normal, poison
from lightning_cases import Segment
from lightning_gpu_cases import MACHINES, SCALE, Call, on
from tolerances import TOLERANCES

from bailing_jax.config import Rope
from bailing_jax.layers.rope import inverse_frequencies, rotate_half_split
from pallas_kernels import lightning_decode
from pallas_kernels.lightning_attention.gpu_decode_fused import lightning_decode_fused, why_not

LOG_DECAY = [0.0, -0.004, -8.0]
SLOTS = [4, 0, 1, 6, 0, 3]
EPS = 1e-6
ROUNDING = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}


@dataclass
class Row:
    """Projected rows and what a layer does with them; NaN in rows and slots of nobody."""

    qkv: np.ndarray
    norms: tuple[np.ndarray, np.ndarray] | None
    positions: np.ndarray
    rope: Rope | None
    rotated_dtype: str
    call: Call

    @staticmethod
    def random(
        rng, dim, *, rotated=0, norms=True, slots=SLOTS, dtype="bfloat16", state_dtype="float32",
        rotated_dtype=None,
    ) -> Row:  # fmt: skip
        segments = [Segment(slot, 1) for slot in slots]
        call = Call.random(rng, segments, LOG_DECAY, dim, dim, dtype=dtype, state_dtype=state_dtype)
        qkv = normal(rng, (len(slots), 3, len(LOG_DECAY), dim), dtype)
        empty = [row for row, slot in enumerate(slots) if not slot]
        qkv[empty] = poison(rng, (len(empty), *qkv.shape[1:]), dtype)
        weights = tuple((1 + 0.3 * normal(rng, (dim,), dtype)).astype(dtype) for _ in "qk")
        positions = rng.integers(0, 100_000, len(slots)).astype(np.int32)
        rope = Rope(theta=600_000.0, num_dims=rotated, yarn=None) if rotated else None
        row = Row(qkv, weights if norms else None, positions, rope, rotated_dtype or dtype, call)
        # One operation after another: in one program XLA leaves out roundings in between.
        call.q, call.k, call.v = (np.asarray(x) for x in row.apart())
        return row

    def apart(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v as the layer computes them."""
        q, k, v = (jnp.asarray(self.qkv[:, i]) for i in range(3))
        if self.norms:
            q, k = (norm(x, jnp.asarray(w)) for x, w in zip((q, k), self.norms, strict=True))
        if self.rope:
            dtype = jnp.dtype(self.rotated_dtype)
            positions = jnp.asarray(self.positions)
            q, k = (rotate_half_split(x, positions, self.rope, dtype) for x in (q, k))
        return q, k, v

    def angles(self) -> tuple[jax.Array, jax.Array] | None:
        if self.rope is None:
            return None
        radians = jnp.asarray(self.positions, jnp.float32)[:, None] * inverse_frequencies(self.rope)
        return jnp.cos(radians), jnp.sin(radians)


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`bailing_jax.layers.norms`, without a module around it."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return weight * (wide * jax.lax.rsqrt(mean + EPS)).astype(x.dtype)


def run(machine, row: Row, **options):
    *_, log_decay, state = row.call.arrays

    def fused(qkv, state):
        return lightning_decode_fused(
            qkv, log_decay, state, slots=row.call.places["slots"], scale=SCALE, eps=EPS,
            norms=row.norms and tuple(map(jnp.asarray, row.norms)), angles=row.angles(),
            rotated_dtype=row.rotated_dtype, **options,
        )  # fmt: skip

    with on(machine, detect_races=machine == "interpreter"):
        return jax.jit(fused)(jnp.asarray(row.qkv), state)


def run_apart(machine, row: Row):
    with on(machine):
        return lightning_decode(
            *row.call.arrays, slots=row.call.places["slots"], scale=SCALE, implementation="gpu"
        )


def check(machine, row: Row, **options):
    """Against the fold; rows of states whose k was not rounded to a neighbour as exact as apart."""
    o, after = map(np.asarray, run(machine, row, **options))
    after_apart = np.asarray(run_apart(machine, row)[1])
    assert (o.dtype, after.dtype) == (row.qkv.dtype, after_apart.dtype)
    used = [slot for slot in (s.slot for s in row.call.segments) if slot]
    others = [slot for slot in range(len(after)) if slot not in used]
    assert_same_bits(after[others], row.call.state[others])
    is_real = np.array([s.slot != 0 for s in row.call.segments])
    assert (o[~is_real] == 0).all()
    want_o, want = row.call.fold()
    assert_close(o[is_real], want_o[is_real], "bfloat16_neighbour", head_axis=1)
    assert_close(after[used], np.stack([want[s] for s in used]), "bfloat16_neighbour", head_axis=1)
    # A row of the state belongs to one number of k.
    tolerance = TOLERANCES[ROUNDING[after.dtype.name]]
    same = [
        error(after[s, n, i], after_apart[s, n, i]) <= tolerance
        for s in used for n in range(after.shape[1]) for i in range(after.shape[2])
    ]  # fmt: skip
    assert np.mean(same) >= 0.995
    return o, after


@MACHINES
@pytest.mark.parametrize(
    ("dim", "options"),
    [
        (128, {"rotated": 64}),
        (64, {"rotated": 64, "state_dtype": "bfloat16"}),
        (64, {"rotated": 32, "rotated_dtype": "float32"}),
        (96, {"rotated": 96, "norms": False}),
        (48, {"dtype": "float32"}),
        (32, {"norms": False}),
    ],
    ids=["partial", "bfloat16 state", "rotated wide", "no norms", "no rope", "plain"],
)
def test_fused_is_the_layers_steps(rng, machine, dim, options):
    row = Row.random(rng, dim, **options)
    check(machine, row)


@MACHINES
def test_float32_rows_are_the_fold(rng, machine):
    """No rounding in between: as exact as decode alone."""
    row = Row.random(rng, 64, rotated=32, dtype="float32")
    o, after = check(machine, row)
    row.call.check(o, after, "norm_and_rope", "norm_and_rope")


@MACHINES
def test_company_and_slots_do_not_matter(rng, machine):
    row = Row.random(rng, 64, rotated=32, slots=[4, 0, 1])
    o, after = run(machine, row)
    moved = Row.random(rng, 64, rotated=32, slots=[2, 5, 0])
    moved.norms = row.norms
    moved.qkv[1], moved.positions[1] = row.qkv[0], row.positions[0]
    moved.call.state[5] = row.call.state[4]
    o_moved, after_moved = run(machine, moved)
    assert_same_bits(o_moved[1], o[0])
    assert_same_bits(after_moved[5], after[4])


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("dim", "rotated"), [(64, 32), (128, 64), (128, 128), (256, 128), (96, 48)]
)
def test_every_size(rng, dim, rotated, state_dtype):
    slots = [0, *(1 + rng.permutation(39))[:33].tolist(), 0]
    check("gpu", Row.random(rng, dim, rotated=rotated, slots=slots, state_dtype=state_dtype))


def test_what_it_does_not_take_is_named():
    qkv, state = jnp.zeros((4, 3, 2, 64), jnp.bfloat16), jnp.zeros((3, 2, 64, 64))
    assert why_not(qkv, state, 16) is None
    assert "40 rotated channels" in str(why_not(qkv, state, 20))
    assert "float16" in str(why_not(qkv.astype(jnp.float16), state, 16))
    assert "value dim 32" in str(why_not(qkv, state[..., :32], 16))
    assert "parts of 2" in str(why_not(qkv, state, 2))
