"""A released Hugging Face checkpoint folder: config.json and its safetensors, read only.

`open_source` checks the whole folder before a single tensor is read: every shard is there and
sound, each tensor lies in exactly one, and the index agrees with the shards. Nothing is ever
unpickled, executed or written. Files that are symlinks must stay inside the folder, or in the
`blobs` beside it in the Hugging Face cache. Must not know what the tensors mean; `convert.mapping`
does.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.errors import EXIT_USAGE, UserError
from convert.safetensors_file import (
    SafetensorsFile,
    SafetensorsHeader,
    TensorInfo,
    open_regular,
    read_exactly,
    read_header,
    refuse_lfs_pointer,
)
from convert.strict_json import DOWNLOAD_AGAIN, malformed, parse_json, show
from convert.values import check_values

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

_SUFFIX = ".safetensors"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack")
_JSON_LIMIT = 16 * 2**20
_INDEX_LIMIT = 100_000_000  # a trillion parameters in fp8 need about 15 MB
_NAMES_SHOWN = 8


class CheckpointSource:
    """An open checkpoint: what it holds, and its tensors one at a time.

    `config` is config.json as parsed; `headers` maps shard names and `tensors` tensor names.
    Files are opened when first read and stay open until `close`. Threads may share one.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], headers: dict[str, SafetensorsHeader]
    ) -> None:
        """Take headers that were checked against each other; `open_source` does that."""
        self.folder = folder
        self.config = config
        self.headers = headers
        self.tensors: dict[str, TensorInfo] = {
            name: info for header in headers.values() for name, info in header.tensors.items()
        }
        self._files: dict[str, SafetensorsFile] = {}
        self._maps: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into a fresh C-ordered array.

        Raises:
            UserError: its file changed since it was opened, or cannot be read.
            KeyError: the checkpoint holds no such tensor.
        """
        return self._file_of(name).read(name)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read a tensor into `out`: a writable C-ordered array of its shape and dtype.

        Raises:
            UserError, KeyError: as `read`.
            ValueError: `out` does not fit the tensor.
        """
        self._file_of(name).read_into(name, out)

    def read_part(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out`, writable and C-ordered, with the tensor's bytes from its `start`-th on.

        Raises:
            UserError, KeyError: as `read`.
            ValueError: the tensor has fewer bytes.
        """
        self._file_of(name).read_part(name, start, out)

    def map(self, name: str) -> np.ndarray:
        """A tensor as it lies in its file, read only, mapped when it is touched.

        A mapping outlives `close`. Nobody may cut the file short while it is in use: the system
        answers a read beyond the end of a mapped file by killing the process.
        """
        info = self.tensors[name]
        if info.file.name not in self._maps:
            with SafetensorsFile(self.headers[info.file.name]), open(info.file, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[info.file.name] = np.frombuffer(mapped, np.uint8)
        data = self._maps[info.file.name][info.start : info.end]
        return data.view(info.dtype).reshape(info.shape)

    def expect(self, name: str) -> None:
        """Tell the system that a tensor will soon be read."""
        self._file_of(name).expect(name)

    def check_unchanged(self) -> None:
        """Look at every file once more.

        Raises:
            UserError: one is gone, or not what it was when it was opened.
        """
        for header in self.headers.values():
            SafetensorsFile(header).close()

    def read_finite(self, name: str) -> np.ndarray:
        """Read a tensor as `read` does, and refuse values no weight has.

        Raises:
            UserError: as `read`; or NaN, infinity or absurd magnitudes: see `check_values`.
        """
        array = self.read(name)
        check_values(array, self.tensors[name].file, name)
        return array

    def close(self) -> None:
        """Close every shard; arrays from `map` stay valid, reading is an error. May be repeated."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._maps.clear()

    def __enter__(self) -> CheckpointSource:
        """Return the source itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every shard."""
        self.close()

    def _file_of(self, name: str) -> SafetensorsFile:
        shard = self.tensors[name].file.name
        with self._lock:
            if self._closed:
                raise ValueError(f"the checkpoint {self.folder} is closed")
            if shard not in self._files:
                self._files[shard] = SafetensorsFile(self.headers[shard])
            return self._files[shard]


def open_source(folder: Path) -> CheckpointSource:
    """Open a checkpoint folder, checking it whole; no tensor is read yet.

    The weights are those of model.safetensors.index.json, or the only safetensors file.

    Raises:
        UserError: what is missing, too many, damaged or not as the index says.
    """
    names = _list_folder(folder)
    if CONFIG_NAME not in names:
        raise _no_config(folder, names)
    config = read_json(folder / CONFIG_NAME, "the model config")
    present = sorted(name for name in names if name.endswith(_SUFFIX))
    if INDEX_NAME in names:
        weight_map = _read_weight_map(folder / INDEX_NAME)
        _check_shard_names(folder, set(weight_map.values()), set(present))
        headers = read_headers(folder, present)
        _check_against_index(folder, weight_map, headers)
    elif len(present) == 1:
        headers = read_headers(folder, present)
    else:
        raise _no_single_file(folder, names, present)
    if not any(header.tensors for header in headers.values()):
        raise malformed(folder, "its safetensors files hold no tensor")
    return CheckpointSource(folder, config, headers)


def read_headers(folder: Path, shards: Iterable[str]) -> dict[str, SafetensorsHeader]:
    """Read the headers of several files of a folder, by name.

    Raises:
        UserError: one is damaged or leaves the folder, or a tensor lies in two of them.
    """
    headers: dict[str, SafetensorsHeader] = {}
    owner: dict[str, str] = {}
    for shard in shards:
        check_contained(folder / shard)
        headers[shard] = read_header(folder / shard)
        twice = [name for name in headers[shard].tensors if name in owner]
        if twice:
            raise malformed(
                folder,
                f"{_tensors(twice)} both in {owner[twice[0]]} and in {shard}",
                "Files of two releases are mixed. " + DOWNLOAD_AGAIN,
            )
        owner.update(dict.fromkeys(headers[shard].tensors, shard))
    return headers


def read_json(path: Path, what: str, limit: int = _JSON_LIMIT) -> dict[str, Any]:
    """Read a strict JSON object of at most `limit` bytes; errors call it `what`.

    Raises:
        UserError: the file cannot be read, leaves its folder, is a Git LFS pointer or is too
            large, or it is not UTF-8 JSON with unique keys, finite numbers and an object on top.
    """
    return parse_json(read_small(path, what, limit), path, what)


def read_small(path: Path, what: str, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes; errors call it `what`.

    Raises:
        UserError: the file cannot be read, leaves its folder, is a Git LFS pointer or is too large.
    """
    check_contained(path)
    descriptor, status = open_regular(path)
    try:
        if status.st_size > limit:
            raise malformed(path, f"{what} has {status.st_size} bytes; at most {limit} are read")
        raw = bytearray(status.st_size)
        read_exactly(descriptor, path, memoryview(raw), 0)
    finally:
        os.close(descriptor)
    refuse_lfs_pointer(path, raw)
    return bytes(raw)


def check_contained(path: Path) -> None:
    """Refuse a file that is a symlink out of its folder, unless it follows the hub's cache.

    There, `<repo>/snapshots/<revision>/file` points into `<repo>/blobs/`.

    Raises:
        UserError: the link leads elsewhere or nowhere.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
        root = Path(os.path.realpath(path.parent, strict=True))
    except OSError as error:
        raise malformed(path, f"does not exist or is a broken link: {error.strerror}") from error
    in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (target.is_relative_to(root) or in_cache):
        raise malformed(
            path,
            f"is a link that leaves the model folder, to {show(str(target))}",
            "Replace the link by the file itself.",
        )


def _list_folder(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"{folder}: not a readable folder: {error.strerror}",
            "Give the folder that holds config.json and the safetensors files.",
            EXIT_USAGE,
        ) from error


def _no_config(folder: Path, names: Iterable[str]) -> UserError:
    candidates = [folder / name for name in names] + sorted(folder.glob("snapshots/*"))
    inner = [path for path in candidates if os.path.isfile(path / CONFIG_NAME)]
    hint = "Give the folder that holds config.json and the safetensors files."
    if len(inner) == 1:
        hint = f"Did you mean {inner[0]}?"
    return malformed(folder, f"has no {CONFIG_NAME}", hint)


def _no_single_file(folder: Path, names: Iterable[str], present: list[str]) -> UserError:
    if "embed.safetensors" in present:
        return malformed(
            folder,
            "looks like a native folder, but has no manifest.json",
            "Copy the whole folder again, or convert the checkpoint again.",
        )
    if present:
        return malformed(
            folder,
            f"has {_listed(present, 'safetensors file')} and no {INDEX_NAME}",
            f"Download {INDEX_NAME} too, or move the files that are not the model's away.",
        )
    others = sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))
    if others:
        return malformed(
            folder,
            f"has no safetensors file, only {_listed(others, 'file')} of other formats",
            "Only safetensors are read; nothing pickled is ever opened. Download the model's "
            "safetensors files.",
        )
    return malformed(folder, "has no safetensors file", "Download the model's weights.")


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path, "the index", _INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise malformed(path, f"weight_map must be a non-empty object, got {show(weight_map)}")
    for tensor, shard in weight_map.items():
        if not _is_shard_name(shard):
            raise malformed(
                path,
                f"weight_map {show(tensor)}: must be the name of a {_SUFFIX} file in this folder, "
                f"got {show(shard)}",
            )
    return weight_map


def _is_shard_name(name: object) -> bool:
    """Whether it names a file right in the folder; no separator, no NUL, nothing invisible."""
    return (
        isinstance(name, str)
        and name.endswith(_SUFFIX)
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _check_shard_names(folder: Path, wanted: set[str], present: set[str]) -> None:
    missing, extra = sorted(wanted - present), sorted(present - wanted)
    if missing:
        raise malformed(
            folder,
            f"{_listed(missing, 'shard')} of the {len(wanted)} in {INDEX_NAME} missing",
            "Download the missing files.",
        )
    if extra:
        raise malformed(
            folder,
            f"{_listed(extra, 'safetensors file')} not in {INDEX_NAME}",
            "Move the files that are not the model's away, or download the index that fits.",
        )


def _check_against_index(
    folder: Path, weight_map: Mapping[str, str], headers: Mapping[str, SafetensorsHeader]
) -> None:
    found = {name: shard for shard, header in headers.items() for name in header.tensors}
    absent = [name for name in weight_map if name not in found]
    unlisted = [name for name in found if name not in weight_map]
    moved = [name for name in found if weight_map.get(name, found[name]) != found[name]]
    problems = [
        f"{_tensors(names)} {problem}"
        for names, problem in (
            (absent, "in the index but in no shard"),
            (unlisted, "in a shard but not in the index"),
            (moved, "in another shard than the index says"),
        )
        if names
    ]
    if problems:
        raise malformed(
            folder / INDEX_NAME,
            "does not fit the shards: " + "; ".join(problems),
            "Index and shards are of different releases. " + DOWNLOAD_AGAIN,
        )


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} (e.g. {show(min(names))})"


def _listed(names: list[str], noun: str) -> str:
    more = f", and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN)
    shown = ", ".join(map(show, names[:_NAMES_SHOWN]))
    return f"{len(names)} {noun}{'s' * (len(names) > 1)} ({shown}{more})"
