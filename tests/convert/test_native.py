"""Opening a native folder: everything but the data is checked, and what is wrong is named.

Also the arrays mapped from its files, and the parameters a config wants of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_configs import LINEAR_V2, V2, V2_5
from native_cases import (
    EXTRA,
    assert_same_arrays,
    checkpoint,
    converted,
    drop,
    loaded,
    native_arrays,
    put,
    sha256,
    tree,
    with_manifest,
)
from safetensors.numpy import load_file, save_file

from bailing_jax.errors import EXIT_USAGE, UserError
from convert import native as native_module
from convert.native import check_params, open_native

SOURCE = checkpoint(V2_5, "native").with_tensors({"model.mtp.empty": np.zeros((0, 3), np.int64)})
HEAD, NORM = "head.safetensors", "model.norm.weight"
DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(SOURCE, tmp_path_factory.mktemp("native"))[1]


@pytest.fixture
def native(sound: Path, tmp_path: Path) -> Path:
    """A native folder of the test's own, to be damaged."""
    return shutil.copytree(sound, tmp_path / "native")


def refused(folder: Path, *said: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_native(folder)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.hint
    for text in (str(folder), *said):
        assert text in caught.value.message
    return caught.value


# ---- what is sound


def test_a_sound_folder_opens(native: Path) -> None:
    wanted = native_arrays(SOURCE)
    with open_native(native) as opened:
        assert opened.config == SOURCE.config
        assert opened.extra.keys() == wanted.pop(EXTRA).keys()
        assert opened.params.keys() == {name for arrays in wanted.values() for name in arrays}
        for name, tensor in opened.params.items():
            array = wanted[tensor.info.file.name][name]
            assert (tensor.info.dtype, tensor.info.shape) == (array.dtype, array.shape)
            assert tensor.sha256 == sha256(array)
        router = opened.params["model.layers.1.mlp.gate.weight"]
        assert router.sources == {"model.layers.1.mlp.gate.weight": "bfloat16"}
        assert len(check_params(opened, opened.model_config())) == len(opened.params)


def test_opening_reads_no_payload(native: Path) -> None:
    """R111's other half: data is `verify`'s and the loader's business, and takes minutes."""
    raw = bytearray((native / HEAD).read_bytes())
    raw[-1] ^= 1
    (native / HEAD).write_bytes(raw)
    open_native(native).close()


# ---- the folder


def test_a_folder_without_manifest_says_how_to_make_one(native: Path) -> None:
    (native / "manifest.json").unlink()
    error = refused(native, "has no manifest.json")
    assert "python -m convert hf-to-native" in error.hint
    refused(native / "absent", "has no manifest.json")
    refused(native / HEAD, "has no manifest.json")


def test_another_format_is_refused_by_name(native: Path) -> None:
    with_manifest(native, put("format", value="bailing-jax orbax"))
    assert "hf-to-native" in refused(native, "'bailing-jax orbax'", "'bailing-jax native'").hint
    with_manifest(native, drop("format"))
    refused(native, "got None")


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None, [1]])
def test_another_version_is_refused(native: Path, version: object) -> None:
    with_manifest(native, put("format_version", value=version))
    assert "Convert the checkpoint again" in refused(native, f"format_version {version!r}").hint


@pytest.mark.parametrize("file", ["embed", "layer-001", "head", "extra"])
def test_missing_weight_files_are_named(native: Path, file: str) -> None:
    (native / f"{file}.safetensors").unlink()
    refused(native, f"{file}.safetensors: does not exist")


@pytest.mark.parametrize("name", ["layer-003.safetensors", "model.safetensors"])
def test_a_weight_file_too_many_is_named(native: Path, name: str) -> None:
    """Left over from another conversion, most likely: which of both is the model?"""
    save_file({"w": np.zeros(3, np.float32)}, native / name)
    refused(native, name)


def test_r111_changed_weight_files_are_named(native: Path) -> None:
    path = native / "layer-000.safetensors"
    raw = path.read_bytes()
    swapped = raw.replace(b"gate_proj.w", b"down_proj.w")
    for content in (raw[:-1], raw + b"\0", swapped, raw.replace(b"version 1", b"version 2")):
        assert content != raw
        path.write_bytes(content)
        refused(native, path.name)
    path.write_bytes((native / "layer-001.safetensors").read_bytes())
    refused(native)


def test_two_exchanged_files_are_refused(native: Path) -> None:
    """Files of one length whose headers are sound: layers 1 and 2 differ in names only."""
    one, other = native / "layer-001.safetensors", native / "head.safetensors"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    refused(native, "is not the file manifest.json describes")


def test_a_changed_config_is_refused(native: Path) -> None:
    path = native / "config.json"
    path.write_bytes(path.read_bytes() + b"\n")
    error = refused(native, "config.json", "was changed after the conversion")
    assert "--hf-overrides" in error.hint
    path.unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        open_native(native)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", HEAD])
def test_links_out_of_the_folder_are_not_followed(native: Path, name: str) -> None:
    os.rename(native / name, native.parent / name)
    (native / name).symlink_to(native.parent / name)
    refused(native, f"{name}: is a link that leaves the model folder")


def test_the_manifest_is_strict_json_of_bounded_size(
    native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = native / "manifest.json"
    text = path.read_text(encoding="utf-8")
    for content in (text[:-9], "[]", '{"format": 1, ' + text[1:], text.replace(": 1,", ": NaN,")):
        path.write_text(content, encoding="utf-8")
        refused(native, "the manifest")
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(native_module, "MANIFEST_LIMIT", path.stat().st_size - 1)
    refused(native, "at most")


# ---- the manifest's fields

_WRONG: dict[tuple[str, ...], list[object]] = {
    ("files",): [None, [], "x"],
    ("files", HEAD): [None, [], 7],
    ("files", HEAD, "bytes"): [None, "4096", 4096.0, True],
    ("files", HEAD, "header_sha256"): [None, 3, DIGEST[1:], DIGEST + "0", DIGEST.upper(), [DIGEST]],
    ("files", "LICENSE", "bytes"): [None, "4096", False],
    ("files", "LICENSE", "sha256"): [None, {}, DIGEST[1:], DIGEST + "\n", DIGEST.upper()],
    ("tensors",): [None, [], 1],
    ("tensors", NORM): [None, [], "x"],
    ("tensors", NORM, "sha256"): [None, 3, DIGEST[1:], DIGEST.upper(), {}],
    ("tensors", NORM, "file"): [None, "absent.safetensors", 3, [HEAD], {HEAD: 1}],
    ("tensors", NORM, "sources"): [None, [NORM], NORM],
    ("tensors", NORM, "sources", NORM): [None, "float64", "F32", "", 32, ["float32"], {}],
}
WRONG = [(keys, value) for keys, values in _WRONG.items() for value in values]


@pytest.mark.parametrize(("keys", "value"), WRONG)
def test_fields_of_a_wrong_type_are_named(
    native: Path, keys: tuple[str, ...], value: object
) -> None:
    with_manifest(native, put(*keys, value=value))
    refused(native, f"manifest.json: {'.'.join(keys)} cannot be")


@pytest.mark.parametrize("keys", [keys for keys in _WRONG if keys[-1] not in (HEAD, NORM)])
def test_missing_fields_are_named(native: Path, keys: tuple[str, ...]) -> None:
    with_manifest(native, drop(*keys))
    refused(native, f"manifest.json: {'.'.join(keys)} cannot be None")


def test_the_config_must_be_listed(native: Path) -> None:
    with_manifest(native, drop("files", "config.json"))
    refused(native, "files.config.json")


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../outside", "/etc/passwd", "a/b", "a\\b", "C:a", ".hidden", "a\nb", "a\0b",
        "a\u202eb", "weights.safetensors", "layer-1.safetensors", "x/head.safetensors",
        "../head.safetensors", "Head.safetensors", "layer-١٢٣.safetensors", "head.x/a",
    ],
)  # fmt: skip
def test_names_that_are_no_files_of_a_native_folder_are_refused(native: Path, name: str) -> None:
    entry = {"bytes": 3, "sha256": DIGEST, "header_sha256": DIGEST}
    with_manifest(native, put("files", name, value=entry))
    refused(native, "manifest.json: files cannot be ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("tensors", NORM), (NORM, "is None in the manifest")),
        (put("tensors", NORM, "file", value="embed.safetensors"), (NORM, "embed.safetensors")),
        (put("tensors", NORM, "file", value="config.json"), (NORM, "config.json")),
        (put("tensors", NORM, "dtype", value="float32"), (NORM, "'float32'", "'bfloat16'")),
        (put("tensors", NORM, "dtype", value=["bfloat16"]), (NORM,)),
        (drop("tensors", NORM, "dtype"), (NORM,)),
        (put("tensors", NORM, "shape", value=[1, 56]), (NORM, "[1, 56]", "[56]")),
        (put("tensors", NORM, "shape", value=None), (NORM,)),
        (put("files", HEAD, "bytes", value=4096), (HEAD, "expected 4096")),
        (put("files", HEAD, "header_sha256", value=DIGEST), (HEAD, DIGEST[:12])),
        (drop("files", EXTRA), ("tensors.model.", ".file cannot be 'extra.safetensors'")),
    ],
)
def test_entries_that_are_not_the_files_are_named(
    native: Path, change: Callable[[Any], object], said: tuple[str, ...]
) -> None:
    with_manifest(native, change)
    refused(native, *said)


def test_a_tensor_listed_but_in_no_file_is_named(native: Path) -> None:
    entry = {"file": HEAD, "dtype": "float32", "shape": [3], "sha256": DIGEST, "sources": {}}
    with_manifest(native, put("tensors", "model.more", value=entry))
    refused(native, "'model.more'", "None in the files")


# ---- mapped arrays


def test_mapped_arrays_are_the_files_own_and_read_only(native: Path) -> None:
    wanted = loaded(native)
    with open_native(native) as opened:
        mapped = {name: opened.map(name) for name in wanted}
        assert_same_arrays(mapped, wanted)
        for name, array in mapped.items():
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
            assert array.nbytes % 64 or array.ctypes.data % 64 == 0
            # No copy: the same pages are there a second time.
            assert opened.map(name).ctypes.data == array.ctypes.data
        with pytest.raises(KeyError):
            opened.map("absent")
    assert_same_arrays(mapped, wanted)


def test_mapped_arrays_outlive_the_folder_on_disk(native: Path) -> None:
    opened = open_native(native)
    array = opened.map(NORM)
    opened.close()
    opened.close()
    wanted = load_file(native / HEAD)[NORM]
    shutil.rmtree(native)
    np.testing.assert_array_equal(array, wanted)


def test_a_file_changed_after_opening_is_not_mapped(native: Path) -> None:
    with open_native(native) as opened:
        (native / HEAD).write_bytes((native / HEAD).read_bytes() + b"\0")
        with pytest.raises(UserError, match="changed while being read"):
            opened.map(NORM)


# ---- what the model wants


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"hidden_size": 64}, ("model.word_embeddings.weight: got (97, 56), want (97, 64)",)),
        ({"vocab_size": 96}, ("2 tensors", "got (97, 56), want (96, 56)")),
        ({"num_experts": 6}, ("mlp.gate.weight: got (56, 4), want (56, 6)",)),
        ({"num_hidden_layers": 4}, ("model.layers.3.", "got nothing")),
        ({"num_hidden_layers": 2}, ("model.layers.", "got nothing")),
        ({"tie_word_embeddings": True}, ("1 tensors", "lm_head.weight: got (56, 97)", "nothing")),
        ({"use_qkv_bias": True}, ("bias: got nothing, want",)),
    ],
)
def test_overrides_that_change_a_shape_are_refused_by_parameter(
    native: Path, overrides: dict[str, object], said: tuple[str, ...]
) -> None:
    with open_native(native) as opened:
        config = opened.model_config(overrides)
        with pytest.raises(UserError) as caught:
            check_params(opened, config)
    assert caught.value.exit_code == EXIT_USAGE
    assert "overrides" in caught.value.hint
    for text in ("do not fit the config", *said):
        assert text in caught.value.message


def test_overrides_that_change_no_shape_are_welcome(native: Path) -> None:
    with open_native(native) as opened:
        config = opened.model_config({"rope_theta": 10_000.0, "decay_layer_offset": 1})
        assert config.decay_layer_offset == 1
        assert {param.path for param in check_params(opened, config)} == opened.params.keys()


@pytest.mark.parametrize("architecture", [V2, LINEAR_V2])
def test_opening_writes_nothing(tmp_path: Path, architecture: str) -> None:
    _, folder = converted(checkpoint(architecture, "untouched"), tmp_path)
    before = tree(folder)
    with open_native(folder) as opened:
        assert opened.map(NORM).shape == (56,)
    assert tree(folder) == before
