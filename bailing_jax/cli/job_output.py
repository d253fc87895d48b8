"""The answers of a job: one JSON line each, appended as they come, read again to go on.

A line is one write, so a kill leaves at most the last one torn. On the next start complete lines
count as done, a torn last line is cut off, and anything this job can't have written is refused:
a file of something else must not be cut or appended to. A lock keeps a second job out. No jax.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from bailing_jax.cli.job_input import RequestId, Requests, parse_json
from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from bailing_jax.terminal import json_line

if TYPE_CHECKING:
    from bailing_jax.request import CompletionOutput, Request

SYNC_S = 5.0
KEPT = "Finished answers are kept; the same command goes on."

_START = b'{"id": '
_ANSWER = frozenset({"text", "token_ids", "finish_reason"})


class Output:
    """Where answers go; a context manager. stdout has no lock and is never read.

    Args:
        path: the file; None: stdout.
        say: called with remarks.

    Raises:
        UserError: it can't be opened, is no regular file, or another job writes it.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None]) -> None:
        self.name = "stdout" if path is None else str(path)
        self._say = say
        self._path = path
        self._created = False
        self._end = self._torn = 0
        self._synced = time.monotonic()
        try:
            self._fd = _stdout() if path is None else self._open(path)
        except OSError as error:
            raise self._cannot_write(error, EXIT_USAGE) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if self._created and not os.fstat(self._fd).st_size:
                # Nothing ran: leave nothing behind. The lock is still held.
                os.unlink(os.path.realpath(self._path))
        os.close(self._fd)

    @property
    def goes_on(self) -> bool:
        """Whether the same job can be continued."""
        return self._path is not None

    def read_done(self, requests: Requests) -> bytearray:
        """A byte for each request: whether its answer is there already.

        Raises:
            UserError: a line that this job did not write.
        """
        done = bytearray(len(requests))
        if self._path is None:
            return done
        size = os.fstat(self._fd).st_size
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for line, raw in enumerate(file, 1):
                if self._end + len(raw) == size and _is_torn(raw):
                    self._torn = len(raw)
                    break
                try:
                    number = _number(raw, requests)
                    if done[number]:
                        _refuse("its id stands there twice")
                except UserError as error:
                    self._not_ours(line, raw, error)
                done[number] = 1
                self._end += len(raw)
        return done

    def start(self) -> None:
        """Cut off a torn last line; until here the file is as it was found."""
        if self._torn:
            self._say(
                f"{self.name}: its last line is torn ({self._torn} bytes); cutting it off to "
                "answer that request again"
            )
            try:
                os.ftruncate(self._fd, self._end)
            except OSError as error:
                raise self._cannot_write(error) from error
            self._torn = 0

    def write(self, record: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            UserError: the disk is full, the reader went away, ...
        """
        rest = memoryview(json_line(record).encode() + b"\n")
        try:
            while rest:  # once, but for a disk that fills up and a pipe
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise self._cannot_write(error) from error
        if time.monotonic() - self._synced >= SYNC_S:
            self.sync()

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
            raise self._cannot_write(error) from error
        self._synced = time.monotonic()

    def _open(self, path: Path) -> int:
        while True:
            self._created = not path.exists()
            if not self._created and not stat.S_ISREG(path.stat().st_mode):
                _refuse(f"{self.name}: not a regular file", "Use - for stdout.")
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._lock(fd)
                # A job that ran nothing may have removed the file before it gave the lock back.
                if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.name}: another job is writing it",
                "Wait until it ends, or give another output.",
                EXIT_USAGE,
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            self._say(f"{self.name}: cannot be locked here; start no second job on it")

    def _cannot_write(self, error: OSError, code: int = EXIT_FAILURE) -> UserError:
        hint = KEPT if code == EXIT_FAILURE and self.goes_on else ""
        return UserError(f"{self.name}: cannot be written: {error.strerror or error}", hint, code)

    def _not_ours(self, line: int, raw: bytes, error: UserError) -> NoReturn:
        raise UserError(
            f"{self.name}, line {line}: not an output of this job: {error.message}: {raw[:60]!r}",
            "Give another output, or the input this one was made from.",
            EXIT_USAGE,
        ) from error


def record_of(request_id: RequestId, request: Request) -> dict[str, Any]:
    """The line of a finished request, a function of the request alone: no times, no order."""
    outputs = request.output().outputs
    usage = {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": sum(len(output.token_ids) for output in outputs),
    }
    if request.params.n == 1:
        return {"id": request_id, **_answer(outputs[0]), "usage": usage}
    return {"id": request_id, "outputs": [_answer(output) for output in outputs], "usage": usage}


def _answer(output: CompletionOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.error is not None:
        answer["error"] = output.error
    if output.logprobs is not None:
        answer["logprobs"] = [
            # JSON has no infinities.
            {str(token): x if math.isfinite(x) else None for token, x in entry.items()}
            for entry in output.logprobs
        ]
    return answer


def _number(raw: bytes, requests: Requests) -> int:
    """Which request a complete line answers."""
    record = parse_json(raw)
    if not _is_record(record):
        _refuse("not an answer")
    number = requests.number(record["id"])
    if number is None:
        _refuse("its id is not in the input")
    return number


def _is_record(value: object) -> bool:
    """Whether it has the form `record_of` gives."""
    if not isinstance(value, dict) or "id" not in value or not isinstance(value.get("usage"), dict):
        return False
    rest = {name: item for name, item in value.items() if name not in ("id", "usage")}
    answers = rest["outputs"] if rest.keys() == {"outputs"} else [rest]
    return isinstance(answers, list) and all(
        isinstance(answer, dict)
        and _ANSWER <= answer.keys() <= _ANSWER | {"logprobs", "error"}
        and isinstance(answer["token_ids"], list)
        for answer in answers
    )


def _is_torn(raw: bytes) -> bool:
    """Whether the last line of a file is the beginning of one of ours.

    A line without its end, or after a power cut with zeros in place of it. What is whole JSON but
    no answer, or starts otherwise, is somebody's data.
    """
    body = raw.rstrip(b"\0\n")
    if not (body.startswith(_START) or _START.startswith(body)):
        return False
    try:
        record = parse_json(raw)
    except UserError:
        return True
    return not raw.endswith(b"\n") and _is_record(record)


def _stdout() -> int:
    """stdout's descriptor: Python's own buffer would be flushed again after a failure."""
    if sys.stdout is None:
        _refuse("stdout is closed")
    sys.stdout.flush()
    return sys.stdout.fileno()


def _refuse(message: str, hint: str = "") -> NoReturn:
    raise UserError(message, hint, EXIT_USAGE)
