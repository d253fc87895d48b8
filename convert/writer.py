"""Writing safetensors folders: headers first, then every tensor straight to its final offset.

A `Conversion` says what is to be written; this module does not know whether it is a native or a
Hugging Face folder. Blocks of a tensor arrive in order, are hashed and written, and are gone:
memory holds one source tensor a worker, within a common budget. A worker writes a file at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE, UserError
from bailing_jax.params import Shape
from convert.mapping import SLAB_BYTES
from convert.output_folder import OutputFolder, locked, not_written, write_all
from convert.safetensors_file import DTYPES
from convert.strict_json import malformed, show
from convert.workers import Workers

DATA_ALIGNMENT = 4096  # where a file's data begins: tensors can then be mapped as they lie
# What several workers may hold together beyond the largest tensor.
SPARE_BYTES = 128 * 2**20
_PROCESS_BYTES = 192 * 2**20  # interpreter, numpy, headers; the plan of 10**12 parameters fits

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Progress(Protocol):
    """Told what happens; called from several threads."""

    def begin(self, total_bytes: int, finished_bytes: int) -> None:
        """Say how many bytes of tensors there are, and how many an earlier process wrote."""

    def add(self, tensor: str, num_bytes: int) -> None:
        """Some bytes of a tensor are written."""


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written.

    `blocks` makes C-ordered arrays whose bytes, one after another, are the tensor's; each is good
    until the next is asked for. While it runs it holds at most `memory` bytes and a few slabs.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    memory: int
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class OutFile:
    """A safetensors file to be written, its tensors in the order they lie in it."""

    name: str
    tensors: tuple[OutTensor, ...]
    metadata: Mapping[str, str]

    def header(self) -> bytes:
        """Length, JSON and padding: the bytes before the data."""
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        start = 0
        for tensor in self.tensors:
            end = start + tensor.nbytes
            entries[tensor.name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            start = end
        raw = json.dumps(entries, separators=(",", ":")).encode()
        raw += b" " * (-(len(raw) + 8) % DATA_ALIGNMENT)
        return len(raw).to_bytes(8, "little") + raw

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Folder:
    """A sub-folder that something else makes: its name, its tensors' bytes, and who makes it."""

    name: str
    num_tensors: int
    num_bytes: int
    make: Callable[[Path], None]


@dataclass(frozen=True)
class Conversion:
    """What a folder is to become.

    Attributes:
        files: the weights.
        small: content of the other files, by name.
        last: makes the files that come after all others, from the records of `files`.
        identity: JSON that tells this conversion from any other.
        is_done: whether a folder already is this conversion's result.
        check_unchanged: raises UserError if the source is not what it was.
        notes: remarks for the user, added to while blocks are made.
        folder: made after the weights; when a conversion is resumed, made anew.
        check: run before anything is written; what it reads are `check_bytes`.
    """

    files: tuple[OutFile, ...]
    small: Mapping[str, bytes]
    last: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, bytes]]
    identity: Mapping[str, Any]
    is_done: Callable[[Path], bool]
    check_unchanged: Callable[[], None]
    notes: list[str]
    folder: Folder | None = None
    check: Callable[[Workers, Progress], None] | None = None
    check_bytes: int = 0

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.data_bytes for file in self.files) + self._folder_bytes

    @property
    def num_tensors(self) -> int:
        """Number of all tensors."""
        made = self.folder.num_tensors if self.folder else 0
        return made + sum(len(file.tensors) for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Bytes the folder will need."""
        digest = "0" * 64  # as long as the real ones
        records = {
            file.name: {
                "bytes": len(file.header()) + file.data_bytes,
                "header_sha256": digest,
                "tensors": {tensor.name: digest for tensor in file.tensors},
            }
            for file in self.files
        }
        small = {**self.small, **self.last(records)}
        weights = sum(record["bytes"] for record in records.values())
        return self._folder_bytes + weights + sum(map(len, small.values()))

    @property
    def _folder_bytes(self) -> int:
        return self.folder.num_bytes if self.folder else 0

    def peak_memory(self, workers: int) -> int:
        """An upper bound of the bytes of memory `write` needs."""
        return _budget(self) + 4 * workers * SLAB_BYTES + _PROCESS_BYTES


@dataclass(frozen=True)
class Outcome:
    """What `write` did: bytes written now, and found finished from before."""

    written: int
    resumed: int
    already_complete: bool


def write(conversion: Conversion, path: Path, workers: int, progress: Progress) -> Outcome:
    """Write the folder `path`, or go on with writing it.

    Raises:
        UserError: bad input (nothing stays), or a full or failing disk (what is finished stays in
            the partial folder, to go on from).
    """
    path = Path(os.path.abspath(path))
    with locked(path) as folder:
        if os.path.lexists(path) and not _is_empty_folder(path):
            if not conversion.is_done(path):
                raise already_exists(path)
            folder.discard()
            return Outcome(0, 0, already_complete=True)
        try:
            return _write(conversion, folder, workers, progress)
        except OSError as error:
            raise not_written(path, error) from error


def _write(
    conversion: Conversion, folder: OutputFolder, workers: int, progress: Progress
) -> Outcome:
    folder.begin(conversion.identity)
    pending = [file for file in conversion.files if file.name not in folder.finished]
    finished = sum(f.data_bytes for f in conversion.files if f.name in folder.finished)
    made = sum(record["bytes"] for record in folder.finished.values())
    check_free(folder.path, conversion.total_bytes - made)
    progress.begin(conversion.check_bytes + conversion.data_bytes, finished)
    threads = Workers(workers, _budget(conversion))
    try:
        if conversion.check:
            conversion.check(threads, progress)
        threads.for_each(_FileWriter(folder, threads, progress).write, pending)
        if conversion.folder:
            conversion.folder.make(folder.files / conversion.folder.name)
            folder.sync_folder(conversion.folder.name)
        conversion.check_unchanged()
    except UserError as error:
        # A disk that failed may work again. What was wrong with the input stays wrong.
        if not isinstance(error.__cause__, OSError):
            folder.discard()
        raise
    for name, content in conversion.small.items():
        folder.write_small(name, content)
    for name, content in conversion.last(folder.finished).items():
        folder.write_small(name, content)
    folder.publish()
    return Outcome(conversion.data_bytes - finished, finished, already_complete=False)


class _FileWriter:
    """Writes files into the partial folder; shared by the workers."""

    def __init__(self, folder: OutputFolder, workers: Workers, progress: Progress) -> None:
        self._folder = folder
        self._workers = workers
        self._progress = progress
        self._journal_lock = threading.Lock()

    def write(self, file: OutFile) -> None:
        try:
            record = self._stream(file)
            with self._journal_lock:
                self._folder.finish(file.name, record)
        except BaseException:
            self._folder.drop_temporary(file.name)
            raise

    def _stream(self, file: OutFile) -> dict[str, Any]:
        header = file.header()
        hashes: dict[str, str] = {}
        offset = len(header)
        descriptor = self._folder.open_temporary(file.name)
        try:
            write_all(descriptor, memoryview(header), 0)
            for tensor in file.tensors:
                hashes[tensor.name] = self._stream_tensor(tensor, descriptor, offset)
                offset += tensor.nbytes
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return {
            "bytes": offset,
            "header_sha256": hashlib.sha256(header[8:]).hexdigest(),
            "tensors": hashes,
        }

    def _stream_tensor(self, tensor: OutTensor, descriptor: int, offset: int) -> str:
        digest = hashlib.sha256()
        done = 0
        with self._workers.holding(tensor.memory):
            for block in tensor.blocks():
                self._workers.check()
                data = block.reshape(-1).view(np.uint8).data
                write_all(descriptor, data, offset + done)
                digest.update(data)
                _begin_writing_back(descriptor, offset + done, len(data))
                done += len(data)
                self._progress.add(tensor.name, len(data))
        if done != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {tensor.nbytes} bytes, its blocks {done}")
        return digest.hexdigest()


def _begin_writing_back(descriptor: int, start: int, size: int) -> None:
    """Have the disk write what lies in the cache while we go on, rather than all at the fsync.

    Linux understands that nobody needs these pages any more as exactly that; elsewhere nothing
    happens.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _budget(conversion: Conversion) -> int:
    tensors = (tensor.memory for file in conversion.files for tensor in file.tensors)
    return max(tensors, default=0) + SPARE_BYTES


def already_exists(path: Path) -> UserError:
    """The error for an output that is there and is something else."""
    return UserError(
        f"{path}: already exists and is not the result of this command",
        "Choose another output folder, or delete that one first.",
        EXIT_USAGE,
    )


def check_free(path: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        UserError: fewer than `num_bytes` are free where `path` is to be.
    """
    free = free_bytes(path)
    if free < num_bytes:
        raise UserError(
            f"{path}: {num_bytes / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free",
            "Make room, or choose a folder on another disk.",
            EXIT_DOES_NOT_FIT,
        )


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write to the disk that `path` is to lie on."""
    status = os.statvfs(path.parent)
    return status.f_bavail * status.f_frsize


def check_apart(source: Path, path: Path) -> None:
    """Refuse to write into the folder that is read.

    Raises:
        UserError: one lies inside the other, or they are the same.
    """
    inside, outside = os.path.realpath(path), os.path.realpath(source)
    if os.path.commonpath([inside, outside]) in (inside, outside):
        raise malformed(
            path,
            f"the output must lie outside the source folder {show(str(source))}",
            "Choose a folder beside it.",
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)
