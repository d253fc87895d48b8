"""Damaged native folders: every flipped bit is noticed, and no command reads on.

A byte of the weights that differs is found by `verify` and by `native-to-hf`, which name the
tensor. Whatever else of the folder differs is refused too; nothing is left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corruptions import CONFIG, CONFIGS, by_offset, read_shard, write_sound
from refusals import Run, refusal_problems, run, snapshot

from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE

MANIFEST = "manifest.json"
BOTH = ("verify", "native-to-hf")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of a tiny conversion's time, and no subject of these tests."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


class Native:
    """A converted checkpoint, and a copy of it to be damaged."""

    def __init__(self, root: Path, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self.source, self.sound = root / "source", root / "sound"
        self.folder, self.output = root / "native", root / "out" / "hf"
        self.outside = root / "outside"
        write_sound(self.source, checkpoint)
        done = run("hf-to-native", self.source, self.sound, "--quiet")
        assert done.code == EXIT_OK, done
        self.weights = sorted(path.name for path in self.sound.glob("*.safetensors"))

    def copy(self) -> Path:
        """A fresh copy; the output's folder is empty."""
        for folder in (self.folder, self.output.parent, self.outside):
            shutil.rmtree(folder, ignore_errors=True)
        self.output.parent.mkdir()
        self.outside.mkdir()
        return shutil.copytree(self.sound, self.folder)

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers of a test's own, for this checkpoint."""
        return np.random.default_rng(zlib.crc32(f"{name} {self.checkpoint}".encode()))

    def run(self, command: str) -> Run:
        """Verify the folder, or restore the Hugging Face checkpoint from it."""
        output = [self.output] if command == "native-to-hf" else []
        return run(command, self.folder, *output, "--quiet")

    def problems(self, command: str, *said: str, one_of: Iterable[str] = ("",)) -> list[str]:
        """What is wrong with how a command refuses the folder; it must say all and `one_of`."""
        before = snapshot(self.folder)
        done = self.run(command)
        verdict = f"{self.folder}: native, "
        found_bad = command == "verify" and done.code == EXIT_FAILURE
        if found_bad and done.stdout.startswith(verdict) and "NOT sound" in done.stdout:
            done = done._replace(stdout="")
        found = refusal_problems(done, EXIT_FAILURE if found_bad else EXIT_USAGE, said)
        found += [f"left {path.name}" for path in self.output.parent.iterdir()]
        if not any(text in done.stderr for text in one_of):
            found.append(f"says none of {list(one_of)}")
        if snapshot(self.folder) != before:
            found.append("the folder was written to")
        return [f"{command}: {problem}\n{done.stderr[:1000]}" for problem in found]


@pytest.fixture(scope="module", params=CONFIGS)
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(tmp_path_factory.mktemp("native"), request.param)


def flip(path: Path, at: int, bit: int) -> None:
    """Flip a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def payload(path: Path) -> Iterator[tuple[str, int, int]]:
    """Each tensor of a file with where its bytes begin and end."""
    header, data = read_shard(path)
    start = path.stat().st_size - len(data)
    for name in by_offset(header):
        first, last = header[name]["data_offsets"]
        yield name, start + first, start + last


def test_sound_folders_pass(native: Native) -> None:
    native.copy()
    for command in BOTH:
        done = native.run(command)
        assert (done.code, done.stderr, done.raised) == (EXIT_OK, "", ""), done
    assert [path.name for path in native.output.parent.iterdir()] == ["hf"]


def test_r111_a_flipped_bit_in_any_tensor_is_noticed(native: Native) -> None:
    """At a random place of every tensor there is: none is accepted."""
    rng, folder = native.rng("flips"), native.copy()
    weights = [folder / file for file in native.weights]
    places = [(path, *place) for path in weights for place in payload(path)]
    problems = []
    for path, name, start, end in places:
        at, bit = int(rng.integers(start, end)), int(rng.integers(8))
        flip(path, at, bit)
        for command in BOTH:
            problems += native.problems(command, str(path), repr(name))
        flip(path, at, bit)
    assert problems == []
    assert len(places) > 40
    assert native.run("verify").code == EXIT_OK


def test_a_flipped_bit_in_any_header_is_refused(native: Native) -> None:
    """In the length, the JSON and the padding."""
    rng, folder = native.rng("headers"), native.copy()
    problems = []
    for path in (folder / file for file in native.weights):
        header, data = read_shard(path)
        size, text = path.stat().st_size - len(data), len(json.dumps(header))
        for low, high in ((0, 8), (8, text), (8, text), (text, size)):
            at, bit = int(rng.integers(low, high)), int(rng.integers(8))
            flip(path, at, bit)
            problems += [p for command in BOTH for p in native.problems(command, str(path))]
            flip(path, at, bit)
    assert problems == []


def test_weights_of_another_conversion_are_not_taken_for_these(
    native: Native, tmp_path: Path
) -> None:
    """Same names, same shapes, same sizes: only the sha256 tell."""
    folder = native.copy()
    write_sound(tmp_path / "source", native.checkpoint, seed=2)
    assert run("hf-to-native", tmp_path / "source", tmp_path / "other").code == EXIT_OK
    for file in native.weights:
        shutil.copy(tmp_path / "other" / file, folder / file)
        first = min(name for name, _, _ in payload(folder / file))
        assert native.problems("verify", str(folder / file), repr(first)) == []
        shutil.copy(native.sound / file, folder / file)


def test_equal_tensors_in_each_others_place_are_noticed(native: Native) -> None:
    folder = native.copy()
    exchanged = 0
    for path in (folder / file for file in native.weights):
        places = sorted(payload(path), key=lambda place: place[2] - place[1])
        for (one, a, b), (other, c, d) in pairwise(places):
            if b - a == d - c:
                content = bytearray(path.read_bytes())
                content[a:b], content[c:d] = content[c:d], content[a:b]
                path.write_bytes(content)
                assert native.problems("verify", str(path), repr(one), repr(other)) == []
                shutil.copy(native.sound / path.name, path)
                exchanged += 1
    assert exchanged > 3


# ---------------------------------------------------------------- whole files


def _link_out(path: Path) -> None:
    outside = path.parent.parent / "outside" / path.name
    path.rename(outside)
    path.symlink_to(outside)


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


FILE_FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "renamed": lambda path: path.rename(path.with_suffix(".old")),
    "emptied": lambda path: os.truncate(path, 0),
    "two bytes less": lambda path: os.truncate(path, path.stat().st_size - 2),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a thousand bytes more": lambda path: path.write_bytes(path.read_bytes() + b"x" * 1000),
    "a tebibyte": lambda path: os.truncate(path, 2**40),
    "first byte": lambda path: flip(path, 0, 5),
    "link out": _link_out,
    "broken link": _replaced(lambda path: path.symlink_to("absent")),
    "device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "pipe": _replaced(os.mkfifo),
    "folder": _replaced(Path.mkdir),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_files_that_are_not_as_they_were_are_refused(native: Native, fault: str) -> None:
    names = sorted(path.name for path in native.sound.iterdir())
    assert {MANIFEST, CONFIG, "README.md", "head.safetensors"} < set(names)
    problems = []
    for name in names:
        for command in BOTH:
            folder = native.copy()
            FILE_FAULTS[fault](folder / name)
            problems += native.problems(command, name)
    assert problems == []


def test_exchanged_files_are_refused(native: Native) -> None:
    for one, other in pairwise(native.weights):
        folder = native.copy()
        shutil.copy(native.sound / one, folder / other)
        shutil.copy(native.sound / other, folder / one)
        problems = [p for command in BOTH for p in native.problems(command, one_of=(one, other))]
        assert problems == []


CONFIG_EDITS: dict[str, Callable[[str], str]] = {
    "a blank": lambda text: text.rstrip("\n") + " \n",
    "another end": lambda text: text.replace('"eos_token_id": 35', '"eos_token_id": 34'),
    "another decay": lambda text: '{"decay_layer_offset": 1, ' + text[1:],
    "an unknown key": lambda text: '{"x_unknown": 1, ' + text[1:],
    "another rope": lambda text: text.replace("600000", "600001"),
}


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_a_changed_config_is_refused(native: Native, edit: str) -> None:
    path = native.copy() / CONFIG
    text = CONFIG_EDITS[edit](path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    assert [p for command in BOTH for p in native.problems(command, f"{path}: was changed")] == []


# ---------------------------------------------------------------- the manifest

ABSENT = object()
Keys = tuple[str, ...]


def _other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, str):
        return value[:-1] + ("0" if value.endswith("1") else "1")
    if isinstance(value, list):
        return [*value[1:], value[0] + 1]
    if isinstance(value, dict):
        first, *rest = value
        return {first + "x": value[first]} | {key: value[key] for key in rest}
    return value + 1


def edited(manifest: dict[str, Any], keys: Keys, value: object) -> dict[str, Any]:
    """A copy with one field replaced, or left out."""
    copy = json.loads(json.dumps(manifest))
    parent = copy
    for key in keys[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    return copy


def fields(manifest: dict[str, Any], rng: np.random.Generator) -> Iterator[Keys]:
    """The fields that say what the folder holds: of every file, and of a few parameters."""
    yield from (("format",), ("format_version",), ("files",), ("tensors",))
    for file, entry in manifest["files"].items():
        yield from (("files", file), *(("files", file, key) for key in entry))
    params = [name for name, entry in manifest["tensors"].items() if entry["sources"]]
    for name in rng.choice(params, 8, replace=False):
        yield from (
            ("tensors", name),
            *(("tensors", name, key) for key in manifest["tensors"][name]),
        )


def is_free(keys: Keys, value: object, command: str) -> bool:
    """Whether an edit is one that the command may accept."""
    small = keys[0] == "files" and len(keys) > 1 and not keys[1].endswith(".safetensors")
    if small and (keys[2:] == ("bytes",) and type(value) is int):
        return True  # a small file's sha256 says it all
    if small and len(keys) == 2 and keys[1] != CONFIG and value is ABSENT:
        return True  # then the file is none of the folder's
    digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return bool(digest) and (keys[0], keys[-1], command) == ("tensors", "sha256", "native-to-hf")


def test_wrong_fields_of_the_manifest_are_refused(native: Native) -> None:
    rng, path = native.rng("manifest"), native.copy() / MANIFEST
    manifest = json.loads(path.read_text())
    edits = []
    for keys in fields(manifest, rng):
        value: Any = manifest
        for key in keys:
            value = value[key]
        wrong = [ABSENT, None, True, 1.5, "", [], -1, "../x", _other(value), [value]]
        edits += [(keys, new, c) for new in wrong for c in BOTH if not is_free(keys, new, c)]
    problems = []
    for number in rng.permutation(len(edits))[:120]:
        keys, new, command = edits[number]
        path.write_text(json.dumps(edited(manifest, keys, new)))
        found = native.problems(command, one_of=(str(path), *keys[1:2]))
        problems += [f"{keys} = {new!r}: {problem}" for problem in found]
    assert problems == []


def meaning(raw: bytes, command: str) -> object:
    """What a manifest says of the folder's content, as far as a command looks at it.

    The rest tells where it all came from (source, config, dtype, ...) and is in no file's way.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    manifest = json.loads(raw.decode(), object_pairs_hook=unique)
    weights = ("bytes", "header_sha256")
    tensors = ("file", "dtype", "shape", "sources", *(("sha256",) * (command == "verify")))
    return [
        manifest.get("format"),
        manifest.get("format_version"),
        {
            name: [entry.get(k) for k in (weights if "header_sha256" in entry else ("sha256",))]
            for name, entry in manifest["files"].items()
        },
        {name: [e.get(k) for k in tensors] for name, e in manifest["tensors"].items()},
    ]


def test_flipped_bits_of_the_manifest_are_refused_where_they_mean_something(
    native: Native,
) -> None:
    rng, path = native.rng("manifest bits"), native.copy() / MANIFEST
    sound, names = path.read_bytes(), [file.name for file in native.folder.iterdir()]
    problems, refused = [], 0
    for _ in range(60):
        flip(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
        for command in BOTH:
            try:
                same = meaning(path.read_bytes(), command) == meaning(sound, command)
            except (ValueError, KeyError, AttributeError, TypeError):
                same = False
            if not same:
                problems += native.problems(command, one_of=names)
                refused += 1
        path.write_bytes(sound)
    assert problems == []
    assert refused > 50


def test_s03_a_recorded_dtype_that_is_not_the_sources_is_found_beside_the_source(
    native: Native,
) -> None:
    """Only the source knows: `verify --full` looks at it."""
    path = native.copy() / MANIFEST
    manifest = json.loads(path.read_text())
    tensors = manifest["tensors"]
    name = native.rng("dtype").choice([n for n in tensors if len(tensors[n]["sources"]) == 1])
    sources = tensors[name]["sources"]
    (source,) = sources
    sources[source] = {"float32": "bfloat16", "bfloat16": "float32"}[sources[source]]
    path.write_text(json.dumps(manifest))
    done = run("verify", native.folder, native.source, "--quiet")
    assert done.code == EXIT_FAILURE, done
    assert repr(source) in done.stderr, done
    path.write_bytes((native.sound / MANIFEST).read_bytes())
    assert run("verify", native.folder, native.source, "--quiet").code == EXIT_OK
