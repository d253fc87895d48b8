"""The parameter description against checkpoints, modules and published sizes.

What a checkpoint holds comes from random_checkpoints, which shares no code with the package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_configs import LINEAR_V2, V2, V2_5, changed
from hypothesis import HealthCheck, Phase, given, settings
from random_checkpoints import draw_config, tensor_shapes

from bailing_jax.config import SUPPORTED, ModelConfig
from bailing_jax.layer_plan import layer_plan
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import abstract
from bailing_jax.params import Param, describe
from bailing_jax.presets import PRESETS
from convert.mapping import place, unplace

# A drawn YaRN factor may contradict the drawn length; that is test_config_rope's business.
pytestmark = pytest.mark.filterwarnings("ignore::bailing_jax.config.ConfigWarning")

EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

# Every optional parameter there, none of them, and what releases have.
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {"use_bias": True, "use_qkv_bias": True, "num_shared_experts": 2},
    "none": {"use_qk_norm": False, "num_shared_experts": 0, "tie_word_embeddings": True},
    "released": {"num_nextn_predict_layers": 1},
}
SMALL = {
    f"{architecture}-{name}": changed(architecture, **changes)
    for architecture in (V2, LINEAR_V2, V2_5)
    for name, changes in VARIANTS.items()
} | {"flat-query": changed(V2_5, q_lora_rank=None)}
RELEASED = {
    name: dict(preset.hf_config)
    for name, preset in PRESETS.items()
    if preset.hf_config["architectures"][0] in SUPPORTED  # type: ignore[index]
}


def checkpoint(hf_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor the model may use; the mtp layer is none of them."""
    # Some exporters of a biased V2.5 model write a bias for kv_a_proj_with_mqa as well.
    biased = "kv_lora_rank" in hf_config and hf_config["use_qkv_bias"]
    return tensor_shapes({**hf_config, "num_nextn_predict_layers": 0}, kv_a_bias=biased)


def described(hf_config: Mapping[str, Any]) -> tuple[Param, ...]:
    return describe(ModelConfig.from_hf(hf_config))


def check_sources(hf_config: Mapping[str, Any]) -> None:
    """The description and the checkpoint have the same tensors, name by name."""
    sources: dict[str, tuple[int, ...]] = {}
    for param in described(hf_config):
        for source in param.sources:
            assert sources.setdefault(source.name, source.shape) == source.shape
    assert sources == checkpoint(hf_config)


@EXAMPLES
@given(hf_config=draw_config())
def test_described_tensors_are_the_checkpoints(hf_config: dict[str, Any]) -> None:
    check_sources(hf_config)


@pytest.mark.parametrize("name", [*SMALL, *RELEASED])
def test_described_tensors_are_the_checkpoints_of_presets(name: str) -> None:
    check_sources((SMALL | RELEASED)[name])


@EXAMPLES
@given(hf_config=draw_config())
def test_s10_r110_every_checkpoint_element_has_exactly_one_place(hf_config: dict[str, Any]) -> None:
    """All elements get a number; each number must be in one parameter, once, and nothing else."""
    tensors, count = {}, 0
    for name, shape in checkpoint(hf_config).items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(count, count + size).reshape(shape)
        count += size
    placed = []
    for param in described(hf_config):
        array = np.full(param.shape, -1)
        for source in param.sources:
            place(source, tensors[source.name], array)
        assert array.size == param.size
        placed.append(array.ravel())
    np.testing.assert_array_equal(np.sort(np.concatenate(placed)), np.arange(count))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unplace_undoes_place_bit_for_bit(name: str, dtype: str, rng: np.random.Generator) -> None:
    bits = np.dtype(f"uint{8 * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize}")

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        """Any bits, NaN with payload, infinities and negative zeros included."""
        limit = np.iinfo(bits).max
        values = rng.integers(0, limit, shape, bits, endpoint=True)
        return values.view(getattr(ml_dtypes, dtype, dtype))

    tensors = {source: draw(shape) for source, shape in checkpoint(SMALL[name]).items()}
    back = {source: draw(tensor.shape) for source, tensor in tensors.items()}
    for param in described(SMALL[name]):
        array = draw(param.shape)
        for source in param.sources:
            place(source, tensors[source.name], array)
        for source in param.sources:
            unplace(source, array, back[source.name])
    for source, tensor in tensors.items():
        np.testing.assert_array_equal(back[source].view(bits), tensor.view(bits), err_msg=source)


@pytest.mark.parametrize("name", [*SMALL, *RELEASED])
def test_parameters_have_the_checkpoints_names(name: str) -> None:
    """But for stacked experts, kept under `mlp.experts`, and the halves of kv_b_proj."""
    hf_config = (SMALL | RELEASED)[name]
    tensors = checkpoint(hf_config)
    paths = [param.path for param in described(hf_config)]
    assert len(set(paths)) == len(paths)
    assert ("lm_head.weight" in paths) == (not hf_config["tie_word_embeddings"])
    renamed = {
        r"(model\.layers\.\d+\.mlp\.experts)\.((gate|up|down)_proj\.weight)": r"\1.{}.\2",
        r"(model\.layers\.\d+\.attention\.kv_b_proj)\.(key|value)_weight": r"\1.weight",
    }
    for param in described(hf_config):
        names = [source.name for source in param.sources]
        if param.path in tensors:
            assert names == [param.path]
            continue
        found = [(p, name) for p, name in renamed.items() if re.fullmatch(p, param.path)]
        assert len(found) == 1, param.path
        name_of = re.sub(*found[0], param.path)
        stacked = range(hf_config["num_experts"]) if "{}" in name_of else [None]
        assert names == [name_of.format(i) for i in stacked]
        assert [source.index for source in param.sources] == list(stacked)


def check_modules(hf_config: Mapping[str, Any], dtype: str) -> None:
    """The modules' parameters are the description's: paths, shapes, dtypes and axes."""
    config = ModelConfig.from_hf(hf_config)
    state = nnx.state(abstract(config, RuntimeOptions(dtype)))
    got = {
        ".".join(map(str, path)): (leaf.shape, leaf.dtype.name, leaf.get_metadata()["axes"])
        for path, leaf in nnx.to_flat_state(state)
    }
    assert got == {
        param.path: (param.shape, "float32" if param.dtype == "float32" else dtype, param.axes)
        for param in describe(config)
    }


@settings(EXAMPLES, max_examples=15)
@given(hf_config=draw_config())
def test_modules_declare_what_is_described(hf_config: dict[str, Any]) -> None:
    check_modules(hf_config, "float32")


@pytest.mark.parametrize("name", [*SMALL, *RELEASED])
def test_modules_declare_what_is_described_of_presets(name: str) -> None:
    check_modules((SMALL | RELEASED)[name], "bfloat16")


@pytest.mark.parametrize("name", [*SMALL, *RELEASED])
def test_axes_name_every_dimension(name: str) -> None:
    for param in described((SMALL | RELEASED)[name]):
        assert len(param.axes) == len(param.shape), param.path
        assert len(set(param.axes)) == len(param.axes), param.path


@pytest.mark.parametrize("name", SMALL)
def test_layers_of_one_kind_have_parameters_of_one_shape_and_axes(name: str) -> None:
    """So that what is sharded how is the same in all of them."""
    sizes: dict[tuple[str, str], tuple[object, ...]] = {}
    plan = layer_plan(ModelConfig.from_hf(SMALL[name]))
    for param in described(SMALL[name]):
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", param.path)
        if layer is not None:
            key = (str(plan[int(layer[1])]), layer[2])
            assert sizes.setdefault(key, (param.shape, param.axes)) == (param.shape, param.axes)
    assert sizes


@pytest.mark.parametrize("name", SMALL)
def test_r109_the_router_stays_float32(name: str) -> None:
    wide = {param.path for param in described(SMALL[name]) if param.dtype == "float32"}
    routers = (".mlp.gate.weight", ".mlp.gate.expert_bias")
    assert wide == {path for path in checkpoint(SMALL[name]) if path.endswith(routers)}
    assert len(wide) == 2 * (7 - 1)


@pytest.mark.parametrize("name", [*SMALL, "ling-2.6-flash", "ring-mini-linear-2.0"])
def test_layers_of_one_kind_have_equal_graphdefs(name: str) -> None:
    """So they share a trace, and hold neither their index nor their decay."""
    config = ModelConfig.from_hf((SMALL | RELEASED)[name])
    model = abstract(config, RuntimeOptions("bfloat16"))
    graphdefs: dict[object, list[nnx.GraphDef]] = {}
    for spec, layer in zip(layer_plan(config), model.model.layers, strict=True):
        graphdefs.setdefault(spec, []).append(nnx.split(layer)[0])
    assert max(map(len, graphdefs.values())) > 1
    for same in graphdefs.values():
        assert all(other == same[0] and hash(other) == hash(same[0]) for other in same)
    first = [same[0] for same in graphdefs.values()]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    billions = sum(param.size for param in described(RELEASED[name])) / 1e9
    # The trillion-parameter hybrid was published as "about"; the others to three decimals.
    allowed = {"rel": 0.005} if name == "ling-2.6-1t" else {"abs": 0.00051}
    assert billions == pytest.approx(PRESETS[name].total_parameters, **allowed)
