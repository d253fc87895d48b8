"""The native format: a folder of safetensors laid out as the model uses them, and a manifest.

    manifest.json            written last: format, config, source, files, tensors with sha256
    embed.safetensors        layer-000.safetensors ...        head.safetensors
    extra.safetensors        recognised tensors the model does not use (MTP), untouched
    config.json, tokenizer.json, ...                          copies

Tensor names are parameter paths. The data of a file begins at a page and large tensors at a cache
line, so that they can be used as they are mapped. `open_native` checks everything but the data.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.params import Param, describe
from convert.mapping import SLAB_BYTES
from convert.plan import READABLE
from convert.safetensors_file import TensorInfo
from convert.source import CONFIG_NAME, CheckpointSource, read_headers, read_json, read_small
from convert.strict_json import malformed, show
from convert.values import check_values

MANIFEST_NAME = "manifest.json"
FORMAT = "bailing-jax native"
FORMAT_VERSION = 1
EXTRA_FILE = "extra.safetensors"
EMBEDDING = "model.word_embeddings.weight"
MANIFEST_LIMIT = 100_000_000  # bytes; a trillion parameters need about 6 MB

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_WEIGHT_FILE = re.compile(r"(embed|head|extra|layer-[0-9]{3,})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_of(param: Param) -> str:
    """The file a parameter lies in."""
    layer = _LAYER.match(param.path)
    if layer:
        return f"layer-{int(layer[1]):03d}.safetensors"
    return "embed.safetensors" if param.path == EMBEDDING else "head.safetensors"


@dataclass(frozen=True)
class NativeTensor:
    """A tensor of a native folder.

    Attributes:
        info: where it lies.
        sha256: of its bytes.
        sources: the checkpoint tensors it was made of, and their dtypes; an extra has none.
    """

    info: TensorInfo
    sha256: str
    sources: Mapping[str, str]


class NativeFolder:
    """An open native folder; `open_native` makes one.

    Attributes:
        manifest: as parsed.
        config: config.json as parsed.
        params: parameters by path.
        extra: recognised but unused tensors by name.
        files: reads them; closed with the folder.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], files: CheckpointSource
    ) -> None:
        """Take what was checked."""
        self.folder = folder
        self.manifest = manifest
        self.config = files.config
        self.files = files
        self.params: dict[str, NativeTensor] = {}
        self.extra: dict[str, NativeTensor] = {}
        for name, entry in manifest["tensors"].items():
            tensor = NativeTensor(files.tensors[name], entry["sha256"], entry["sources"])
            kind = self.extra if entry["file"] == EXTRA_FILE else self.params
            kind[name] = tensor

    def model_config(self, overrides: Mapping[str, object] | None = None) -> ModelConfig:
        """The model; `overrides` as in `ModelConfig.from_hf`."""
        where = str(self.folder / CONFIG_NAME)
        return ModelConfig.from_hf(self.config, overrides, where=where)

    def map(self, name: str) -> np.ndarray:
        """A tensor as it lies in its file, see `CheckpointSource.map`."""
        return self.files.map(name)

    def small_files(self) -> dict[str, bytes]:
        """The files that hold no weights, by name, as the conversion left them.

        Raises:
            UserError: one is gone, was changed or leaves the folder.
        """
        content: dict[str, bytes] = {}
        for name, entry in self.manifest["files"].items():
            if name.endswith(".safetensors"):
                continue
            content[name] = read_small(self.folder / name, "the file", MANIFEST_LIMIT)
            if hashlib.sha256(content[name]).hexdigest() != entry["sha256"]:
                raise malformed(
                    self.folder / name,
                    f"was changed after the conversion ({MANIFEST_NAME} has another sha256)",
                    "Put the original back; change the copy in the folder that is made.",
                )
        return content

    def problems_of(
        self, tensor: NativeTensor, add: Callable[[str, int], None] | None = None
    ) -> list[str]:
        """Read a tensor, a slab at a time: what is wrong with its hash and values.

        Args:
            tensor: one of this folder's.
            add: called with the tensor's name and the number of bytes read.

        Raises:
            UserError: it cannot be read.
        """
        info, digest, problems = tensor.info, hashlib.sha256(), []
        step, count = SLAB_BYTES // info.dtype.itemsize, info.nbytes // info.dtype.itemsize
        for start in range(0, count, step):
            slab = np.empty(min(step, count - start), info.dtype)
            self.files.read_part(info.name, start * info.dtype.itemsize, slab)
            digest.update(slab.view(np.uint8).data)
            try:
                check_values(slab, info.file, info.name)
            except UserError as error:
                where = f" (of the {slab.size} elements from the {start}-th on)"
                problems = problems or [error.message + where * (step < count)]
            if add is not None:
                add(info.name, slab.nbytes)
        if digest.hexdigest() != tensor.sha256:
            problems.append(f"{info.file}: tensor {show(info.name)} differs from its sha256")
        return problems

    def close(self) -> None:
        """Close the files; arrays from `map` stay valid."""
        self.files.close()

    def __enter__(self) -> NativeFolder:
        """Return the folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self.close()


def is_native(folder: Path) -> bool:
    """Whether a folder is, or claims to be, native."""
    return (folder / MANIFEST_NAME).exists()


def open_native(folder: Path) -> NativeFolder:
    """Open a native folder: manifest, config, headers and sizes are checked, no data is read.

    Raises:
        UserError: anything missing, changed or not as the manifest says.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise malformed(
            folder,
            f"has no {MANIFEST_NAME}, which a complete native folder has",
            "Convert the checkpoint first: python -m convert hf-to-native SOURCE FOLDER",
        )
    manifest = read_json(path, "the manifest", MANIFEST_LIMIT)
    _check_format(path, manifest)
    _Manifest(path, manifest).check()
    if sha256_of(folder / CONFIG_NAME) != manifest["files"][CONFIG_NAME]["sha256"]:
        raise malformed(
            folder / CONFIG_NAME,
            f"was changed after the conversion ({MANIFEST_NAME} has another sha256)",
            "Put the original back; to run with other values use --hf-overrides.",
        )
    config = read_json(folder / CONFIG_NAME, "the model config")
    weights = [name for name in manifest["files"] if name.endswith(".safetensors")]
    strangers = {file.name for file in folder.glob("*.safetensors")} - set(weights)
    if strangers:
        raise malformed(
            folder,
            f"{len(strangers)} weight files not in {MANIFEST_NAME}, e.g. {show(min(strangers))}",
            "Files of two conversions are mixed: convert again, to a new folder.",
        )
    headers = read_headers(folder, weights)
    for name, header in headers.items():
        entry = manifest["files"][name]
        found = (header.file_size, header.header_sha256)
        if found != (entry["bytes"], entry["header_sha256"]):
            raise malformed(
                folder / name,
                f"is not the file {MANIFEST_NAME} describes: {header.file_size} bytes and header "
                f"{found[1][:12]}..., expected {entry['bytes']} and "
                f"{str(entry['header_sha256'])[:12]}...",
                "Copy the folder again, or convert again.",
            )
    files = CheckpointSource(folder, config, headers)
    _check_tensors(path, manifest["tensors"], files)
    return NativeFolder(folder, manifest, files)


def sha256_of(path: Path) -> str:
    """The sha256 of a small file.

    Raises:
        UserError: it cannot be read.
    """
    return hashlib.sha256(read_small(path, "the file", MANIFEST_LIMIT)).hexdigest()


def check_params(native: NativeFolder, config: ModelConfig) -> tuple[Param, ...]:
    """The parameters of the model, each of which the folder has in the right shape.

    Raises:
        UserError: it has not; config.json was overridden with another shape, most likely.
    """
    params = describe(config)
    wrong = [p for p in params if p.path not in native.params] + [
        p
        for p in params
        if p.path in native.params and native.params[p.path].info.shape != p.shape
    ]
    strangers = sorted(native.params.keys() - {p.path for p in params})
    if wrong or strangers:
        name = wrong[0].path if wrong else strangers[0]
        found = native.params[name].info.shape if name in native.params else "nothing"
        wanted = wrong[0].shape if wrong else "nothing"
        raise UserError(
            f"{native.folder}: {len(wrong) + len(strangers)} tensors do not fit the config, "
            f"e.g. {name}: got {found}, want {wanted}",
            "Leave out overrides that change shapes, or convert the checkpoint again.",
            EXIT_USAGE,
        )
    return params


def _check_format(path: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise malformed(
            path,
            f"format must be {FORMAT!r}, got {show(manifest.get('format'))}",
            "Only folders made by `python -m convert hf-to-native` are read; one exported with "
            "--format orbax is for Orbax.",
        )
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise malformed(
            path,
            f"format_version {show(version)} is not {FORMAT_VERSION}, the one this version reads",
            "Convert the checkpoint again with this version, or use the version that made it.",
        )


class _Manifest:
    """Checks the fields of a manifest, one by one, so that nothing else need be careful."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path = path
        self._manifest = manifest

    def check(self) -> None:
        files = self._object(self._manifest, "files", "")
        for name in files:
            entry = self._object(files, name, "files.")
            self._is(type(entry.get("bytes")) is int, f"files.{name}.bytes", entry.get("bytes"))
            digest = "header_sha256" if name.endswith(".safetensors") else "sha256"
            self._sha256(entry, digest, f"files.{name}.")
            plain = name.isprintable() and not set(name) & set("/\\:") and name[:1] not in ("", ".")
            weights = _WEIGHT_FILE.fullmatch(name) or not name.endswith(".safetensors")
            self._is(bool(plain and weights), "files", name)
        self._is(CONFIG_NAME in files, f"files.{CONFIG_NAME}", None)
        tensors = self._object(self._manifest, "tensors", "")
        for name in tensors:
            entry = self._object(tensors, name, "tensors.")
            self._sha256(entry, "sha256", f"tensors.{name}.")
            file = entry.get("file")
            self._is(isinstance(file, str) and file in files, f"tensors.{name}.file", file)
            sources = self._object(entry, "sources", f"tensors.{name}.")
            for source, dtype in sources.items():
                self._is(dtype in READABLE, f"tensors.{name}.sources.{source}", dtype)

    def _object(self, parent: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
        value = parent.get(key)
        self._is(isinstance(value, dict), where + key, value)
        return value or {}

    def _sha256(self, entry: Mapping[str, Any], key: str, where: str) -> None:
        value = entry.get(key)
        self._is(isinstance(value, str) and bool(_SHA256.fullmatch(value)), where + key, value)

    def _is(self, good: bool, field: str, value: object) -> None:
        if not good:
            raise malformed(
                self._path,
                f"{field} cannot be {show(value)}",
                "The manifest is damaged: convert the checkpoint again.",
            )


def _check_tensors(path: Path, listed: Mapping[str, Any], files: CheckpointSource) -> None:
    for name in sorted({*listed, *files.tensors}):
        info, entry = files.tensors.get(name), listed.get(name)
        found = info and [info.file.name, str(info.dtype), list(info.shape)]
        wanted = entry and [entry["file"], entry.get("dtype"), entry.get("shape")]
        if found != wanted:
            raise malformed(
                path,
                f"tensor {show(name)}: is {show(wanted)} in the manifest and {show(found)} in the "
                "files",
                "Copy the folder again, or convert again.",
            )
