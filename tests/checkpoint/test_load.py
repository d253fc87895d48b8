"""From a folder to a model in memory: every element, every dtype, bounded memory, refusals."""

from __future__ import annotations

import math
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_configs import LINEAR_V2, V2, V2_5, changed, read
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_checkpoints import DTYPES, draw_config, random_tensors, write_checkpoint

from bailing_jax import loading
from bailing_jax.checkpoint.load import load_model, match_released
from bailing_jax.config import ModelConfig
from bailing_jax.engine_options import EngineOptions
from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE, UserError
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.params import describe
from bailing_jax.state import allocate
from convert.source import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore::bailing_jax.config.ConfigWarning"),
    pytest.mark.unoptimised,
]

Stored = Literal["float32", "bfloat16", "float16"]


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model's arrays by path."""
    leaves = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in leaves}


def expected(hf_config: dict[str, Any], stored: dict[str, np.ndarray], path: str) -> np.ndarray:
    """The parameter as the formulas need it, from the tensors alone."""
    if expert := re.fullmatch(r"(.*\.mlp\.experts)\.(\w+_proj\.weight)", path):
        names = [f"{expert[1]}.{i}.{expert[2]}" for i in range(hf_config["num_experts"])]
        return np.stack([stored[name].T for name in names])
    if half := re.fullmatch(r"(.*\.kv_b_proj)\.(key|value)_weight", path):
        whole = stored[f"{half[1]}.weight"]
        heads = whole.reshape(hf_config["num_attention_heads"], -1, whole.shape[-1])
        key = hf_config["qk_nope_head_dim"]
        return heads[:, :key] if half[2] == "key" else heads[:, key:].transpose(0, 2, 1)
    tensor = stored[path]
    is_linear = tensor.ndim == 2 and "word_embeddings" not in path
    return tensor.T if is_linear else tensor


def as_stored(tensors: dict[str, np.ndarray], dtype: Stored) -> dict[str, np.ndarray]:
    """What write_checkpoint puts on disk."""
    return {
        name: value if name.endswith("expert_bias") else value.astype(DTYPES[dtype])
        for name, value in tensors.items()
    }


def load(folder: Path, dtype: str) -> nnx.Module:
    """The model, by way of the folder alone."""
    with open_source(folder) as source:
        config = ModelConfig.from_hf(source.config)
        weights = match_released(config, source)
        return load_model(config, RuntimeOptions(dtype), weights, lambda *_: None)


def write(folder: Path, architecture: str = V2_5, shards: int = 3, **changes: object) -> Path:
    """A checkpoint of that architecture."""
    hf_config = changed(architecture, **changes)
    write_checkpoint(folder, hf_config, random_tensors(hf_config, 7), shards=shards)
    return folder


# ---- values


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_r110_every_element_is_the_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, shards: int, stored_as: Stored, held: str
) -> None:
    @settings(
        max_examples=3,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(hf_config=draw_config(), seed=st.integers(0, 99))
    def run(hf_config: dict[str, Any], seed: int) -> None:
        folder = tmp_path_factory.mktemp("checkpoint")
        tensors = random_tensors(hf_config, seed)
        write_checkpoint(folder, hf_config, tensors, shards=shards, dtype=stored_as)
        stored = as_stored(tensors, stored_as)
        optional = 0
        for path, got in parameters(load(folder, held)).items():
            wide = path.endswith((".mlp.gate.weight", ".mlp.gate.expert_bias"))
            assert got.dtype.name == ("float32" if wide else held), path
            if path.endswith("kv_a_proj_with_mqa.bias"):  # stored by some exporters only
                assert not got.any()
                optional += 1
                continue
            want = expected(hf_config, stored, path).astype(got.dtype)
            # Random numbers are never zero, so an element nobody wrote could not pass.
            assert want.all(), path
            np.testing.assert_array_equal(got, want, err_msg=path)
        assert optional == 0 or hf_config["use_qkv_bias"]

    run()


def test_an_optional_bias_is_read_where_it_is_stored(tmp_path: Path) -> None:
    hf_config = changed(V2_5, use_qkv_bias=True)
    tensors = random_tensors(hf_config, 7, kv_a_bias=True)
    write_checkpoint(tmp_path, hf_config, tensors)
    path = "model.layers.5.attention.kv_a_proj_with_mqa.bias"
    np.testing.assert_array_equal(parameters(load(tmp_path, "float32"))[path], tensors[path])


def test_mtp_layers_and_shards_change_nothing(tmp_path: Path) -> None:
    plain = parameters(load(write(tmp_path / "a", shards=1), "float32"))
    folder = tmp_path / "b"
    hf_config = changed(V2_5, num_nextn_predict_layers=1)
    tensors = random_tensors(hf_config, 8) | random_tensors(changed(V2_5), 7)
    write_checkpoint(folder, hf_config, tensors, shards=3)
    other = parameters(load(folder, "float32"))
    assert plain.keys() == other.keys()
    for path, array in plain.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with open_source(write(tmp_path, V2)) as source:
        config = ModelConfig.from_hf(source.config)
        weights = match_released(config, source)
        load_model(config, RuntimeOptions("float32"), weights, lambda *call: calls.append(call))
        stored = sum(info.nbytes for info in source.tensors.values())
    assert len(calls) == len(describe(config))
    assert {total for _, total in calls} == {stored}
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == stored


# ---- values that are refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.word_embeddings.weight", (96, 55)),
        ("model.layers.2.attention.kv_b_proj.weight", (143, 30)),
        ("model.layers.4.mlp.experts.11.down_proj.weight", (0, 8)),
        ("model.layers.6.mlp.gate.expert_bias", (3,)),
        ("model.norm.weight", (0,)),
    ],
)
def test_s09_values_that_are_not_finite_are_refused(
    tmp_path: Path, name: str, index: tuple[int, ...], value: float
) -> None:
    hf_config = changed(V2_5)
    tensors = random_tensors(hf_config, 7)
    tensors[name][index] = value
    write_checkpoint(tmp_path, hf_config, tensors, shards=3)
    with open_source(tmp_path) as source:
        file = source.tensors[name].file
    with pytest.raises(UserError) as caught:
        load(tmp_path, "bfloat16")
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.message.startswith(f"{file}: tensor '{name}' has 1 NaN or infinite values")
    assert caught.value.message.endswith(f"the first at index {index}")


def test_a_tensor_nobody_uses_may_hold_anything(tmp_path: Path) -> None:
    hf_config = changed(V2, num_nextn_predict_layers=1)
    tensors = random_tensors(hf_config, 7)
    tensors["model.layers.7.eh_proj.weight"][:] = math.nan
    write_checkpoint(tmp_path, hf_config, tensors)
    assert all(np.isfinite(a).all() for a in parameters(load(tmp_path, "float32")).values())


# ---- folders


def start(model: str | Path, **options: Any) -> loading.LoadedModel:
    """Load the way the engine does, saying nothing."""
    overrides = options.pop("hf_overrides", {})
    return loading.load(model, EngineOptions(**options), overrides, 0, lambda _line: None)


def refused(model: str | Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        start(model, **options)
    return caught.value


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_shard_is_named(tmp_path: Path, number: int) -> None:
    shard = f"model-0000{number}-of-00003.safetensors"
    (write(tmp_path) / shard).unlink()
    error = refused(tmp_path)
    assert error.exit_code == EXIT_USAGE
    assert error.message.startswith(str(tmp_path))
    assert shard in error.message


def test_shards_of_another_model_are_refused(tmp_path: Path) -> None:
    """R111's little brother: sound files, wrong company."""
    write(tmp_path / "a", LINEAR_V2)
    write(tmp_path / "b", V2_5)
    shutil.copy(tmp_path / "b" / "config.json", tmp_path / "a")
    error = refused(tmp_path / "a")
    assert error.exit_code == EXIT_USAGE
    assert "the tensors do not fit BailingMoeV2_5ForCausalLM" in error.message


def test_config_errors_name_the_file(tmp_path: Path) -> None:
    error = refused(write(tmp_path, n_group=5))
    assert error.message.startswith(f"{tmp_path / 'config.json'}: n_group = 5; allowed: ")


def test_overrides_reach_the_model(tmp_path: Path) -> None:
    loaded = start(write(tmp_path), hf_overrides={"decay_layer_offset": 1})
    assert loaded.config == read(V2_5, torch_dtype="float32", decay_layer_offset=1)
    assert refused(tmp_path, hf_overrides={"decay_offset": 1}).exit_code == EXIT_USAGE


def test_a_name_that_is_neither_folder_nor_preset(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere")
    assert error.exit_code == EXIT_USAGE
    assert str(tmp_path / "nowhere") in error.message
    assert "ling-2.6-flash, " in error.hint
    assert "ling-3.0-flash (not supported yet)" in error.hint


def test_what_is_in_force_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    write(tmp_path, num_nextn_predict_layers=1)
    loading.load(tmp_path, EngineOptions(), {"decay_layer_offset": 1}, 0, lines.append)
    text = "\n".join(lines)
    assert "decay layer offset 1" in text
    assert re.search(r"not used: \d+ tensors, MTP", text)
    assert f"MB from {tmp_path}" in text


# ---- memory


def test_s16_host_memory_is_bounded_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one parameter and one tensor at a time, whatever the model's size."""
    hf_config = changed(
        V2, hidden_size=128, moe_intermediate_size=256, num_experts=8, n_group=2, vocab_size=1999
    )
    write_checkpoint(tmp_path, hf_config, random_tensors(hf_config, 7), dtype="bfloat16")
    # A CPU device may keep numpy's own memory, which would count as the host's.
    nothing = jnp.zeros(0)
    monkeypatch.setattr(jax, "device_put", lambda array: nothing)
    with open_source(tmp_path) as source:
        config = ModelConfig.from_hf(source.config)
        weights = match_released(config, source)
        sizes = [4 * param.size for param in describe(config)]
        tracemalloc.start()
        try:
            load_model(config, RuntimeOptions("float32"), weights, lambda *_: None)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # The check for NaN looks at 2^18 elements at a time.
    bound = 2 * max(sizes) + 2**20
    assert max(sizes) < peak < bound < sum(sizes) / 4


def test_what_is_said_to_be_needed_is_what_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: dict[str, int] = {}
    monkeypatch.setattr(loading.runtime, "check_fits", lambda n, *_: needs.update(n))
    loaded = start(
        write(tmp_path), dtype="bfloat16", state_dtype="float32", max_num_seqs=3, max_model_len=200
    )
    state = allocate(loaded.config, loaded.state_spec)
    assert needs.pop("temporaries") > 0  # an estimate
    assert needs.pop("weights") == sum(array.nbytes for array in parameters(loaded.model).values())
    assert list(needs) == ["recurrent_state", "pages"]
    assert sum(needs.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_config = changed(V2)
    tensors = random_tensors(hf_config, 7)
    tensors["model.norm.weight"][0] = math.nan  # reading would complain of this
    write_checkpoint(tmp_path, hf_config, tensors)
    monkeypatch.setattr(loading.runtime, "memory_bytes", lambda *_: 2**20)
    error = refused(tmp_path, memory_fraction=0.5)
    assert error.exit_code == EXIT_DOES_NOT_FIT
    first, *table = error.message.splitlines()
    assert first.startswith("the model does not fit: ")
    assert first.endswith("GiB allowed (0.5 of 0.00 GiB)")
    assert [line.split()[0] for line in table] == ["weights", "recurrent", "pages", "temporaries"]
    assert "max_num_seqs" in error.hint
    assert "NaN" in refused_with(tmp_path, monkeypatch, memory=2**40).message


def refused_with(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> UserError:
    monkeypatch.setattr(loading.runtime, "memory_bytes", lambda *_: memory)
    return refused(folder)


@pytest.mark.parametrize("spare", [0, -1])
def test_the_limit_is_exact(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.runtime, "memory_bytes", lambda *_: 2 * (700 + spare))
    if spare < 0:
        with pytest.raises(UserError, match="does not fit"):
            loading.runtime.check_fits({"weights": 300, "state": 400}, 0.5)
    else:
        loading.runtime.check_fits({"weights": 300, "state": 400}, 0.5)


def test_a_preset_too_large_for_any_machine_is_refused_at_once() -> None:
    error = refused("Ling-1T", dtype="float32")
    assert error.exit_code == EXIT_DOES_NOT_FIT
    assert re.search(r"weights +37\d\d\.\d\d GiB", error.message)  # 999.7e9 float32
