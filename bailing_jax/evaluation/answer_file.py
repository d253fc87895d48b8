"""--output: a JSON line for each problem, written as soon as it is answered.

The file must be new. A line is one write, so what a killed run leaves is whole lines but for the
last; a run that wrote nothing leaves no file. No jax.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Self

from bailing_jax.cli.job import check_paths
from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError


class AnswerFile:
    """Where the lines go; a context manager. None keeps nothing.

    Raises:
        UserError: the file exists already, or can't be made.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._is_empty = True
        self._fd = -1
        if path is None:
            return
        check_paths(None, path)
        try:
            self._fd = os.open(
                path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
            )
        except FileExistsError as error:
            raise UserError(
                f"--output {path}: exists already", "Give another, or remove it.", EXIT_USAGE
            ) from error
        except OSError as error:
            raise _cannot_write(path, error, EXIT_USAGE) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if self._is_empty:
                os.unlink(self._path)
        os.close(self._fd)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            UserError: the disk is full, ...
        """
        if self._path is None:
            return
        rest = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        try:
            while rest:  # once, but for a disk that fills up
                rest = rest[os.write(self._fd, rest) :]
                self._is_empty = False
        except OSError as error:
            raise _cannot_write(self._path, error, EXIT_FAILURE) from error

    def sync(self) -> None:
        """Wait until everything written is on disk.

        Raises:
            UserError: it can't be.
        """
        if self._path is None:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _cannot_write(self._path, error, EXIT_FAILURE) from error


def _cannot_write(path: Path, error: OSError, code: int) -> UserError:
    return UserError(f"--output {path}: cannot be written: {error.strerror or error}", "", code)
