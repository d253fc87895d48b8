"""Decode rows whose norms and RoPE run in the decode kernel: the layer, and a model around it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal, poison
from driver import Driver, Request, Sizes
from lightning_gpu_cases import MACHINES, on
from module_scope import scope_of
from tiny_models import LINEAR, write_tiny_model
from tolerances import TOLERANCES

from bailing_jax.batch import BatchLayout, pack
from bailing_jax.config import ModelConfig
from bailing_jax.layers.lightning_attention import LightningAttention
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.params import built_in_parameters
from bailing_jax.row import Row
from pallas_kernels import compat

CONFIG = {**LINEAR, "head_dim": 64}
FUSED = "lightning_decode_fused"
LOG_DECAY = np.array([-0.003, -0.1, -2.0], np.float32)
SLOTS = [4, 1, 6]
NUM_SLOTS = 9


@dataclasses.dataclass
class Layer:
    """A layer's weights and inputs; what nobody owns is NaN."""

    config: ModelConfig
    weights: dict[str, np.ndarray]
    x: np.ndarray
    state: np.ndarray
    dtype: str

    @staticmethod
    def random(rng: np.random.Generator, dtype: str, **changed: object) -> Layer:
        config = ModelConfig.from_hf({**CONFIG, **changed})
        weights = {}
        for param in built_in_parameters("lightning", config, "layer"):
            values = normal(rng, param.shape, "float32")
            is_matrix = len(param.shape) > 1
            values = values / param.shape[0] ** 0.5 if is_matrix else 1 + 0.3 * values
            weights[param.path.removeprefix("layer.")] = values.astype(dtype)
        x = np.concatenate([
            normal(rng, (len(SLOTS), config.hidden_size), dtype),
            poison(rng, (2, config.hidden_size), dtype),
        ])  # fmt: skip
        state = poison(rng, (NUM_SLOTS, 3, 64, 64), "float32")
        state[SLOTS] = normal(rng, (len(SLOTS), 3, 64, 64), "float32")
        return Layer(config, weights, x, state, dtype)

    def step(self, layout: BatchLayout, **options):
        """(the layer's function of x and state, its arguments)."""
        runtime = RuntimeOptions(self.dtype, **options)
        layer = LightningAttention(scope_of(self.weights), self.config, runtime)
        run = lambda x, state: layer(x, state, layout, jnp.asarray(LOG_DECAY))  # noqa: E731
        return run, (jnp.asarray(self.x), jnp.asarray(self.state))

    def run(self, layout: BatchLayout, **options) -> tuple[np.ndarray, np.ndarray]:
        run, arrays = self.step(layout, **options)
        y, state = jax.jit(run)(*arrays)
        return np.asarray(y), np.asarray(state)

    def is_fused(self, layout: BatchLayout, **options) -> bool:
        run, arrays = self.step(layout, **options)
        return FUSED in str(jax.make_jaxpr(run)(*arrays))


def decode_step(num_decode: int = 5) -> BatchLayout:
    """Three sequences and pads."""
    rows = [Row([1], slot, [slot], 97 * slot) for slot in SLOTS]
    return pack(
        rows, [], num_decode=num_decode, num_prefill=0, num_segments=0, page_size=1024,
        pages_a_sequence=1,
    )  # fmt: skip


def mixed_step() -> BatchLayout:
    """Two sequences decode, one begins."""
    rows = [Row([1], slot, [slot], 97 * slot) for slot in SLOTS[:2]]
    segment = Row([1, 2], SLOTS[2], [SLOTS[2]], 0)
    return pack(
        rows, [segment], num_decode=3, num_prefill=2, num_segments=1, page_size=1024,
        pages_a_sequence=1,
    )  # fmt: skip


@MACHINES
@pytest.mark.parametrize(
    ("dtype", "rope_dtype", "changed"),
    [
        ("bfloat16", None, {}),
        ("bfloat16", "float32", {"partial_rotary_factor": 1.0}),
        ("bfloat16", None, {"use_qk_norm": False}),
        ("float32", None, {}),
    ],
    ids=["bfloat16", "rotated wide", "no norms", "float32"],
)
def test_the_layer_is_the_same_fused(rng, machine, dtype, rope_dtype, changed):
    layer, layout = Layer.random(rng, dtype, **changed), decode_step()
    want_y, want = layer.run(layout, rope_dtype=rope_dtype, kernels="xla")
    with on(machine):
        options = {"rope_dtype": rope_dtype, "kernels": "gpu"}
        assert layer.is_fused(layout, **options)
        y, state = layer.run(layout, **options)
    assert (y.dtype, state.dtype) == (want_y.dtype, want.dtype)
    real = slice(len(SLOTS))
    of_y, of_state = {
        "bfloat16": ("lightning_layer_bfloat16", "bfloat16_neighbour"),
        "float32": ("norm_and_rope", "norm_and_rope"),
    }[dtype]
    assert_close(y[real], want_y[real], of_y)
    assert_close(state[SLOTS], want[SLOTS], of_state, head_axis=1)
    others = [slot for slot in range(NUM_SLOTS) if slot not in SLOTS]
    assert_same_bits(state[others], layer.state[others])


@pytest.mark.mosaic_interpreter
def test_which_steps_are_fused(rng, monkeypatch):
    """Steps of decode rows alone, where `auto` decodes on the GPU's kernel; nothing else."""
    plain = Layer.random(rng, "bfloat16")
    assert not plain.is_fused(decode_step())
    with compat.interpret_mosaic_gpu():
        monkeypatch.setattr(compat, "target_platform", lambda: "gpu")
        assert plain.is_fused(decode_step())
        assert not plain.is_fused(mixed_step())
        assert not plain.is_fused(decode_step(), kernels="xla")
        assert not plain.is_fused(decode_step(), exact=True)
        with_silu = Layer.random(rng, "bfloat16", linear_silu=True)
        assert not with_silu.is_fused(decode_step())
        monkeypatch.setattr(compat, "target_platform", lambda: "tpu")
        assert not plain.is_fused(decode_step())


@MACHINES
def test_a_model_decodes_the_same_fused(rng, machine, monkeypatch, tmp_path):
    """Steps of a whole model with the kernels of `auto`, and with XLA alone."""
    folder = write_tiny_model(Path(tmp_path), CONFIG, tokenizer=False)
    sizes = Sizes(num_decode=3, num_prefill=0, num_segments=0)
    tokens = rng.integers(0, 300, (2, 8)).tolist()
    found = {}
    start: list[np.ndarray] = []
    for kernels in ("xla", "auto"):
        with on(machine):
            if machine == "interpreter":
                monkeypatch.setattr(compat, "target_platform", lambda: "gpu")
            driver = Driver(folder, sizes, kernels=kernels)
            recurrent = driver.recurrent_layers()
            start = start or [
                normal(rng, driver.state.layers[i].shape, "float32") for i in recurrent
            ]
            driver.set_recurrent(start)
            requests = [
                Request(row, slot, [3 * slot, 3 * slot + 1], done=3)
                for row, slot in zip(tokens, (2, 5), strict=True)
            ]
            for _ in range(4):
                driver.step(requests)
            assert (FUSED in driver.program()) == (kernels == "auto")
        states = [driver.recurrent_state(request) for request in requests]
        found[kernels] = [request.all_logits() for request in requests], states
    for (logits, states), (want, want_states) in zip(
        zip(*found["auto"], strict=True), zip(*found["xla"], strict=True), strict=True
    ):
        np.testing.assert_allclose(logits, want, atol=TOLERANCES["law_logits"], rtol=0)
        for layer, state in states.items():
            bound = TOLERANCES["law_state"] * np.abs(want_states[layer]).max()
            np.testing.assert_allclose(state, want_states[layer], atol=bound, rtol=0)
