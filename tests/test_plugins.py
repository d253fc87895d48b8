"""Layers and kernels from outside: a package really installed, and every way to get it wrong."""

from __future__ import annotations

import base64
import copy
import hashlib
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_models import write_tiny_model

from bailing_jax import plugins
from bailing_jax.errors import UserError
from bailing_jax.layers.lightning_attention import LightningAttention
from pallas_kernels import dispatch, lightning_decode

pytestmark = pytest.mark.unoptimised

ROOT = Path(__file__).resolve().parent.parent

# A layer that keeps a wider state than it needs and gives half of what the built-in one gives, and
# a decode kernel that counts.
PROBE = """
import jax
import jax.numpy as jnp
from bailing_jax import plugins
from bailing_jax.layers.lightning_attention import LightningAttention
from pallas_kernels.lightning_attention import xla

seen = {"layer": 0, "kernel": 0}


class HalfAttention(LightningAttention):
    @classmethod
    def state_spec(cls, config, spec):
        usual = super().state_spec(config, spec)
        return jax.ShapeDtypeStruct((*usual.shape, 2), usual.dtype)

    def __call__(self, x, state, layout, log_decay):
        seen["layer"] += 1
        y, first = super().__call__(x, state[..., 0], layout, log_decay)
        return y / 2, jnp.stack([first, first], axis=-1)


def counting_decode(q, k, v, log_decay, state, *, slots, scale):
    seen["kernel"] += 1
    return xla.lightning_decode(q, k, v, log_decay, state, slots=slots, scale=scale)


def register():
    plugins.register_layer("lightning_attention", HalfAttention)
    plugins.register_kernel("lightning_decode", "counting", counting_decode)
"""

PROGRAM = """
import sys
from bailing_jax import LLM, SamplingParams
llm = LLM(sys.argv[1], max_num_seqs=2, max_model_len=64, prefill_chunk=16)
answer = llm.generate([3, 1, 4], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
import bailing_probe
print(bailing_probe.seen, {leaf.shape[4:] for leaf in llm._engine._state.layers})
print(len(answer[0].outputs[0].token_ids))
"""


def write_wheel(folder: Path, name: str, source: str, entry_points: str) -> Path:
    """A wheel of one module, as a build backend would leave it."""
    info = f"{name}-0.3.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    record = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"])
    wheel = folder / f"{name}-0.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def test_an_installed_package_replaces_a_layer_and_a_kernel(tmp_path):
    entry_points = f"[{plugins.GROUP}]\nprobe = bailing_probe:register\n"
    wheel = write_wheel(tmp_path, "bailing_probe", PROBE, entry_points)
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", installed, wheel], check=True)
    model = write_tiny_model(tmp_path / "model")
    paths = os.pathsep.join([str(ROOT), str(installed)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model],
        env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "bailing_probe" in line.replace("-", "_")]
    assert [line.replace("-", "_") for line in said] == [
        "plugin: lightning_attention is bailing_probe.HalfAttention, from bailing_probe 0.3",
        "plugin: lightning_decode has kernel 'counting', from bailing_probe 0.3",
    ]
    seen, length = done.stdout.splitlines()
    counts, shapes = seen.split("} {")
    assert "'layer': 0" not in counts
    assert "'kernel': 0" not in counts
    # Every layer's state: the replaced ones have one dimension more than (slots, heads, K, V).
    assert "(2,)" in shapes
    assert length == "4"


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing registered, and nothing left registered afterwards."""
    monkeypatch.setattr(plugins, "_REGISTRY", plugins._Registry())
    monkeypatch.setattr(dispatch, "_REGISTRY", copy.deepcopy(dispatch._REGISTRY))


def decode(q, k, v, log_decay, state, *, slots, scale):
    return v * 0 + 7, state


def call() -> jax.Array:
    arrays = [jnp.ones(s) for s in ((2, 3, 4), (2, 3, 4), (2, 3, 5), (3,), (6, 3, 4, 5))]
    return lightning_decode(*arrays, slots=jnp.array([1, 2]), scale=1.0)[0]


def test_auto_asks_a_plugins_kernel_first_and_goes_on_when_it_can_not(clean):
    plugins.register_kernel("lightning_decode", "seven", decode)
    assert (call() == 7).all()
    dispatch._REGISTRY["lightning_decode"].pop("seven")
    plugins.register_kernel("lightning_decode", "seven", decode, lambda *_: "it is Monday")
    assert (call() != 7).any()
    with pytest.raises(ValueError, match="'seven' can't run: it is Monday"):
        dispatch.choose("lightning_decode", "seven")


def test_exact_mode_passes_over_a_kernel_without_an_exact_form(clean):
    plugins.register_kernel("lightning_decode", "seven", decode)
    assert dispatch.choose("lightning_decode", "auto", *[call()] * 5, exact=True) is not decode


class Whole(LightningAttention):
    """Replaces nothing but the name."""


def wrong_layers() -> dict[str, tuple[str, Any, str]]:
    class NoParameters:
        def __init__(self, scope, config, options): ...
        def __call__(self, x, state, layout, log_decay): ...
        @staticmethod
        def state_spec(config, spec): ...

    class NoState(NoParameters):
        parameters = staticmethod(lambda config, path: ())
        state_spec = None

    class OtherState(NoState):
        state_spec = staticmethod(lambda config: None)

    class OtherConstructor(Whole):
        def __init__(self, config): ...

    class NotCalled(NoState):
        state_spec = staticmethod(lambda config, spec: None)
        __call__ = None

    class OtherCall(Whole):
        def __call__(self, x): ...

    return {
        "unknown": ("rope", Whole, "there is no layer 'rope' to replace\nLayers: lightning_att"),
        "an instance": ("gqa_attention", object(), "is not a class"),
        "no parameters": ("mla_attention", NoParameters, r"NoParameters has no parameters\(config"),
        "no state": ("lightning_attention", NoState, r"NoState has no state_spec\(config, spec\)"),
        "other state": (
            "lightning_attention", OtherState,
            r"OtherState.state_spec takes \(config\): .*\nIt is called with \(config, spec\)",
        ),
        "other constructor": (
            "lightning_attention", OtherConstructor,
            r"OtherConstructor takes \(self, config\): .*\n.*\(self, scope, config, options\)",
        ),
        "not callable": ("lightning_attention", NotCalled, "NotCalled can't be called"),
        "other call": (
            "lightning_attention", OtherCall,
            r"OtherCall.__call__ takes \(self, x\): .*\n.*\(self, x, state, layout, log_decay\)",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", wrong_layers())
def test_a_wrong_layer_is_refused_by_name(clean, case):
    name, layer, said = wrong_layers()[case]
    with pytest.raises(UserError, match=said):
        plugins.register_layer(name, layer)
    assert plugins.load() == ()
    assert plugins.layer("lightning") is None


def test_a_layer_is_replaced_once(clean):
    plugins.register_layer("lightning_attention", Whole)
    assert plugins.layer("lightning") is Whole
    with pytest.raises(UserError, match=r"lightning_attention is already replaced, by .*Whole"):
        plugins.register_layer("lightning_attention", Whole)


@pytest.mark.parametrize(
    ("operator", "name", "run", "said"),
    [
        ("decode", "mine", decode, "no operator 'decode'\nOperators: .*lightning_decode"),
        ("lightning_decode", "xla", decode, "already has an implementation named 'xla'"),
        ("lightning_decode", "auto", decode, "already has an implementation named 'auto'"),
        ("lightning_prefill", "mine", decode, r"kernel 'mine' takes .*\n.*\(q, k, v, log_decay"),
        ("lightning_decode", "mine", lambda q, k: q, r"takes \(q, k\): .*\n.*\*, slots, scale\)"),
    ],
)
def test_a_wrong_kernel_is_refused_by_name(clean, operator, name, run, said):
    with pytest.raises(UserError, match=said):
        plugins.register_kernel(operator, name, run)


@pytest.mark.parametrize(
    ("loaded", "said"),
    [
        (lambda: 1 / 0, "plugin 'probe' .*: ZeroDivisionError: division by zero\nMend"),
        (lambda: 5, "plugin 'probe' .*: 5 can't be called"),
        (
            lambda: lambda: plugins.register_kernel("lightning_decode", "xla", decode),
            "plugin 'probe' .*: lightning_decode already has an implementation named 'xla'",
        ),
        (lambda: lambda one: None, "plugin 'probe' .*: TypeError: .*missing 1 required"),
    ],
)
def test_a_broken_plugin_is_named_at_start(clean, monkeypatch, loaded, said):
    entry = SimpleNamespace(name="probe", value="probe:register", dist=None, load=loaded)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    with pytest.raises(UserError, match=said):
        plugins.load()


def test_state_of_another_size_than_slots_is_refused(clean, tmp_path):
    from bailing_jax.config import ModelConfig
    from bailing_jax.presets import find_preset
    from bailing_jax.state import StateSpec, leaf_shapes

    class Flat(LightningAttention):
        @classmethod
        def state_spec(cls, config, spec):
            return jax.ShapeDtypeStruct((5, 3), jnp.float32)

    plugins.register_layer("lightning_attention", Flat)
    preset = find_preset("ring-mini-linear-2.0")
    assert preset is not None
    config = ModelConfig.from_hf(preset.hf_config, {}, where=preset.name)
    with pytest.raises(UserError, match=r"Flat.state_spec gave .*\n.*first dimension is 9 here"):
        leaf_shapes(config, StateSpec(9, 4, "float32"))
