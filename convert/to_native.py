"""Hugging Face -> native: which parameter lies where, and how its blocks are made.

Every source tensor is read once, whole, checked, and leaves as slabs of the parameter in the
order of its elements; experts one at a time. (`kv_b_proj` alone is read twice, as it fills two
parameters.) `convert.writer` puts the slabs where they belong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from bailing_jax.params import Param, Source
from convert.mapping import SLAB_BYTES, copy, in_order, slab_rows
from convert.native import (
    EMBEDDING,
    EXTRA_FILE,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    file_of,
)
from convert.output_folder import first_difference
from convert.plan import Match, match
from convert.safetensors_file import TensorInfo
from convert.side_files import side_files
from convert.source import CONFIG_NAME, CheckpointSource, read_json
from convert.strict_json import parse_json
from convert.values import check_values
from convert.writer import Conversion, OutFile, OutTensor

KEEP = "keep"
DTYPE_CHOICES = (KEEP, "bfloat16", "float32")

_ALIGNMENT = 64  # bytes of a cache line: what XLA wants of a buffer it uses as it is
# Experts the disk may read while others are converted: with one at a time it waits for the
# processor as often as the processor for it.
_AHEAD = 4
_METADATA = {"layout": f"{FORMAT}, version {FORMAT_VERSION}"}

Pairs = Sequence[tuple[Source, TensorInfo | None]]


def plan_native(
    source: CheckpointSource, dtype: str = KEEP, decay_layer_offset: int | None = None
) -> tuple[ModelConfig, Match, Conversion]:
    """Match a checkpoint with its model and lay out the native folder; reads no tensor.

    Args:
        source: the open checkpoint.
        dtype: of the weights that follow the model's dtype; "keep" leaves each as it is. The
            router's stay float32, which is what the model computes it in.
        decay_layer_offset: written to config.json; None leaves that as it is.

    Raises:
        UserError: config, names, shapes or dtypes do not fit together.
    """
    where = source.folder / CONFIG_NAME
    overrides = {} if decay_layer_offset is None else {"decay_layer_offset": decay_layer_offset}
    config = ModelConfig.from_hf(source.config, overrides, where=str(where))
    if decay_layer_offset is not None and config.lightning is None:
        raise UserError(
            f"--decay-layer-offset {decay_layer_offset}: {config.architecture} has no lightning "
            "attention and so no decay",
            "Leave the flag out.",
            EXIT_USAGE,
        )
    matched = match(config, source.tensors, str(source.folder))
    notes: list[str] = []
    copied, left_behind = side_files(source.folder, config.vocab_size)
    if left_behind:
        notes.append(f"not copied: {', '.join(left_behind)}")
    small = {CONFIG_NAME: _config_bytes(where, source.config, decay_layer_offset)}
    small |= copied
    files = _layout(source, matched, dtype, notes.append)
    head = _manifest_head(source, config, dtype, small)
    conversion = Conversion(
        files=files,
        small=small,
        last=lambda records: {MANIFEST_NAME: _manifest(head, files, matched, records)},
        identity=head,
        is_done=lambda folder: _is_done(folder, head),
        check_unchanged=source.check_unchanged,
        notes=notes,
    )
    return config, matched, conversion


def _layout(
    source: CheckpointSource, matched: Match, dtype: str, note: Callable[[str], None]
) -> tuple[OutFile, ...]:
    groups: dict[str, list[OutTensor]] = {}
    for param, pairs in matched.params:
        stored = _stored_dtype(param, pairs, dtype)
        tensor = OutTensor(
            param.path,
            stored,
            param.shape,
            max((info.nbytes for _, info in pairs if info is not None), default=0),
            _param_blocks(source, param, pairs, stored, note),
        )
        groups.setdefault(file_of(param), []).append(tensor)
    for names in matched.unused.values():
        for name in names:
            groups.setdefault(EXTRA_FILE, []).append(_extra(source, name, note))
    # Tensors of odd sizes go last, so that those before them begin at a cache line.
    return tuple(
        OutFile(name, tuple(sorted(tensors, key=lambda t: t.nbytes % _ALIGNMENT != 0)), _METADATA)
        for name, tensors in groups.items()
    )


def _stored_dtype(param: Param, pairs: Pairs, dtype: str) -> np.dtype[Any]:
    found = {info.dtype for _, info in pairs if info is not None}
    if param.dtype == "float32":
        return np.dtype(np.float32)
    if dtype != KEEP:
        return np.dtype(dtype)
    # Float32 holds every value of a mixture; which was which is in the manifest.
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def _param_blocks(
    source: CheckpointSource,
    param: Param,
    pairs: Pairs,
    dtype: np.dtype[Any],
    note: Callable[[str], None],
) -> Callable[[], Iterator[np.ndarray]]:
    def blocks() -> Iterator[np.ndarray]:
        # Experts take turns in one array: fresh memory for each costs as much as reading it.
        buffer: np.ndarray | None = None
        for number, (piece, info) in enumerate(pairs):
            for _, later in pairs[number + 1 : number + 1 + _AHEAD]:
                if later is not None:
                    source.expect(later.name)
            if info is None:
                yield np.zeros(param.shape, dtype)
                continue
            if buffer is None or (buffer.shape, buffer.dtype) != (info.shape, info.dtype):
                buffer = None  # before its successor is made: memory is counted for one
                buffer = np.empty(info.shape, info.dtype)
            source.read_into(info.name, buffer)
            _check(buffer, info, note)
            yield from _slabs(in_order(piece, buffer), dtype)

    return blocks


def _slabs(part: np.ndarray, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The array in C order, a slab at a time; each is good until the next is asked for."""
    ordered: np.ndarray | None = None
    for rows in slab_rows(part.shape, dtype.itemsize):
        slab = part[rows]
        if not slab.flags.c_contiguous:
            if ordered is None:
                ordered = np.empty(slab.shape, slab.dtype)
            copy(slab, ordered[: len(slab)])
            slab = ordered[: len(slab)]
        yield slab.astype(dtype, copy=False)


def _extra(source: CheckpointSource, name: str, note: Callable[[str], None]) -> OutTensor:
    info = source.tensors[name]
    # Only a tied model's head is both unused and called this.
    twin = source.tensors[EMBEDDING] if name == "lm_head.weight" else None
    memory = info.nbytes + (twin.nbytes if twin else 0)

    def blocks() -> Iterator[np.ndarray]:
        tensor = source.read(name)
        _check(tensor, info, note)
        if twin and not same_bytes(tensor, source.read(EMBEDDING)):
            note(
                f"{name} differs from {EMBEDDING}, although config.json ties them: the model "
                "runs with the embedding's values"
            )
        yield from byte_slabs(tensor)

    return OutTensor(name, info.dtype, info.shape, memory, blocks)


def same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two C-ordered arrays agree in dtype, shape and every bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    # By slabs: numpy makes a third array of what it compares.
    return all(map(np.array_equal, byte_slabs(one), byte_slabs(other)))


def byte_slabs(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of a C-ordered array, a slab at a time."""
    data = tensor.reshape(-1).view(np.uint8)
    for start in range(0, data.size, SLAB_BYTES):
        yield data[start : start + SLAB_BYTES]


def _check(tensor: np.ndarray, info: TensorInfo, note: Callable[[str], None]) -> None:
    only_zeros = check_values(tensor, info.file, info.name)
    # A bias may well be zero; a matrix of zeros was most likely never filled.
    if only_zeros and tensor.ndim > 1:
        note(f"{info.name} holds nothing but zeros")


def _manifest_head(
    source: CheckpointSource, config: ModelConfig, dtype: str, small: Mapping[str, bytes]
) -> dict[str, Any]:
    """What is known before any tensor is read; it also tells this conversion from others."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": config.architecture,
        "dtype": dtype,
        "decay_layer_offset": None if config.lightning is None else config.decay_layer_offset,
        "config": json.loads(small[CONFIG_NAME]),
        "source": {
            "folder": str(source.folder.absolute()),
            "files": {
                name: {
                    "bytes": header.file_size,
                    "header_sha256": header.header_sha256,
                    "modified_ns": header.mtime_ns,
                }
                for name, header in source.headers.items()
            },
        },
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in small.items()
        },
    }


def _manifest(
    head: Mapping[str, Any],
    files: Sequence[OutFile],
    matched: Match,
    records: Mapping[str, Mapping[str, Any]],
) -> bytes:
    sources = {
        param.path: {info.name: str(info.dtype) for _, info in pairs if info is not None}
        for param, pairs in matched.params
    }
    weights = {
        file.name: {key: records[file.name][key] for key in ("bytes", "header_sha256")}
        for file in files
    }
    tensors = {
        tensor.name: {
            "file": file.name,
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "sha256": records[file.name]["tensors"][tensor.name],
            "sources": sources.get(tensor.name, {}),
        }
        for file in files
        for tensor in file.tensors
    }
    return _json_bytes({**head, "files": {**weights, **head["files"]}, "tensors": tensors})


def _config_bytes(path: Path, config: Mapping[str, Any], decay_layer_offset: int | None) -> bytes:
    if decay_layer_offset is None or config.get("decay_layer_offset") == decay_layer_offset:
        content = path.read_bytes()
        if parse_json(content, path, "the model config") != config:
            raise UserError(
                f"{path}: the file changed while being read", "Start again.", EXIT_FAILURE
            )
        return content
    return _json_bytes({**config, "decay_layer_offset": decay_layer_offset})


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _is_done(folder: Path, head: Mapping[str, Any]) -> bool:
    """Whether a folder's manifest begins as ours will, and its files are there.

    A manifest is written last of all; `verify` is who looks at the data.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return False
    found = read_json(path, "the manifest", MANIFEST_LIMIT)
    files = found.get("files")
    if not isinstance(files, dict):
        return False
    small = {name: files[name] for name in files if not name.endswith(".safetensors")}
    if first_difference({**{key: found.get(key) for key in head}, "files": small}, head):
        return False
    return all(_has_size(folder / name, entry) for name, entry in files.items())


def _has_size(path: Path, entry: object) -> bool:
    size = entry.get("bytes") if isinstance(entry, dict) else None
    return path.is_file() and path.stat().st_size == size
