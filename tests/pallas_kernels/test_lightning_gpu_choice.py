"""The GPU's lightning kernels: where they are chosen, and that they lower for CUDA as they should.

Lowering needs no GPU. It checks layouts, tiles and alignment, which the interpreter does not know.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lightning_gpu_cases import SCALE

from pallas_kernels import compat, dispatch, lightning_decode, lightning_prefill

T, P, N = 304, 3, 2


def arrays(key_dim=64, value_dim=64, dtype=jnp.bfloat16, state_dtype=jnp.float32, rows=T):
    spec = jax.ShapeDtypeStruct
    return (
        spec((rows, N, key_dim), dtype), spec((rows, N, key_dim), dtype),
        spec((rows, N, value_dim), dtype), spec((N,), jnp.float32),
        spec((P + 4, N, key_dim, value_dim), state_dtype),
    )  # fmt: skip


def prefill(*xs, **options):
    places = {
        "slots": jnp.arange(1, P + 1, dtype=jnp.int32),
        "cu_seqlens": jnp.asarray(np.linspace(0, xs[0].shape[0], P + 1), jnp.int32),
        "is_fresh": jnp.zeros(P, bool),
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


def lowered(run, xs) -> str:
    # jax wants to know the GPU when it lowers without one.
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), (jax.sharding.AxisType.Explicit,),
        abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
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
    lines = text.splitlines()
    kernels = [line for line in lines if "custom_call @mosaic_gpu" in line]
    # The last one writes; one before it sums up pieces.
    assert "output_operand_alias" in kernels[-1]
    assert len(kernels) <= 2
    pool = f"tensor<{'x'.join(map(str, xs[4].shape))}x"
    passing_on = re.compile(r"custom_call @mosaic_gpu|func\.func|return|call @")
    assert not [line for line in lines if pool in line and not passing_on.search(line)]
