"""A folder that comes into being whole or not at all.

While it is written, everything lies in `.NAME.partial` beside it: `lock` (held for as long as the
process lives), `journal.json` (what is to be made, and the files that are complete) and the files
themselves. A file is written under a temporary name, fsynced, renamed, and only then entered in
the journal; a conversion that was killed goes on with the files the journal lists. One rename of
the folder publishes it. Must not know what the files hold.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from convert.source import read_json
from convert.strict_json import show

_TEMPORARY = ".tmp"
_JOURNAL_LIMIT = 100_000_000


class OutputFolder:
    """The folder to be, locked; make one with `locked`.

    Attributes:
        path: what it will be.
        files: where it is made.
        finished: records of the complete weight files, by name.
    """

    def __init__(self, path: Path, partial: Path) -> None:
        self.path = path
        self.partial = partial
        self.finished: dict[str, dict[str, Any]] = {}
        self.files = partial / "files"
        self._identity: Mapping[str, Any] = {}
        self._ours = False  # what the partial folder holds is this conversion's
        self._gone = False

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Go on with what an earlier process left of the same conversion, or start.

        Args:
            identity: JSON that tells what is made and of what; files made of other things are
                never taken over.

        Raises:
            UserError: the partial folder belongs to another conversion, or its journal is
                damaged.
        """
        self._identity = json.loads(json.dumps(identity))
        journal = self.partial / "journal.json"
        if journal.exists():
            content = self._read_journal(journal)
            self._check_identity(content["identity"])
            self.finished = content["files"]
        self._ours = True
        self.files.mkdir(exist_ok=True)
        for entry in sorted(os.scandir(self.files), key=lambda entry: entry.name):
            record = self.finished.get(entry.name)
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
                continue
            if record is None or entry.stat().st_size != record["bytes"]:
                self.finished.pop(entry.name, None)
                os.unlink(entry.path)
        self.finished = {
            name: record for name, record in self.finished.items() if (self.files / name).exists()
        }
        self._write_journal()

    def open_temporary(self, name: str) -> int:
        """A descriptor to write a file's bytes to, which the caller closes."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return os.open(self.files / (name + _TEMPORARY), flags, 0o666)

    def finish(self, name: str, record: dict[str, Any] | None) -> None:
        """Give a fsynced temporary file its name, and enter it in the journal with its record."""
        os.replace(self.files / (name + _TEMPORARY), self.files / name)
        _fsync(self.files)
        if record is not None:
            self.finished[name] = record
            self._write_journal()

    def drop_temporary(self, name: str) -> None:
        """Remove a file that was not finished."""
        with suppress(FileNotFoundError):
            os.unlink(self.files / (name + _TEMPORARY))

    def write_small(self, name: str, content: bytes) -> None:
        """Write a whole file; these are not journaled, but written anew when resumed."""
        descriptor = self.open_temporary(name)
        try:
            write_all(descriptor, memoryview(content), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.finish(name, None)

    def sync_folder(self, name: str) -> None:
        """Fsync a sub-folder that something else has made, with all that is in it."""
        for folder, _, names in os.walk(self.files / name):
            for file in names:
                _fsync(Path(folder) / file)
            _fsync(Path(folder))

    def publish(self) -> None:
        """Give the folder its name; nothing may be written to it afterwards."""
        os.rename(self.files, self.path)
        _fsync(self.path.parent)
        self._remove_partial()

    def discard(self) -> None:
        """Remove everything, as if nothing had been started."""
        shutil.rmtree(self.files, ignore_errors=True)
        self._remove_partial()

    def leave(self) -> None:
        """Keep what is finished for another process to go on with; without any, remove all.

        What another process began stays, too, if this one never began.
        """
        nobodys = self._ours or not (self.partial / "journal.json").exists()
        if not self._gone and not self.finished and nobodys:
            self.discard()

    def _remove_partial(self) -> None:
        """The lock goes last: while it exists nobody else can have begun."""
        self._gone = True
        for name in ("journal.json", "journal.json" + _TEMPORARY, "lock"):
            with suppress(FileNotFoundError):
                os.unlink(self.partial / name)
        # Not empty: another process has just made a lock of its own in it.
        with suppress(OSError):
            os.rmdir(self.partial)

    def _check_identity(self, found: object) -> None:
        difference = first_difference(found, self._identity)
        if difference:
            raise UserError(
                f"{self.partial}: holds an unfinished conversion that is not this one: "
                f"{difference}",
                "Run the command that began it again, or delete that folder to start anew.",
                EXIT_USAGE,
            )

    def _read_journal(self, path: Path) -> dict[str, Any]:
        damaged = UserError(
            f"{self.partial}: its journal is damaged, so what is finished there is not known",
            "To start anew, delete that folder.",
            EXIT_USAGE,
        )
        try:
            content = read_json(path, "the journal", _JOURNAL_LIMIT)
        except UserError as error:
            raise error if isinstance(error.__cause__, OSError) else damaged from error
        if content.pop("sha256", None) != _digest(content):
            raise damaged
        return content

    def _write_journal(self) -> None:
        path = self.partial / "journal.json"
        temporary = path.with_name(path.name + _TEMPORARY)
        journal = {"identity": self._identity, "files": self.finished}
        content = json.dumps({**journal, "sha256": _digest(journal)}).encode()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, memoryview(content), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _fsync(self.partial)


@contextmanager
def locked(path: Path) -> Iterator[OutputFolder]:
    """Lock the folder to be written at `path`.

    On leaving, a partial folder in which nothing is finished is removed; any other stays and can
    be resumed, unless it was published or discarded.

    Raises:
        UserError: the place can't be written to, or another process writes there.
    """
    path = Path(os.path.abspath(path))
    if not path.name or not path.parent.is_dir():
        raise UserError(
            f"{path}: the folder it is to be made in does not exist",
            f"Create it first: mkdir -p {path.parent}",
            EXIT_USAGE,
        )
    if os.path.ismount(path):
        raise UserError(
            f"{path}: is a mount point, and the output is renamed into place when complete",
            f"Name a folder inside it, such as {path / 'model'}.",
            EXIT_USAGE,
        )
    partial = path.parent / f".{path.name}.partial"
    descriptor = _lock(path, partial)
    folder = OutputFolder(path, partial)
    try:
        yield folder
    finally:
        folder.leave()
        os.close(descriptor)


def _lock(path: Path, partial: Path) -> int:
    while True:
        try:
            if not path.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "its folder is gone")
            partial.mkdir(exist_ok=True)
            descriptor = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # removed by a process that just finished, between the two lines above
        except FileExistsError as error:
            # mkdir found something that is no folder, or was none any more when it looked again.
            if _is_in_the_way(partial):
                raise not_written(path, error) from error
            continue
        except OSError as error:
            raise not_written(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(
                f"{path}: another conversion is writing to it",
                "Wait until it has finished, or choose another output folder.",
                EXIT_FAILURE,
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise not_written(path, error) from error
        # The file that was locked may be gone: its owner finished and removed it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(partial / "lock"), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _is_in_the_way(partial: Path) -> bool:
    """Whether something other than a folder has the name, which no conversion makes or removes."""
    try:
        return not stat.S_ISDIR(os.lstat(partial).st_mode)
    except FileNotFoundError:
        return False


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however little the kernel takes at a time."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def not_written(path: Path, error: OSError) -> UserError:
    """The error for an output that can't be written."""
    return UserError(
        f"{path}: cannot be written: {error.strerror or error}",
        "Check free space, quota and permissions of the disk it lies on; then run the same "
        "command again: it goes on with the files that are complete.",
        EXIT_FAILURE,
    )


def first_difference(found: object, wanted: object, where: str = "") -> str:
    """Where two JSON values differ first, in words; empty if they do not."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*found, *wanted}, key=str):
            inner = f"{where}.{key}" if where else str(key)
            if key not in found or key not in wanted:
                return f"{inner} is only in {'this one' if key in wanted else 'that one'}"
            difference = first_difference(found[key], wanted[key], inner)
            if difference:
                return difference
        return ""
    if found == wanted and type(found) is type(wanted):
        return ""
    return f"{where or 'it'} is {show(found)} there and {show(wanted)} here"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _fsync(path: Path) -> None:
    """Of a file its content, of a folder its names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
