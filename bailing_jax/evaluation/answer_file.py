"""--output: a JSON line for each problem, written as soon as it is answered.

The file must be new. A line is one write, so what a killed run leaves is whole lines but for the
last; a run that wrote nothing leaves no file. One that is interrupted says what it leaves. No jax.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from bailing_jax.cli.job import check_paths
from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, Interrupted, UserError
from bailing_jax.terminal import is_terminal, json_line

Say = Callable[[str], None]


class AnswerFile:
    """Where the lines go; a context manager. None keeps nothing.

    Raises:
        UserError: the file exists already, or can't be made.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._written = 0
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
            if os.fstat(self._fd).st_size == 0:
                os.unlink(self._path)
        os.close(self._fd)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            UserError: the disk is full, ...
        """
        self._written += 1
        if self._path is None:
            return
        rest = memoryview(json_line(record).encode() + b"\n")
        try:
            while rest:  # once, but for a disk that fills up
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise _cannot_write(self._path, error, EXIT_FAILURE) from error

    @contextlib.contextmanager
    def whole_run(self, all_of_them: str, say: Say) -> Iterator[None]:
        """Around a run: afterwards its lines are on disk, also where Ctrl-C ended it early.

        Args:
            all_of_them: how many lines of what a whole run has.
            say: called with what an interrupted run leaves.

        Raises:
            UserError: the lines can't be written.
            KeyboardInterrupt: after saying so.
        """
        try:
            yield
        except KeyboardInterrupt:
            self._sync()
            # A terminal has just shown ^C, and stays on its line.
            line = "\n" * is_terminal(sys.stderr) + f"{self._written} of {all_of_them} are done"
            say(line + f", and in {self._path}" * (self._path is not None))
            raise Interrupted from None
        self._sync()

    def _sync(self) -> None:
        if self._path is None:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _cannot_write(self._path, error, EXIT_FAILURE) from error


def _cannot_write(path: Path, error: OSError, code: int) -> UserError:
    what = f"--output {path}: cannot be written: {error.strerror or error}"
    return UserError(what, "Make room, or give another file.", code)
