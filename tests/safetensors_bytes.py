"""Safetensors files written byte by byte, sound ones and broken ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bailing_jax.errors import EXIT_USAGE, UserError
from convert.safetensors_file import DTYPES, read_header
from convert.source import (
    INDEX_NAME,
    open_source,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123abcd\nsize 12345\n"
GOOD_ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
FLOATS = [name for name, dtype in DTYPES.items() if dtype.kind not in "biu"]


def pack(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; a given `length` lies about the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    """The header of one four-byte tensor `w`, with fields changed."""
    return {"w": GOOD_ENTRY | changes}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, content: bytes, *said: str) -> None:
    """The file is refused with exit code 2, naming the file and saying each of `said`."""
    write(path, content)
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.hint
    for text in (str(path), *said):
        assert text in caught.value.message


def write_sharded(folder: Path, index: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Two shards with an index over them, or with the index given."""
    tensors = {name: np.arange(n, dtype=np.float32) for n, name in ((3, "a"), (5, "b"), (7, "c"))}
    save_file({"a": tensors["a"], "b": tensors["b"]}, folder / "m-1.safetensors")
    save_file({"c": tensors["c"]}, folder / "m-2.safetensors")
    if index is None:
        index = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    text = json.dumps({"metadata": {"total_size": 60}, "weight_map": index})
    (folder / INDEX_NAME).write_text(text)
    return tensors


def source_refused(folder: Path, *said: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_source(folder)
    assert caught.value.exit_code == EXIT_USAGE
    for text in said:
        assert text in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- what is sound is read
