"""The TPU kernels beyond what they share with other implementations: buffers, cores, bytes, limits.

They run as the interpreter of TPU kernels runs them. What the compiler for TPUs makes of them is
`scripts/tpu_check.py`'s business.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_traffic
from checks import assert_close, assert_same_bits, normal, poison
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, dispatch, testing
from pallas_kernels.lightning_attention import tpu_blocks, tpu_decode, tpu_prefill
from pallas_kernels.testing import LightningShape

pytestmark = pytest.mark.unoptimised

SCALE, CHUNK = 0.3, 16
ROUNDING = {"float32": "lightning", "bfloat16": "bfloat16_rounding"}
NULL_ROWS = (1, 4)


class Call:
    """Arrays for a shape: free slots, pad rows and rows of nobody hold NaN."""

    def __init__(self, rng: np.random.Generator, shape: LightningShape) -> None:
        self.shape = shape
        rows, heads = shape.rows, shape.heads
        self.q, self.k = (normal(rng, (rows, heads, shape.key_dim), shape.dtype) for _ in "qk")
        self.v = normal(rng, (rows, heads, shape.value_dim), shape.dtype)
        self.log_decay = -np.geomspace(1e-3, 8, heads).astype(np.float32)
        self.log_decay[0] = 0
        self.lengths = shape.lengths or (1,) * rows
        number = len(self.lengths)
        self.slots = 1 + rng.permutation(number + 2)[:number].astype(np.int32)
        self.slots[[i for i in NULL_ROWS if i < number - 1]] = 0
        # The first of all is fresh: no earlier segment has left numbers in the buffers.
        self.fresh = np.arange(number) % 2 == 0 if shape.lengths else np.zeros(number, bool)
        state = (number + 3, heads, shape.key_dim, shape.value_dim)
        self.state = poison(rng, state, shape.state_dtype)
        live = self.slots[~self.fresh & (self.slots != 0)]
        self.state[live] = normal(rng, (len(live), *state[1:]), shape.state_dtype)
        self.starts = np.cumsum([0, *self.lengths])
        owner = np.zeros(rows, np.int32)
        owner[: self.starts[-1]] = np.repeat(self.slots, self.lengths)
        self.exists = owner != 0
        for x in (self.q, self.k, self.v):
            x[~self.exists] = np.nan

    def run(self, chunk: int = CHUNK, **interpreted) -> tuple[np.ndarray, np.ndarray]:
        arrays = [jnp.asarray(x) for x in (self.q, self.k, self.v, self.log_decay, self.state)]
        where = {"slots": jnp.asarray(self.slots)}
        run = tpu_decode.lightning_decode
        if self.shape.lengths:
            where["cu_seqlens"] = jnp.asarray(self.starts, jnp.int32)
            where["is_fresh"] = jnp.asarray(self.fresh)

            def run(*arrays, **where):
                return tpu_prefill.in_chunks(*arrays, chunk_size=chunk, **where)

        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**interpreted)):
            o, state = jax.jit(lambda *a, **b: run(*a, scale=SCALE, **b))(*arrays, **where)
            return np.asarray(o), np.asarray(state)

    def check(self, o: np.ndarray, after: np.ndarray) -> None:
        """Outputs and the whole pool against a float64 fold."""
        want, written = np.zeros(o.shape), set()
        decay = np.exp(self.log_decay.astype(np.float64))[:, None, None]
        q, k, v = (x.astype(np.float64) for x in (self.q, self.k, self.v))
        for i, slot in enumerate(self.slots):
            if not slot or not self.lengths[i]:
                continue
            s = self.state[slot].astype(np.float64)
            s = np.zeros_like(s) if self.fresh[i] else s
            for t in range(self.starts[i], self.starts[i + 1]):
                s = decay * s + k[t][:, :, None] * v[t][:, None, :]
                want[t] = SCALE * (s * q[t][:, :, None]).sum(axis=1)
            assert_close(after[slot], s, ROUNDING[after.dtype.name], head_axis=0)
            written.add(slot)
        assert (o[~self.exists] == 0).all()
        assert_close(o[self.exists], want[self.exists], ROUNDING[o.dtype.name], head_axis=1)
        others = [slot for slot in range(len(after)) if slot not in written]
        assert_same_bits(after[others], self.state[others])


SMALL = {f"{kind}-{name}": shape for kind, shapes in (
    ("decode", testing.SMALL_DECODE), ("prefill", testing.SMALL_PREFILL)
) for name, shape in shapes.items()}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_kernels_are_the_fold_and_race_free(rng, name, capfd):
    """With a clock for every copy, so that two copies of one core can be seen to race."""
    call = Call(rng, SMALL[name])
    call.check(*call.run(detect_races=True, vector_clock_size=64))
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_the_race_detector_sees_these_copies(rng, capfd):
    """A slot named twice, which callers never do: one copy writes what another one reads."""
    call = Call(rng, testing.SMALL_DECODE["two-blocks"])
    call.slots[3] = call.slots[2]
    said = ""
    for _ in range(5):
        # Each copy draws a clock; two that draw the same one are not seen to race.
        try:
            call.run(detect_races=True, vector_clock_size=64)
        except jax.errors.JaxRuntimeError as error:  # jax 0.12 raises where 0.10 prints
            pltpu.reset_tpu_interpret_mode_state()
            said = str(error)
        said += capfd.readouterr().out
        if "RACE DETECTED" in said:
            return
    pytest.fail("not seen in five runs")


def test_two_cores_share_the_rows(rng, monkeypatch):
    """A device of two cores; several windows a core, the last of them not full."""
    monkeypatch.setattr(tpu_blocks, "MAX_ROWS", 2)
    call = Call(rng, replace(testing.SMALL_DECODE["two-blocks"], rows=11))
    alone = call.run()
    call.check(*alone)
    monkeypatch.setattr(compat, "tpu_cores", lambda: 2)
    for got, want in zip(call.run(num_cores_or_threads=2), alone, strict=True):
        assert_same_bits(got, want)


def full(shape: LightningShape, rng: np.random.Generator) -> Call:
    """A call in which every row and slot is moved."""
    call = Call(rng, shape)
    call.slots[:] = 1 + np.arange(len(call.slots))
    call.fresh[:] = False
    return call


BLOCKS = {
    "decode": LightningShape(8, 128, 128, 64),
    "decode-narrow-state": LightningShape(16, 128, 128, 3, state_dtype="bfloat16"),
    "prefill": LightningShape(16, 128, 128, 384, (384,)),
    "prefill-several": LightningShape(16, 128, 128, 300, (130, 5, 1, 164)),
    "prefill-float32": LightningShape(16, 128, 128, 200, (200,), dtype="float32"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_are_counted_and_the_estimate_agrees(rng, name):
    """At the block sizes of real shapes: what is moved, what was promised, what is necessary.

    Numbers are not computed, only copies are made.
    """
    shape = BLOCKS[name]
    call = full(shape, rng)
    with tpu_traffic.counted() as traffic:
        call.run(tpu_blocks.CHUNKS[0], skip_floating_point_ops=True)
    if shape.lengths:
        blocks = tpu_blocks.prefill_blocks(call.q, call.v, call.state)
        assert (blocks.heads, blocks.chunk) == (8, 128)
        promised = tpu_prefill.cost(call.q, call.v, call.state, len(call.slots), blocks)
    else:
        assert tpu_blocks.decode_blocks(call.q, call.v, call.state).heads == 8
        promised = tpu_decode.cost(call.q, call.v, call.state)
    assert traffic.total == promised.bytes_accessed == shape.least_bytes
    # Only decode has windows.
    assert (traffic.windows > 0) == (not shape.lengths)


def test_padding_moves_nothing_but_its_zeros(rng):
    """A NULL row's slot stays where it is; a NULL segment's rows are not read."""
    shape = testing.SMALL_PREFILL["two-blocks"]
    call = full(shape, rng)
    call.slots[[0, 4]] = 0
    with tpu_traffic.counted() as traffic:
        call.run(skip_floating_point_ops=True)
    rest = replace(shape, lengths=(0, 1, 0, 37, 0))
    assert traffic.total == rest.least_bytes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"heads": 250}, "a block of 250 heads takes .* MiB of VMEM, more than 32"),
        ({"key_dim": 24}, "K is 24, not a multiple of 8 from 32 to 256"),
        ({"value_dim": 264}, "V is 264, not a multiple of 8 from 32 to 256"),
        ({"value_dim": 100}, "V is 100, not a multiple of 8"),
        ({"dtype": "float16"}, "q, k and v are float16"),
        ({"state_dtype": "float16"}, "the state is float16"),
    ],
)
@pytest.mark.parametrize("operator", ["lightning_decode", "lightning_prefill"])
def test_what_can_not_run_says_why(operator, changed, said):
    shape = replace(testing.DECODE["H16 B1"], **changed)
    rows = [(1, shape.heads, w) for w in (shape.key_dim, shape.key_dim, shape.value_dim)]
    arrays = [jax.ShapeDtypeStruct(x, shape.dtype) for x in rows]
    arrays.append(jax.ShapeDtypeStruct((shape.heads,), "float32"))
    state = (3, shape.heads, shape.key_dim, shape.value_dim)
    arrays.append(jax.ShapeDtypeStruct(state, shape.state_dtype))
    with pytest.raises(ValueError, match=f"{operator}: 'tpu' can't run: {said}"):
        dispatch.choose(operator, "tpu", *arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_size_of_the_promise_fits(dtype):
    """K and V from 32 to 256; any number of heads that 8 divides, and every other up to 23."""
    for width in (32, 64, 104, 128, 256):
        for heads in (*range(1, 24), 64, 128, 256):
            if width == 256 and heads % 8 and heads > 11:
                continue
            shapes = [(4096, heads, width), (4096, heads, 288 - width if width > 32 else 32)]
            q, v = (jax.ShapeDtypeStruct(x, dtype) for x in shapes)
            state = jax.ShapeDtypeStruct((9, heads, width, v.shape[-1]), "float32")
            assert tpu_decode.supports(q, q, v, None, state) is None, (heads, width)
            assert tpu_prefill.supports(q, q, v, None, state) is None, (heads, width)


def test_named_shapes_are_what_they_say():
    for shape in (*testing.SMALL_PREFILL.values(), *testing.PREFILL.values()):
        assert 0 < sum(shape.lengths) <= shape.rows
        assert min(shape.lengths) >= 0
    for name, shape in testing.PREFILL.items():
        assert name == f"H{shape.heads} T{sum(shape.lengths)} x{len(shape.lengths)}"
        assert len(set(shape.lengths)) == len(shape.lengths)


def test_r099_the_scalar_memory_holds_65536_sequences():
    q = jax.ShapeDtypeStruct((65536, 1, 128), "bfloat16")
    state = jax.ShapeDtypeStruct((9, 1, 128, 128), "float32")
    assert tpu_decode.supports(q, q, q, None, state) is None
    more = jax.ShapeDtypeStruct((300_000, 1, 128), "bfloat16")
    said = tpu_decode.supports(more, more, more, None, state)
    assert said == "300000 rows take 1171 KiB of scalar memory, more than 896"


def test_r003_expm1_keeps_float32s_precision():
    x = -np.concatenate([[0], np.geomspace(1e-8, 200, 2000)]).astype(np.float32)
    got = np.asarray(tpu_decode._expm1(jnp.asarray(x)), np.float64)
    want = np.expm1(x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=0)
