"""The GPU's lightning kernels: where they are chosen, and that they lower for CUDA as they should.

Lowering needs no GPU. It checks layouts, tiles and alignment, which the interpreter does not know.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from lightning_gpu_cases import SCALE

from pallas_kernels import (
    choose_fused_decode,
    compat,
    dispatch,
    lightning_decode,
    lightning_prefill,
)
from pallas_kernels.lightning_attention import fused

T, SEGMENTS, N = 304, 3, 2


def arrays(key_dim=64, value_dim=64, dtype=jnp.bfloat16, state_dtype=jnp.float32, rows=T):
    spec = jax.ShapeDtypeStruct
    return (
        spec((rows, N, key_dim), dtype), spec((rows, N, key_dim), dtype),
        spec((rows, N, value_dim), dtype), spec((N,), jnp.float32),
        spec((SEGMENTS + 4, N, key_dim, value_dim), state_dtype),
    )  # fmt: skip


def prefill(*xs, **options):
    places = {
        "slots": jnp.arange(1, SEGMENTS + 1, dtype=jnp.int32),
        "cu_seqlens": jnp.asarray(np.linspace(0, xs[0].shape[0], SEGMENTS + 1), jnp.int32),
        "is_fresh": jnp.zeros(SEGMENTS, bool),
    }
    return lightning_prefill(*xs, **places, scale=SCALE, **options)


def decode(*xs, **options):
    slots = jnp.arange(xs[0].shape[0], dtype=jnp.int32) % 3
    return lightning_decode(*xs, slots=slots, scale=SCALE, **options)


@pytest.fixture
def on_hopper(monkeypatch):
    """As if the first device were a Hopper GPU: programs are traced for it, not run."""

    class Device:
        compute_capability, device_kind = "9.0", "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device])


def gpus(number: int = 1) -> jax.sharding.AbstractMesh:
    """jax wants to know the GPU when it lowers without one."""
    return jax.sharding.AbstractMesh(
        (number,), ("x",), (jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"),
    )  # fmt: skip


def lowered(run, xs, number: int = 1) -> str:
    with jax.sharding.use_abstract_mesh(gpus(number)):
        traced = jax.jit(run, donate_argnums=4).trace(*xs)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_elsewhere_nothing_changes():
    """On this machine "auto" does not take them, and who names them is told why not."""
    xs = [jnp.zeros(x.shape, x.dtype) for x in arrays()]
    for run in (prefill, decode):
        with pytest.raises(ValueError, match=r"'gpu' can't run: (needs jax|no NVIDIA)"):
            run(*xs, implementation="gpu")
    for operator in ("lightning_prefill", "lightning_decode"):
        chosen = dispatch.choose(operator, "auto", *arrays())
        assert chosen is dispatch.choose(operator, "xla", *arrays())


@pytest.mark.mosaic_interpreter
@pytest.mark.parametrize(
    ("operator", "changed", "said"),
    [
        ("prefill", {"dtype": jnp.float16}, "float16, not float32 or bfloat16"),
        ("prefill", {"key_dim": 40, "value_dim": 40}, "key dim 40 and value dim 40: want mult"),
        ("decode", {"key_dim": 40, "value_dim": 40}, "multiples of 16"),
        ("decode", {"dtype": jnp.float16}, "float16, not float32 or bfloat16"),
    ],
)
def test_what_they_can_not_do_goes_to_xla(on_hopper, operator, changed, said, caplog):
    dispatch._log_choice.cache_clear()
    xs = arrays(**changed)
    name = f"lightning_{operator}"
    with pytest.raises(ValueError, match=f"'gpu' can't run: .*{said}"):
        dispatch.choose(name, "gpu", *xs)
    assert dispatch.choose(name, "auto", *xs) is dispatch.choose(name, "xla", *xs)
    assert re.search(f"{name}: xla on gpu, because gpu: .*{said}", caplog.text)


@pytest.mark.mosaic_interpreter
def test_hopper_takes_them_and_other_gpus_do_not(on_hopper, monkeypatch):
    for name in ("lightning_prefill", "lightning_decode"):
        chosen = dispatch.choose(name, "auto", *arrays())
        assert chosen is dispatch.choose(name, "gpu", *arrays())
        # Exact mode has no form of theirs.
        exact = dispatch.choose(name, "auto", *arrays(), exact=True)
        assert exact is dispatch.choose(name, "xla", *arrays(), exact=True)
    for capability in ("8.0", "10.0", ""):
        monkeypatch.setattr(jax.devices()[0], "compute_capability", capability)
        assert "needs a Hopper GPU" in str(compat.why_no_mosaic_gpu())


def choose_fused(rows=5, heads=N, dim=64, dtype=jnp.bfloat16, rotated=64, **changed):
    spec = jax.ShapeDtypeStruct
    options = {"norms": [spec((dim,), dtype)] * 2, "rotated_dtype": dtype, **changed}
    return choose_fused_decode(
        spec((rows, 3, heads, dim), dtype), spec((heads,), jnp.float32),
        spec((9, heads, dim, dim), jnp.float32), num_angles=rotated // 2, **options,
    )  # fmt: skip


@pytest.mark.mosaic_interpreter
def test_norms_and_rope_are_fused_where_decode_is_the_gpus(on_hopper, caplog):
    caplog.set_level("INFO")
    fused._log_choice.cache_clear()
    chosen = choose_fused()
    assert chosen is not None
    assert choose_fused(implementation="gpu", norms=[], rotated=0) is chosen
    assert caplog.text.count("norms and RoPE in its kernel") == 1
    for named in ({"implementation": "xla"}, {"implementation": "reference"}, {"exact": True}):
        assert choose_fused(**named) is None
    # The operator's own refusal, and its own warning.
    with pytest.raises(ValueError, match=r"'gpu' can't run: .*float16"):
        choose_fused(dtype=jnp.float16, implementation="gpu")
    assert choose_fused(dtype=jnp.float16) is None
    assert "apart" not in caplog.text


@pytest.mark.mosaic_interpreter
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rotated": 40}, "40 rotated channels: half of them must divide key dim 64"),
        ({"rows": 128, "heads": 64}, "it does not pay for 8192 or more rows x heads"),
        ({"norms": [jnp.ones(64, jnp.float32)]}, "weights of norms are not bfloat16"),
    ],
)
def test_what_is_not_fused_says_why(on_hopper, changed, said, caplog):
    caplog.set_level("INFO")
    fused._log_choice.cache_clear()
    assert choose_fused(**changed) is None
    assert f"norms and RoPE apart, because {said}" in caplog.text
    assert choose_fused(rows=127, heads=64) is not None


@pytest.mark.mosaic_interpreter
def test_a_preferred_kernel_of_a_plugin_is_not_passed_over(on_hopper, monkeypatch):
    registered = dict(dispatch._REGISTRY["lightning_decode"])
    monkeypatch.setitem(dispatch._REGISTRY, "lightning_decode", registered)
    dispatch.register("lightning_decode", "mine", lambda *_: None, preferred=True)
    assert choose_fused() is None
    assert choose_fused(implementation="gpu") is not None


def test_nothing_is_fused_elsewhere(caplog):
    caplog.set_level("INFO")
    assert choose_fused() is None
    # Nobody was asked.
    assert not caplog.text


@pytest.mark.mosaic_interpreter
@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("dim", "rotated", "number"),
    [(128, 64, 1), (64, 64, 1), (256, 128, 1), (48, 0, 1), (128, 64, 2)],
)
def test_the_fused_kernel_lowers_with_the_pool_in_place(
    on_hopper, dim, rotated, number, state_dtype
):
    """On two devices that divide the heads, too."""
    spec, rows = jax.ShapeDtypeStruct, 5

    def decode(qkv, weight, cos, log_decay, state):
        run = choose_fused(dim=dim, rotated=rotated, heads=qkv.shape[2])
        assert run is not None
        return run(
            qkv, log_decay, state, slots=jnp.arange(rows) % 3, scale=SCALE, norms=(weight, weight),
            eps=1e-6, rotated_dtype=jnp.dtype("float32"), angles=(cos, cos) if rotated else None,
        )  # fmt: skip

    if number > 1:
        heads = P(None, "x")
        specs = P(None, None, "x"), P(), P(), P("x"), heads
        decode = compat.shard_map(decode, gpus(number), specs, (heads, heads))
    pool = spec((9, N, dim, dim), state_dtype)
    text = lowered(decode, (
        spec((rows, 3, N, dim), jnp.bfloat16), spec((dim,), jnp.bfloat16),
        spec((rows, rotated // 2), jnp.float32), spec((N,), jnp.float32), pool,
    ), number)  # fmt: skip
    check_pool_in_place(text, spec((9, N // number, dim, dim), state_dtype))


@pytest.mark.mosaic_interpreter
@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("run", "key_dim", "value_dim", "rows"),
    [
        (prefill, 128, 128, T),
        (prefill, 128, 128, 64),
        (prefill, 64, 192, T + 3),
        (prefill, 256, 64, 8),
        (prefill, 96, 48, T),
        (decode, 128, 128, 5),
        (decode, 32, 256, 5),
        (decode, 256, 48, 1),
    ],
)
def test_it_lowers_with_the_pool_in_place(on_hopper, run, key_dim, value_dim, rows, state_dtype):
    xs = arrays(key_dim, value_dim, state_dtype=state_dtype, rows=rows)
    text = lowered(run, xs)
    # Only odd numbers of rows are padded, by a copy.
    assert ("stablehlo.pad" in text) == (run is prefill and rows in (8, T + 3))
    check_pool_in_place(text, xs[4])


def check_pool_in_place(text: str, state: jax.ShapeDtypeStruct) -> None:
    """Kernels alone touch the pool."""
    lines = text.splitlines()
    kernels = [line for line in lines if "custom_call @mosaic_gpu" in line]
    # The last one writes; one before it sums up pieces.
    assert "output_operand_alias" in kernels[-1]
    assert len(kernels) <= 2
    pool = f"tensor<{'x'.join(map(str, state.shape))}x"
    passing_on = re.compile(r"custom_call @mosaic_gpu|sdy\.|func\.func|return|call @")
    assert not [line for line in lines if pool in line and not passing_on.search(line)]
