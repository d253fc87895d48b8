"""Hugging Face -> native -> Hugging Face, as a user runs it, on fresh random checkpoints.

What returns is what went in: every tensor bit for bit with its name and dtype, config.json and
side files byte for byte. In between lies what an independent construction makes of the
checkpoint, in the files and at the offsets the format promises. The same folders come out twice,
and with any number of workers. (S10: each element of a parameter is written once.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_configs import LINEAR_V2, V2, V2_5
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import (
    ALIGNMENT,
    BFLOAT16,
    EXAMPLES,
    EXTRA,
    PAGE,
    SIDE_FILES,
    Checkpoint,
    assert_same_arrays,
    checkpoint,
    convert,
    converted,
    draw_checkpoint,
    is_extra,
    loaded,
    native_arrays,
    restored,
    sha256,
    tree,
)
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_tokenizer import write_tiny_tokenizer

from bailing_jax.config import ModelConfig
from convert import mapping, output_folder, to_hf, to_native
from convert import native as native_format
from convert.__main__ import main

# A drawn YaRN factor may contradict the drawn length; that is test_config_rope's business.
pytestmark = pytest.mark.filterwarnings("ignore::bailing_jax.config.ConfigWarning")

FEW = settings(EXAMPLES, max_examples=8)
# The tensors of tiny models are smaller than one slab, unless slabs are tiny too.
SLABS = st.sampled_from([512, 3000, mapping.SLAB_BYTES])


@contextmanager
def slabs(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (mapping, native_format, to_native):
            patch.setattr(module, "SLAB_BYTES", size)
        yield


@pytest.fixture
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a folder of its own for every example of a test."""
    return lambda: tmp_path_factory.mktemp("example")


def manifest(native: Path) -> dict[str, Any]:
    return json.loads((native / "manifest.json").read_text(encoding="utf-8"))


def own_config(source: Checkpoint, **overrides: object) -> ModelConfig:
    return ModelConfig.from_hf(source.config, overrides)


# ---- there and back


@settings(EXAMPLES, max_examples=40)
@given(source=draw_checkpoint(), slab=SLABS)
def test_s10_every_bit_returns(source: Checkpoint, slab: int, new_folder: Any) -> None:
    with slabs(slab):
        folder, native = converted(source, new_folder())
        back = restored(native)
    assert_same_arrays(loaded(back), source.tensors)
    small = {"config.json": (folder / "config.json").read_bytes(), **SIDE_FILES}
    files = tree(back)
    del files["model.safetensors"]
    assert files == small
    assert {name: tree(native)[name] for name in small} == small


@FEW
@given(source=draw_checkpoint(("bfloat16", "float16", "mixed")), slab=SLABS)
def test_widened_weights_return_in_their_own_dtype(
    source: Checkpoint, slab: int, new_folder: Any
) -> None:
    with slabs(slab):
        _, native = converted(source, new_folder(), "--dtype", "float32")
        assert_same_arrays(loaded(restored(native)), source.tensors)
    for name, arrays in native_arrays(source, "float32").items():
        assert_same_arrays(load_file(native / name), arrays)
        assert name == EXTRA or {array.dtype for array in arrays.values()} == {np.dtype("float32")}


def rounded(values: np.ndarray) -> np.ndarray:
    """To bfloat16 as IEEE 754 rounds to nearest, ties to even: on the bits, with carries."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(BFLOAT16)


@FEW
@given(source=draw_checkpoint(("float32", "float32", "mixed")), slab=SLABS)
def test_narrowed_weights_are_the_nearest_and_the_router_stays(
    source: Checkpoint, slab: int, new_folder: Any
) -> None:
    router = (".gate.weight", "expert_bias", "score_correction_bias")
    wanted = {
        name: tensor if is_extra(source, name) or name.endswith(router) else rounded(tensor)
        for name, tensor in source.tensors.items()
    }
    with slabs(slab):
        _, native = converted(source, new_folder(), "--dtype", "bfloat16")
        assert_same_arrays(loaded(restored(native)), wanted)
    for name, tensor in loaded(native).items():
        if not is_extra(source, name):
            assert (tensor.dtype == np.float32) == (".mlp.gate." in name), name
            assert tensor.dtype in (np.float32, BFLOAT16)


def test_ties_are_rounded_to_even(tmp_path: Path) -> None:
    """The last kept bit odd and even, exact ties and their neighbours, both signs."""
    source = checkpoint(V2, "ties")
    low = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_7FFF, 0x3F80_8001, 0x3FFF_8000], np.uint32)
    ties = np.resize(np.concatenate([low, low | 0x8000_0000]), 56).view(np.float32)
    source = source.with_tensors({"model.norm.weight": ties})
    _, native = converted(source, tmp_path, "--dtype", "bfloat16")
    found = load_file(native / "head.safetensors")["model.norm.weight"].view(np.uint16)
    want = [0x3F80, 0x3F82, 0x3F80, 0x3F81, 0x4000]
    assert found[:10].tolist() == want + [bits | 0x8000 for bits in want]


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("there", [True, False])
def test_an_absent_bias_is_zero_and_stays_absent(tmp_path: Path, there: bool, dtype: str) -> None:
    source = checkpoint(V2_5, "bias", use_qkv_bias=True)
    name = "model.layers.2.attention.kv_a_proj_with_mqa.bias"
    assert name not in source.tensors
    values = np.linspace(-1, 1, 39).astype(BFLOAT16)
    source = source.with_tensors({name: values}) if there else source
    _, native = converted(source, tmp_path, "--dtype", dtype)
    found = load_file(native / "layer-002.safetensors")[name]
    assert found.dtype == (BFLOAT16 if there or dtype == "bfloat16" else np.float32)
    np.testing.assert_array_equal(found, values if there else np.zeros(39))
    assert_same_arrays(loaded(restored(native)), source.tensors)


def test_a_tokenizer_is_copied_both_ways(tmp_path: Path) -> None:
    source = checkpoint(LINEAR_V2, "tokenizer", vocab_size=320)
    folder = source.write(tmp_path / "hf")
    write_tiny_tokenizer(folder)
    convert("hf-to-native", folder, tmp_path / "native")
    back = restored(tmp_path / "native")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        content = (folder / name).read_bytes()
        assert content == (tmp_path / "native" / name).read_bytes() == (back / name).read_bytes()
        assert manifest(tmp_path / "native")["files"][name]["sha256"] == sha256(content)


# ---- what lies in between


@EXAMPLES
@given(source=draw_checkpoint(), slab=SLABS)
def test_s10_parameters_are_those_of_an_independent_construction(
    source: Checkpoint, slab: int, new_folder: Any
) -> None:
    """Also: every tensor in the file it belongs in, and no file but those documented."""
    with slabs(slab):
        _, native = converted(source, new_folder())
    wanted = native_arrays(source)
    layers = {f"layer-{i:03d}" for i in range(source.config["num_hidden_layers"])}
    has_extra = any(is_extra(source, name) for name in source.tensors)
    names = {"embed", "head", *layers} | ({"extra"} if has_extra else set())
    assert {f"{name}.safetensors" for name in names} == wanted.keys()
    assert set(tree(native)) == {*wanted, *SIDE_FILES, "config.json", "manifest.json"}
    for name, arrays in wanted.items():
        assert_same_arrays(load_file(native / name), arrays)


@EXAMPLES
@given(source=draw_checkpoint())
def test_data_begins_at_a_page_and_tensors_at_cache_lines(
    source: Checkpoint, new_folder: Any
) -> None:
    _, native = converted(source, new_folder())
    for file in native.glob("*.safetensors"):
        raw = file.read_bytes()
        data = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:data])
        assert data % PAGE == 0
        assert header.pop("__metadata__") == {"layout": "bailing-jax native, version 1"}
        for entry in header.values():
            start, end = entry["data_offsets"]
            assert (end - start) % ALIGNMENT or (data + start) % ALIGNMENT == 0
        with safe_open(file, "np") as opened:
            assert set(opened.keys()) == set(header)
            for name in header:
                array = opened.get_tensor(name)
                start, end = header[name]["data_offsets"]
                assert array.tobytes() == raw[data + start : data + end]


@EXAMPLES
@given(source=draw_checkpoint())
def test_the_manifest_describes_every_file_and_tensor(
    source: Checkpoint, new_folder: Any
) -> None:
    folder, native = converted(source, new_folder())
    found, files = manifest(native), tree(native)
    assert found["files"].keys() == files.keys() - {"manifest.json"}
    for name, entry in found["files"].items():
        raw = files[name]
        end = 8 + int.from_bytes(raw[:8], "little")
        weights = name.endswith(".safetensors")
        digest = {"header_sha256": sha256(raw[8:end])} if weights else {"sha256": sha256(raw)}
        assert entry == {"bytes": len(raw), **digest}
    used: dict[str, str] = {}
    arrays = native_arrays(source)
    assert found["tensors"].keys() == {name for part in arrays.values() for name in part}
    for file, part in arrays.items():
        for name, array in part.items():
            entry = found["tensors"][name]
            used |= entry.pop("sources")
            described = {"dtype": str(array.dtype), "shape": list(array.shape)}
            assert entry == {"file": file, "sha256": sha256(array), **described}
    own = {n: str(t.dtype) for n, t in source.tensors.items() if not is_extra(source, n)}
    assert used == own
    assert found["config"] == source.config
    assert found["source"]["folder"] == str(folder)
    assert set(found["source"]["files"]) == {file.name for file in folder.glob("*.safetensors")}
    config = own_config(source)
    assert found["architecture"] == config.architecture
    assert found["decay_layer_offset"] == (config.lightning and config.decay_layer_offset)


# ---- the decay offset


@pytest.mark.parametrize("said", [None, 0, 1])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("architecture", [LINEAR_V2, V2_5])
def test_the_decay_offset_is_written_to_the_config_and_returns(
    tmp_path: Path, architecture: str, offset: int, said: int | None
) -> None:
    changes = {} if said is None else {"decay_layer_offset": said}
    source = checkpoint(architecture, "decay", **changes)
    folder, native = converted(source, tmp_path, "--decay-layer-offset", str(offset))
    config = (native / "config.json").read_bytes()
    # As text: the other keys keep their values, types and places.
    wanted = json.dumps({**source.config, "decay_layer_offset": offset})
    assert json.dumps(json.loads(config)) == wanted
    assert (config == (folder / "config.json").read_bytes()) == (said == offset)
    assert manifest(native)["decay_layer_offset"] == offset
    assert manifest(native)["config"] == json.loads(config)
    back = restored(native)
    assert (back / "config.json").read_bytes() == config
    assert ModelConfig.from_hf(json.loads(config)).decay_layer_offset == offset
    assert_same_arrays(loaded(back), source.tensors)


@pytest.mark.parametrize("offset", ["0", "1"])
def test_a_model_without_decay_has_no_decay_offset(
    tmp_path: Path, offset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(V2, "no decay").write(tmp_path / "hf")
    args = ["hf-to-native", str(folder), str(tmp_path / "native")]
    assert main([*args, "--decay-layer-offset", offset]) == 2
    assert "has no lightning attention and so no decay" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert main(args) == 0
    assert manifest(tmp_path / "native")["decay_layer_offset"] is None


# ---- again, and with other workers


@FEW
@given(source=draw_checkpoint())
def test_conversions_are_reproducible_with_any_number_of_workers(
    source: Checkpoint, new_folder: Any
) -> None:
    place = new_folder()
    folder, native = converted(source, place, "--workers", "1")
    wanted = tree(native)
    for name, workers in (("again", "1"), ("five", "5")):
        convert("hf-to-native", folder, place / name, "--workers", workers)
        assert tree(place / name) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_hf, "SHARD_BYTES", max(source.nbytes // 6, 1))
        convert("native-to-hf", native, place / "one", "--workers", "1")
        convert("native-to-hf", native, place / "more", "--workers", "5")
    assert tree(place / "one") == tree(place / "more")


@FEW
@given(source=draw_checkpoint(), part=st.sampled_from([3, 7, 10**6]))
def test_shards_and_their_index(source: Checkpoint, part: int, new_folder: Any) -> None:
    """With a limit of nearly nothing, every tensor gets a shard of its own."""
    place = new_folder()
    _, native = converted(source, place)
    limit = max(source.nbytes // part, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_hf, "SHARD_BYTES", limit)
        back = restored(native)
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    held = {name: load_file(back / name) for name in shards}
    for tensors in held.values():
        # A single tensor may be larger than a shard should be; those of no size go with any.
        sizes = [tensor.nbytes for tensor in tensors.values() if tensor.nbytes]
        assert sum(sizes) <= limit or len(sizes) == 1
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": source.nbytes}
    assert index["weight_map"] == {name: file for file in shards for name in held[file]}
    assert_same_arrays(loaded(back), source.tensors)
    convert("hf-to-native", back, place / "second")
    first, second = manifest(native), manifest(place / "second")
    assert first["tensors"] == second["tensors"]
    assert first["files"] == second["files"]


@FEW
@given(source=draw_checkpoint(("mixed",)))
def test_restored_tensors_are_aligned_to_their_elements(
    source: Checkpoint, new_folder: Any
) -> None:
    _, native = converted(source, new_folder())
    file = restored(native) / "model.safetensors"
    raw = file.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data])
    digest = sha256((native / "manifest.json").read_bytes())
    assert header.pop("__metadata__") == {"format": "pt", "native_manifest_sha256": digest}
    for name, entry in header.items():
        assert (data + entry["data_offsets"][0]) % source.tensors[name].dtype.itemsize == 0


# ---- whole or not at all


def test_s11_the_folder_appears_with_its_manifest_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    finish = output_folder.OutputFolder.finish

    def watched(folder: output_folder.OutputFolder, name: str, record: Any) -> None:
        assert not folder.path.exists()
        finish(folder, name, record)
        written.append(name)

    monkeypatch.setattr(output_folder.OutputFolder, "finish", watched)
    _, native = converted(checkpoint(V2_5, "last", shards=3), tmp_path, "--workers", "3")
    assert written[-1] == "manifest.json"
    assert sorted(written) == sorted(tree(native))
    weights = [name.endswith(".safetensors") for name in written]
    assert weights == sorted(weights, reverse=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


@pytest.mark.parametrize("architecture", [V2, LINEAR_V2, V2_5])
def test_r110_a_missing_tensor_is_named_and_nothing_written(
    tmp_path: Path, architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(architecture, "missing")
    used = sorted(name for name in source.tensors if not is_extra(source, name))
    for number, name in enumerate(used[:: math.ceil(len(used) / 9)]):
        rest = {other: tensor for other, tensor in source.tensors.items() if other != name}
        folder = Checkpoint(source.config, rest).write(tmp_path / f"hf{number}")
        assert main(["hf-to-native", str(folder), str(tmp_path / "native")]) == 2
        assert f"missing: 1 x {name.partition('.layers.')[0]}" in (err := capsys.readouterr().err)
        assert f"e.g. {name}\n" in err
        assert {path.name[:2] for path in tmp_path.iterdir()} == {"hf"}
