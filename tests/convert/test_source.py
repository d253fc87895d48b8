"""A checkpoint folder: rows S07 and S09, and what a released folder may look like."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors_bytes import (
    FLOATS,
    POINTER,
    entry,
    pack,
    source_refused,
    write,
    write_sharded,
)

from bailing_jax.errors import EXIT_USAGE, UserError
from convert.safetensors_file import DTYPES, SafetensorsFile, read_header
from convert.source import (
    INDEX_NAME,
    CheckpointSource,
    check_contained,
    open_source,
    read_json,
)
from convert.values import count_not_finite

# ---------------------------------------------------------------- S07: the folder and its index


def test_a_single_file_is_a_checkpoint(folder: Path) -> None:
    expected = np.arange(12, dtype=np.float16).reshape(3, 4)
    save_file({"w": expected}, folder / "anything.safetensors")
    with open_source(folder) as source:
        assert isinstance(source, CheckpointSource)
        assert (source.folder, source.config) == (folder, {"num_hidden_layers": 3})
        assert list(source.headers) == ["anything.safetensors"]
        np.testing.assert_array_equal(source.read("w"), expected)
        out = np.empty((3, 4), np.float16)
        source.read_into("w", out)
        np.testing.assert_array_equal(out, expected)
        with pytest.raises(KeyError):
            source.read("absent")
    with pytest.raises(ValueError, match="closed"):
        source.read("w")
    source.close()


def test_a_sharded_checkpoint_reads_every_tensor_and_writes_nothing(folder: Path) -> None:
    tensors = write_sharded(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with open_source(folder) as source:
        assert set(source.tensors) == set(tensors)
        assert set(source.headers) == {"m-1.safetensors", "m-2.safetensors"}
        for name, expected in tensors.items():
            assert source.tensors[name].file.parent == folder
            np.testing.assert_array_equal(source.read(name), expected)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_missing_folders_and_files_given_as_folders_are_refused(tmp_path: Path) -> None:
    source_refused(tmp_path / "absent", "absent", "not a readable folder", "config.json")
    source_refused(write(tmp_path / "file", b""), "not a readable folder")


def test_a_folder_without_config_names_the_subfolder_that_has_one(folder: Path) -> None:
    error = source_refused(folder.parent, "has no config.json")
    assert str(folder) in error.hint
    (folder.parent / "second").mkdir()
    (folder.parent / "second" / "config.json").write_text("{}")
    assert str(folder) not in source_refused(folder.parent, "has no config.json").hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN"),
        (POINTER, "Git LFS pointer"),
        ('{"a": ' + " " * (16 * 2**20) + "1}", "at most 16777216"),
    ],
)
def test_s08_config_is_one_strict_json_object(folder: Path, content: str, said: str) -> None:
    (folder / "config.json").write_text(content)
    source_refused(folder, "config.json", said)


def test_read_json_names_the_kind_of_file(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]')
    with pytest.raises(UserError, match="the generation config is not valid JSON"):
        read_json(folder / "generation_config.json", "the generation config")
    with pytest.raises(UserError, match="does not exist"):
        read_json(folder / "absent.json", "the generation config")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_s08_other_formats_are_never_opened(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x04.")
    (folder / name).chmod(0)
    source_refused(folder, name, "Only safetensors are read; nothing pickled is ever opened")


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    source_refused(folder, "has no safetensors file")
    save_file({}, folder / "model.safetensors")
    source_refused(folder, "hold no tensor")


def test_s07_several_files_without_an_index_are_refused(folder: Path) -> None:
    for name in ("model", "adapter"):
        save_file({"w": np.zeros(1, np.uint8)}, folder / f"{name}.safetensors")
    source_refused(folder, "2 safetensors files", "adapter.safetensors", f"no {INDEX_NAME}")


def test_s07_missing_shards_are_listed(folder: Path) -> None:
    write_sharded(folder)
    (folder / "m-2.safetensors").unlink()
    source_refused(folder, "1 shard ('m-2.safetensors') of the 2", "missing")
    (folder / "m-1.safetensors").unlink()
    source_refused(folder, "2 shards ('m-1.safetensors', 'm-2.safetensors') of the 2", "missing")
    many = {f"t{i}": f"s{i:02}.safetensors" for i in range(30)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": many}))
    source_refused(folder, "30 shards", "and 22 more")


def test_s07_extra_shards_are_listed(folder: Path) -> None:
    write_sharded(folder)
    save_file({"d": np.zeros(2, np.uint8)}, folder / "model.safetensors")
    source_refused(folder, f"1 safetensors file ('model.safetensors') not in {INDEX_NAME}")


def test_s07_an_index_must_list_the_tensors_of_its_shards(folder: Path) -> None:
    one, two = "m-1.safetensors", "m-2.safetensors"
    write_sharded(folder, {"a": one, "c": two})
    source_refused(folder, "1 tensor (e.g. 'b') in a shard but not in the index")
    write_sharded(folder, {"a": one, "b": one, "c": two, "d": two, "e": two})
    source_refused(folder, "2 tensors (e.g. 'd') in the index but in no shard")
    write_sharded(folder, {"a": one, "x": one, "c": two})
    source_refused(folder, "1 tensor (e.g. 'x') in the index", "1 tensor (e.g. 'b') in a shard")
    write_sharded(folder, {"a": one, "b": two, "c": two})
    source_refused(folder, "1 tensor (e.g. 'b') in another shard than the index says")


def test_s07_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    write_sharded(folder)
    save_file({"a": np.zeros(3), "c": np.zeros(7)}, folder / "m-2.safetensors")
    source_refused(folder, "1 tensor (e.g. 'a') both in m-1.safetensors and in m-2.safetensors")


SHARD_NAMES = [
    "../m-1.safetensors",
    "sub/m-1.safetensors",
    "/etc/m-1.safetensors",
    "sub\\m-1.safetensors",
    "C:m-1.safetensors",
    "m-1\0.safetensors",
    "m-1\n.safetensors",
    "m-1\ud800.safetensors",
    "..",
    ".",
    "",
    "m-1.bin",
    None,
    1,
    ["m-1.safetensors"],
]


@pytest.mark.parametrize("name", SHARD_NAMES, ids=ascii)
def test_s07_shard_names_are_plain_file_names(folder: Path, name: object) -> None:
    write_sharded(folder, {"a": name, "c": "m-2.safetensors"})
    source_refused(folder, "weight_map 'a'", "must be the name of a .safetensors file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "non-empty object"),
        ('{"weight_map": []}', "non-empty object"),
        ('{"weight_map": {}}', "non-empty object"),
        ('{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}', "'a' appears twice"),
        (POINTER, "Git LFS pointer"),
    ],
)
def test_s07_a_malformed_index_is_refused(folder: Path, content: str, said: str) -> None:
    write_sharded(folder)
    (folder / INDEX_NAME).write_text(content)
    source_refused(folder, INDEX_NAME, said)


def test_s07_a_damaged_shard_is_named(folder: Path) -> None:
    write_sharded(folder)
    shard = folder / "m-2.safetensors"
    write(shard, shard.read_bytes()[:-1])
    source_refused(folder, str(shard), "truncated")


def test_lfs_pointers_say_what_to_run(folder: Path) -> None:
    (folder / "model.safetensors").write_text(POINTER)
    source_refused(folder, "model.safetensors", "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_s07_only_ordinary_files_are_opened(folder: Path, kind: str) -> None:
    path = folder / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not an ordinary file"):
        read_header(path)
    source_refused(folder, "leaves the model folder" if kind == "device" else "not an ordinary")


# ---------------------------------------------------------------- S07: symlinks


def write_hub_cache(tmp_path: Path) -> Path:
    """A repository in the layout of the Hugging Face cache; its snapshot folder."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "c0").write_text("{}")
    save_file({"w": np.arange(3, dtype=np.uint8)}, repository / "blobs" / "d1")
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    (snapshot / "model.safetensors").symlink_to("../../blobs/d1")
    return snapshot


def test_s07_the_hub_cache_is_read(tmp_path: Path) -> None:
    snapshot = write_hub_cache(tmp_path)
    (tmp_path / "shortcut").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "shortcut"):
        with open_source(folder) as source:
            assert source.read("w").tolist() == [0, 1, 2]
            assert source.tensors["w"].file == folder / "model.safetensors"
    error = source_refused(snapshot.parents[1], "has no config.json")
    assert str(snapshot) in error.hint


def test_s07_links_inside_the_folder_are_read(folder: Path) -> None:
    (folder / "parts").mkdir()
    save_file({"w": np.arange(3, dtype=np.uint8)}, folder / "parts" / "one")
    (folder / "model.safetensors").symlink_to("parts/one")
    with open_source(folder) as source:
        assert source.read("w").tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("place", ["outside", "blobs_of_another_repository", "folder_like_it"])
def test_s07_links_out_of_the_folder_are_refused(tmp_path: Path, name: str, place: str) -> None:
    snapshot = write_hub_cache(tmp_path)
    target = {
        "outside": tmp_path / "secret",
        "blobs_of_another_repository": tmp_path / "hub" / "models--evil" / "blobs" / "d1",
        "folder_like_it": snapshot.parent / (snapshot.name + "-more") / "d1",
    }[place]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((snapshot / name).read_bytes())
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(target)
    source_refused(snapshot, name, "leaves the model folder", str(target))


def test_s07_a_blob_that_is_a_link_itself_is_refused(tmp_path: Path) -> None:
    snapshot = write_hub_cache(tmp_path)
    blob = snapshot.parents[1] / "blobs" / "d1"
    blob.rename(tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")
    source_refused(snapshot, "leaves the model folder")


def test_s07_broken_links_and_loops_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("absent")
    source_refused(folder, "model.safetensors", "broken link")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    source_refused(folder, "model.safetensors", "broken link")
    check_contained(folder / "config.json")


# ---------------------------------------------------------------- S09: values


@pytest.mark.parametrize("name", FLOATS)
def test_s09_not_finite_is_what_the_dtype_says(name: str) -> None:
    dtype = DTYPES[name]
    if dtype.itemsize <= 2:  # every value there is
        bits = np.arange(2 ** (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")
    else:
        special = np.array([0, -0.0, 1, np.nan, -np.nan, np.inf, -np.inf], dtype)
        extremes = np.array([np.finfo(dtype).max, np.finfo(dtype).tiny, 5e-324], dtype)
        bits = np.concatenate([special, extremes]).view(f"u{dtype.itemsize}")
    values = bits.view(dtype)
    with np.errstate(invalid="ignore"):  # a signalling NaN, cast
        expected = ~np.isfinite(values.astype(np.float64))
    assert 0 < expected.sum() < expected.size
    assert count_not_finite(values) == (expected.sum(), int(expected.argmax()))
    finite = values[~expected]
    assert count_not_finite(finite) == (0, -1)


def test_s09_every_float_dtype_is_checked() -> None:
    assert len(FLOATS) == 9
    for name, dtype in DTYPES.items():
        assert count_not_finite(np.zeros(3, dtype)) == (0, -1), name
    assert count_not_finite(np.full(3, -1, np.int8)) == (0, -1)


def test_s09_the_first_of_several_blocks_is_found() -> None:
    values = np.zeros(2**18 * 2 + 3, ml_dtypes.bfloat16)
    values[[2**18 + 5, 2**18 * 2 + 1, 2**18 * 2 + 2]] = np.nan
    assert count_not_finite(values) == (3, 2**18 + 5)


def test_s09_read_finite_names_file_tensor_count_and_index(folder: Path) -> None:
    good = np.arange(6, dtype=np.float32).reshape(2, 3)
    bad = good.copy()
    bad[1, 0], bad[1, 2] = np.inf, np.nan
    scalar = np.array(np.nan, np.float16)
    counts = np.array([-1, 7])
    save_file(
        {"good": good, "bad": bad, "scalar": scalar, "counts": counts},
        folder / "model.safetensors",
    )
    with open_source(folder) as source:
        np.testing.assert_array_equal(source.read_finite("good"), good)
        np.testing.assert_array_equal(source.read_finite("counts"), counts)
        np.testing.assert_array_equal(source.read("bad"), bad)
        with pytest.raises(
            UserError, match=r"'bad' has 2 NaN .* of 6, the first at .*\(1, 0\)"
        ) as e:
            source.read_finite("bad")
        assert str(folder / "model.safetensors") in e.value.message
        assert e.value.exit_code == EXIT_USAGE
        with pytest.raises(UserError, match=r"'scalar' has 1 NaN .* at index \(\)"):
            source.read_finite("scalar")


def test_s09_bools_are_zero_or_one(file: Path) -> None:
    header = read_header(write(file, pack(entry(dtype="BOOL"), b"\0\1\2\0")))
    with SafetensorsFile(header) as opened, pytest.raises(UserError, match="byte 2"):
        opened.read("w")


# ---------------------------------------------------------------- whatever the bytes
