"""One safetensors file: its header checked before anything is allocated, its tensors read.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes. The header is
untrusted: every length, offset, shape and dtype is checked against the size of the file, and the
tensors must tile the data section without overlap or gap. Tensors are read with preadv into
fresh arrays; there is no mmap, because a mapped file that shrinks kills the process (SIGBUS).
Must not know about models, folders or indices; `convert.source` does.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bailing_jax.errors import EXIT_FAILURE, UserError
from convert.strict_json import malformed, parse_json, show

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
# The format's dtypes that pack several values in a byte: known, and refused by name.
SUB_BYTE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")


_PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_DIMS = 8
_MAX_INT64 = 2**63 - 1
_READ_PIECE = 2**30  # the kernel moves at most 0x7ffff000 bytes a call
_LFS_PREFIX = b"version https://git-lfs.github.com/spec/"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` up to `end`, counted from the start of `file`."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes; equals prod(shape) * itemsize."""
        return self.end - self.start


@dataclass(frozen=True)
class SafetensorsHeader:
    """A header that passed every check, and the size and mtime of the file it was read from.

    `header_sha256` is the digest of the JSON bytes, padding included.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_size: int
    mtime_ns: int
    header_sha256: str


class _EntryError(Exception):
    """What is wrong with one tensor's entry; `read_header` adds the file and the name."""


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises:
        UserError: the file cannot be read, or anything in its header is not as the format says.
    """
    descriptor, status = open_regular(path)
    try:
        raw = _read_header_bytes(descriptor, path, status.st_size)
    finally:
        os.close(descriptor)
    document = parse_json(raw, path, "the safetensors header")
    metadata = _check_metadata(path, document.pop("__metadata__", {}))
    data_start = _PREFIX_BYTES + len(raw)
    tensors = {}
    for name, entry in document.items():
        try:
            tensors[name] = _check_entry(name, entry, path, data_start)
        except _EntryError as error:
            raise malformed(path, f"tensor {show(name)}: {error}") from error
    _check_tiling(path, tensors, data_start, status.st_size)
    digest = hashlib.sha256(raw).hexdigest()
    return SafetensorsHeader(path, tensors, metadata, status.st_size, status.st_mtime_ns, digest)


class SafetensorsFile:
    """An open safetensors file; refuses to read once the file differs from its header's record.

    Reads use absolute offsets, so threads may share one.
    """

    def __init__(self, header: SafetensorsHeader) -> None:
        """Open the file that `header` was read from; raises UserError if it has changed."""
        self.header = header
        self._descriptor, status = open_regular(header.path)
        try:
            self._check_unchanged(status)
        except UserError:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into a fresh C-ordered array.

        Raises:
            UserError: the file changed, ended early or cannot be read.
            KeyError: the file holds no such tensor.
        """
        info = self.header.tensors[name]
        out = np.empty(info.shape, info.dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read a tensor into `out`: a writable C-ordered array of its shape and dtype.

        Raises:
            UserError: as `read`.
            ValueError: `out` does not fit the tensor.
        """
        info = self.header.tensors[name]
        if out.shape != info.shape or out.dtype != info.dtype:
            raise ValueError(
                f"{name} is {info.dtype}{info.shape}, the buffer is {out.dtype}{out.shape}"
            )
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(f"the buffer for {name} must be C-ordered and writable")
        data = out.reshape(-1).view(np.uint8)
        self._read_range(info.start, data)
        if info.dtype == np.bool_ and data.size and data.max() > 1:
            problem = f"BOOL holds the byte {data.max()}, not 0 or 1"
            raise malformed(info.file, f"tensor {show(name)}: {problem}")

    def read_part(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out`, writable and C-ordered, with the tensor's bytes from its `start`-th on.

        Raises:
            UserError: as `read`.
            ValueError: the tensor has fewer bytes.
        """
        info = self.header.tensors[name]
        if start < 0 or start + out.nbytes > info.nbytes:
            raise ValueError(f"{name} has {info.nbytes} bytes, not {out.nbytes} from {start}")
        self._read_range(info.start + start, out.reshape(-1).view(np.uint8))

    def expect(self, name: str) -> None:
        """Tell the system that a tensor will soon be read, so that the disk need not be waited for.

        Does nothing where the system takes no such advice.
        """
        info = self.header.tensors[name]
        if hasattr(os, "posix_fadvise") and self._descriptor >= 0:
            os.posix_fadvise(self._descriptor, info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def _read_range(self, start: int, data: np.ndarray) -> None:
        if self._descriptor < 0:
            raise ValueError(f"{self.header.path} is closed")
        self._check_unchanged(os.fstat(self._descriptor))
        try:
            read_exactly(self._descriptor, self.header.path, data.data, start)
        finally:
            # Once more, for a writer that came in between: half old, half new bytes are worse than
            # an error, and a file that ended too early was cut just now.
            self._check_unchanged(os.fstat(self._descriptor))

    def close(self) -> None:
        """Close the file; safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> SafetensorsFile:
        """Return the open file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _check_unchanged(self, status: os.stat_result) -> None:
        expected = (self.header.file_size, self.header.mtime_ns)
        if (status.st_size, status.st_mtime_ns) == expected:
            return
        raise UserError(
            f"{self.header.path}: the file changed while being read (it had {expected[0]} bytes, "
            f"it has {status.st_size})",
            "Wait until the download or copy is complete, then start again.",
            EXIT_FAILURE,
        )


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """Open an ordinary file for reading: its descriptor, which the caller closes, and its status.

    Raises:
        UserError: there is no such file, it is a pipe, device or folder, or it cannot be opened.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise malformed(
                path, "is not an ordinary file", "Pipes, devices and folders are not read."
            )
        # Non-blocking, so that a pipe put there since the line above cannot hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unreadable(path, error) from error
    return descriptor, os.fstat(descriptor)


def read_exactly(descriptor: int, path: Path, out: memoryview, offset: int) -> None:
    """Fill `out` from `offset` of the file, however few bytes the kernel hands over at a time.

    Raises:
        UserError: the file ended before, or the disk failed.
    """
    done = 0
    while done < len(out):
        try:
            count = os.preadv(descriptor, [out[done : done + _READ_PIECE]], offset + done)
        except OSError as error:
            raise _unreadable(path, error) from error
        if count == 0:
            raise malformed(path, f"ended at byte {offset + done} while being read")
        done += count


def refuse_lfs_pointer(path: Path, head: bytes | bytearray) -> None:
    """Raise UserError if a file that begins with `head` is a Git LFS pointer."""
    if head.startswith(_LFS_PREFIX):
        raise malformed(
            path,
            "is a Git LFS pointer, a text that stands for the file, not the file itself",
            "Run `git lfs pull` in the model folder, or download the model again.",
        )


def _read_header_bytes(descriptor: int, path: Path, size: int) -> bytes:
    head = bytearray(min(size, 64))
    read_exactly(descriptor, path, memoryview(head), 0)
    refuse_lfs_pointer(path, head)
    if size < _PREFIX_BYTES:
        raise malformed(path, f"has {size} bytes; a safetensors file has at least 8")
    length = int.from_bytes(head[:_PREFIX_BYTES], "little")
    if length == 0:
        raise malformed(path, "says that its header has 0 bytes")
    if length > _MAX_HEADER_BYTES:
        limit = f"at most {_MAX_HEADER_BYTES} are allowed"
        raise malformed(path, f"says that its header has {length} bytes; {limit}")
    if length > size - _PREFIX_BYTES:
        raise malformed(
            path, f"is truncated: its header alone has {length} bytes, the whole file {size}"
        )
    if head[_PREFIX_BYTES : _PREFIX_BYTES + 1] != b"{":
        raise malformed(path, "its header does not begin with '{'")
    raw = bytearray(length)
    read_exactly(descriptor, path, memoryview(raw), _PREFIX_BYTES)
    return bytes(raw)


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise malformed(path, f"__metadata__ must be an object, got {show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise malformed(path, f"__metadata__ {show(key)} must be a string, got {show(value)}")
    return metadata


def _check_entry(name: str, entry: object, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise _EntryError(f"must have exactly dtype, shape and data_offsets, got {show(entry)}")
    dtype = _check_dtype(entry["dtype"])
    shape = _check_integers("shape", entry["shape"])
    if len(shape) > _MAX_DIMS:
        raise _EntryError(f"has {len(shape)} dimensions; at most {_MAX_DIMS} are read")
    # Without the zeros: numpy cannot make an array of shape (0, 2**62, 2**62) either.
    if math.prod(dim for dim in shape if dim) * dtype.itemsize > _MAX_INT64:
        raise _EntryError(f"shape {show(shape)} overflows 64 bits")
    offsets = _check_integers("data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _EntryError(f"data_offsets must be a start and an end after it, got {show(offsets)}")
    start, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - start != needed:
        raise _EntryError(
            f"data_offsets {show(offsets)} span {end - start} bytes, but {entry['dtype']} of "
            f"shape {show(shape)} has {needed}"
        )
    return TensorInfo(name, dtype, shape, path, data_start + start, data_start + end)


def _check_dtype(dtype: object) -> np.dtype[Any]:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    why = " (it packs several values in a byte)" if dtype in SUB_BYTE_DTYPES else ""
    raise _EntryError(f"dtype {show(dtype)} is not read{why}; those that are: {', '.join(DTYPES)}")


def _check_integers(field: str, values: object) -> tuple[int, ...]:
    # `type() is int`: True and 3.0 are not sizes, whatever Python says.
    if not isinstance(values, list) or not all(
        type(value) is int and 0 <= value <= _MAX_INT64 for value in values
    ):
        raise _EntryError(
            f"{field} must be a list of integers from 0 to 2**63-1, got {show(values)}"
        )
    return tuple(values)


def _check_tiling(
    path: Path, tensors: dict[str, TensorInfo], data_start: int, file_size: int
) -> None:
    reached, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        step = info.start - reached
        if step:
            fault = "overlaps" if step < 0 else "leaves a gap after"
            problem = f"{fault} {show(before)} ({abs(step)} bytes)"
            raise malformed(path, f"tensor {show(info.name)}: {problem}")
        reached, before = info.end, info.name
    if reached > file_size:
        raise malformed(
            path,
            f"is truncated: it has {file_size} bytes and should have {reached}; "
            f"{show(before)} is among the tensors lost",
        )
    if reached < file_size:
        raise malformed(path, f"has {file_size - reached} bytes after the last tensor's end")


def _unreadable(path: Path, error: OSError) -> UserError:
    hint = "Check that the file exists, that you may read it and that the disk is healthy."
    return UserError(f"{path}: cannot be read: {error.strerror}", hint, EXIT_FAILURE)
