"""Native -> Hugging Face: the checkpoint a native folder was made from, tensor by tensor.

Names and dtypes come from the manifest, so aliases and mixed dtypes return as they were. A tensor
is put together in memory from slabs of the parameters it went into, whose hashes are checked first.
Where the conversion narrowed
the weights (`--dtype bfloat16` of float32) the lost bits are gone, and the narrow dtype is written.
File boundaries are our own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.params import Source
from convert.mapping import copy, in_order, slab_rows
from convert.native import MANIFEST_NAME, NativeFolder, NativeTensor, check_params, sha256_of
from convert.safetensors_file import read_header
from convert.source import INDEX_NAME
from convert.strict_json import malformed, show
from convert.to_native import byte_slabs
from convert.values import check_values
from convert.workers import Workers
from convert.writer import Conversion, OutFile, OutTensor, Progress

SHARD_BYTES = 5 * 10**9  # the size people expect of a shard

Part = tuple[str, Source]  # a parameter's path, and how the tensor fills it


def plan_hf(native: NativeFolder) -> tuple[ModelConfig, Conversion]:
    """Lay out the Hugging Face folder of a native one; reads no tensor.

    Raises:
        UserError: the manifest's tensors are not those of the model.
    """
    config = native.model_config()
    tensors = [
        _tensor(native, name, source, parts)
        for name, (source, parts) in checkpoint_tensors(native, config).items()
    ]
    tensors += [extra_tensor(native, name) for name in native.extra]
    digest = sha256_of(native.folder / MANIFEST_NAME)
    # `format` is what transformers asks for; the other tells where the file comes from.
    metadata = {"format": "pt", "native_manifest_sha256": digest}
    files = _shards(tensors, metadata)
    weights = {file.name for file in files}
    small = native.small_files()
    if len(files) > 1:
        small[INDEX_NAME] = _index(files)
    stored = [*native.params.values(), *native.extra.values()]

    def check(workers: Workers, progress: Progress) -> None:
        # What is damaged must not come back as a checkpoint that no longer has a hash.
        def check_one(tensor: NativeTensor) -> None:
            for problem in native.problems_of(tensor, progress.add):
                raise UserError(problem, "Copy or convert the native folder again.", EXIT_USAGE)

        workers.for_each(check_one, stored)

    return config, Conversion(
        files=files,
        small=small,
        last=lambda _records: {},
        identity={"command": "native-to-hf", "manifest_sha256": digest, "files": sorted(weights)},
        is_done=lambda folder: _is_done(folder, files, small),
        check_unchanged=native.files.check_unchanged,
        notes=[],
        check=check,
        check_bytes=sum(tensor.info.nbytes for tensor in stored),
    )


def checkpoint_tensors(
    native: NativeFolder, config: ModelConfig
) -> dict[str, tuple[Source, list[Part]]]:
    """The checkpoint's tensors by name: each with a source that describes it, and its parts.

    Raises:
        UserError: the manifest names a source the model does not have, or lacks one.
    """
    tensors: dict[str, tuple[Source, list[Part]]] = {}
    for param in check_params(native, config):
        recorded = dict(native.params[param.path].sources)
        for source in param.sources:
            name = next((n for n in (source.name, *source.aliases) if n in recorded), None)
            if name is not None:
                del recorded[name]
                tensors.setdefault(name, (source, []))[1].append((param.path, source))
            elif not source.optional:
                raise _wrong_source(native, param.path, f"lacks {source.name}")
        if recorded:
            raise _wrong_source(native, param.path, f"has the stranger {show(min(recorded))}")
    return tensors


def restored_dtype(native: NativeFolder, name: str, path: str) -> np.dtype[Any]:
    """The dtype a checkpoint tensor returns with: its own, unless the conversion narrowed it."""
    stored = native.params[path].info.dtype
    own = np.dtype(native.params[path].sources[name])
    return own if stored in (own, np.dtype(np.float32)) else stored


def restored(
    native: NativeFolder, name: str, source: Source, parts: list[Part], dtype: np.dtype[Any]
) -> np.ndarray:
    """A checkpoint tensor, put together from the parameters it went into."""
    out = np.empty(source.shape, dtype)
    for path, piece in parts:
        stored = native.params[path].info
        target = in_order(piece, out)
        row_bytes = int(np.prod(target.shape[1:], dtype=np.int64)) * stored.dtype.itemsize
        first = (piece.index or 0) * target.shape[0]
        for rows in slab_rows(target.shape, stored.dtype.itemsize):
            slab = np.empty(target[rows].shape, stored.dtype)
            native.files.read_part(path, (first + rows.start) * row_bytes, slab)
            copy(slab.astype(dtype, copy=False), target[rows])
    check_values(out, native.params[parts[0][0]].info.file, name)
    return out


def _tensor(native: NativeFolder, name: str, source: Source, parts: list[Part]) -> OutTensor:
    dtype = restored_dtype(native, name, parts[0][0])
    nbytes = int(np.prod(source.shape, dtype=np.int64)) * dtype.itemsize

    def blocks() -> Iterator[np.ndarray]:
        yield from byte_slabs(restored(native, name, source, parts, dtype))

    return OutTensor(name, dtype, source.shape, nbytes, blocks)


def extra_tensor(native: NativeFolder, name: str) -> OutTensor:
    """An unused tensor, to be written as it lies in the native folder."""
    info = native.extra[name].info

    def blocks() -> Iterator[np.ndarray]:
        yield from byte_slabs(native.files.read_finite(name))

    return OutTensor(name, info.dtype, info.shape, info.nbytes, blocks)


def _shards(tensors: list[OutTensor], metadata: Mapping[str, str]) -> tuple[OutFile, ...]:
    groups: list[list[OutTensor]] = []
    size = SHARD_BYTES  # full: the first tensor opens a shard
    for tensor in tensors:
        size += tensor.nbytes
        if size > SHARD_BYTES:
            groups.append([])
            size = tensor.nbytes
        groups[-1].append(tensor)
    # Wide dtypes first: every tensor is then aligned to its elements.
    ordered = [tuple(sorted(group, key=lambda t: -t.dtype.itemsize)) for group in groups]
    if len(ordered) == 1:
        return (OutFile("model.safetensors", ordered[0], metadata),)
    count = len(ordered)
    return tuple(
        OutFile(f"model-{number:05d}-of-{count:05d}.safetensors", group, metadata)
        for number, group in enumerate(ordered, start=1)
    )


def _index(files: tuple[OutFile, ...]) -> bytes:
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(file.data_bytes for file in files)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(content, indent=1) + "\n").encode()


def _is_done(folder: Path, files: tuple[OutFile, ...], small: Mapping[str, bytes]) -> bool:
    """Whether the folder has these files: headers name the manifest, which has the hashes."""
    if not all((folder / name).is_file() for name in (*small, *(file.name for file in files))):
        return False
    if any((folder / name).read_bytes() != content for name, content in small.items()):
        return False
    return all(
        read_header(folder / file.name).header_sha256
        == hashlib.sha256(file.header()[8:]).hexdigest()
        for file in files
    )


def _wrong_source(native: NativeFolder, path: str, problem: str) -> Exception:
    return malformed(
        native.folder / MANIFEST_NAME,
        f"tensors.{path}.sources {problem}",
        "The manifest is damaged: convert the checkpoint again.",
    )
