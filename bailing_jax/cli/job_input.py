"""The requests of a job: a file with one JSON object a line, checked before anything runs.

The first reading checks every line and keeps of it only where it starts, its checksum and its id,
some 200 bytes whatever the prompt's length; a line is parsed again when its turn comes. So a
million requests take a few hundred megabytes, not the gigabytes of their prompts or token ids.
What can't be read twice (stdin, a pipe) is copied into an unnamed temporary file first. No jax.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.sampling_params import SamplingParams, from_mapping

RequestId = str | int

SOURCES = ("prompt", "messages", "prompt_ids")
SAMPLING = tuple(field.name for field in fields(SamplingParams))
MAX_MISTAKES = 20
# A file of another kind may be one "line" of gigabytes.
MAX_LINE_BYTES = 64_000_000
_MAX_SHOWN = 300


@dataclass(frozen=True)
class JobRequest:
    """One line of the input.

    Attributes:
        id: what its answer is called; 7 and "7" are two ids.
        source: which of SOURCES it brings.
        prompt: the value of that field.
        params: how to answer.
    """

    id: RequestId
    source: str
    prompt: Any
    params: SamplingParams


class Mistakes:
    """What is wrong with the lines of a file, so that it can be said all at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: list[str] = []
        self._hints: dict[str, None] = {}
        self._options: set[str] = set()

    @contextlib.contextmanager
    def on_line(self, number: int) -> Iterator[None]:
        """Note a UserError of the body; the last one that is listed raises them all."""
        try:
            yield
        except UserError as error:
            message = error.message
            if len(message) > _MAX_SHOWN:
                message = message[:_MAX_SHOWN] + "..."
            self._found.append(f"{self._name}, line {number}: {message}")
            self._hints[error.hint] = None
            # A sampling field is a key of the line; the others can only have come from flags.
            self._options |= error.options - set(SAMPLING)
            if len(self._found) == MAX_MISTAKES:
                self._found.append(f"only the first {MAX_MISTAKES} mistakes are listed")
                self.check()

    def check(self) -> None:
        """Raise a UserError if anything was noted."""
        if self._found:
            # A hint that fits only some of the lines would mislead.
            hint = next(iter(self._hints)) if len(self._hints) == 1 else ""
            raise UserError("\n".join(self._found), hint, EXIT_USAGE, options=self._options)


class Requests:
    """The checked requests of a job, by their position in the file; a context manager.

    Args:
        path: the file; None: stdin.
        defaults: sampling fields for lines that do not name them.

    Raises:
        UserError: the file can't be read, or lines of it can't be used; lists the mistakes.
    """

    def __init__(self, path: Path | None, defaults: Mapping[str, object]) -> None:
        self.name = "stdin" if path is None else str(path)
        self._defaults = {"seed": 0, **defaults}
        _params(self._defaults)  # a mistake in a flag is not one of every line
        self._starts, self._lines, self._sums = array("Q"), array("Q"), array("I")
        self._numbers: dict[RequestId, int] = {}
        try:
            self._file = _open(path)
            try:
                self._read()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise UserError(
                f"{self.name}: cannot be read: {error.strerror}", exit_code=EXIT_USAGE
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, request_id: object) -> int | None:
        """The position of the request with this id, or None."""
        # True and 1.0 would be found as 1.
        return self._numbers.get(request_id) if _is_id(request_id) else None  # pyright: ignore

    def forget_ids(self) -> None:
        """Give the memory of the ids back; `number` knows nothing any more."""
        self._numbers.clear()

    def line(self, number: int) -> int:
        """The line a request stands on, from 1."""
        return self._lines[number]

    def load(self, number: int) -> JobRequest:
        """Parse a request again.

        Raises:
            UserError: the line changed since it was checked; does not name it.
        """
        try:
            self._file.seek(self._starts[number])
            raw = self._file.readline(MAX_LINE_BYTES + 1)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}") from error
        if zlib.crc32(raw.rstrip()) != self._sums[number]:
            raise UserError("changed since the job started")
        return _parse(raw, self.line(number), self._defaults)

    def _read(self) -> None:
        mistakes = Mistakes(self.name)
        start = number = 0
        while raw := self._file.readline(MAX_LINE_BYTES + 1):
            number += 1
            with mistakes.on_line(number):
                if len(raw) > MAX_LINE_BYTES:
                    _refuse(f"longer than {MAX_LINE_BYTES} bytes")
                if raw.strip():
                    self._add(_parse(raw, number, self._defaults).id, raw, number, start)
            if len(raw) > MAX_LINE_BYTES:
                break  # what follows would be read as a line of its own
            start += len(raw)
        mistakes.check()
        if not self._starts:
            _refuse(f"{self.name}: no requests", "One JSON object a line is wanted.")

    def _add(self, request_id: RequestId, raw: bytes, line: int, start: int) -> None:
        if request_id in self._numbers:
            first = self._lines[self._numbers[request_id]]
            _refuse(f"id = {request_id!r}; line {first} has the same")
        self._numbers[request_id] = len(self._starts)
        self._starts.append(start)
        self._lines.append(line)
        self._sums.append(zlib.crc32(raw.rstrip()))


def parse_json(raw: bytes) -> Any:
    """The JSON value in some bytes; stricter than `json.loads`.

    Raises:
        UserError: not UTF-8, not JSON, a key that stands twice, or NaN.
    """
    try:
        return json.loads(
            raw.rstrip().decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start]:#04x} at column {error.start + 1}"
        raise UserError(f"not UTF-8: {where}", exit_code=EXIT_USAGE) from error
    except json.JSONDecodeError as error:
        shown = raw[:60].decode("utf-8", "replace").rstrip()
        raise UserError(
            f"not JSON: {error.msg} at column {error.colno}: {shown}", exit_code=EXIT_USAGE
        ) from error
    except RecursionError as error:
        raise UserError("not JSON: nested too deep", exit_code=EXIT_USAGE) from error
    except ValueError as error:  # ours, and Python's for an integer of thousands of digits
        raise UserError(f"not JSON: {error}", exit_code=EXIT_USAGE) from error


def _open(path: Path | None) -> IO[bytes]:
    """The input as a file that can be read twice."""
    if path is None and sys.stdin is None:
        _refuse("stdin is closed")
    source = sys.stdin.buffer if path is None else path.open("rb")
    if path is not None and source.seekable():
        return source
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    shutil.copyfileobj(source, copy)
    copy.seek(0)
    if path is not None:
        source.close()
    return copy


def _parse(raw: bytes, line: int, defaults: Mapping[str, object]) -> JobRequest:
    values = parse_json(raw)
    if not isinstance(values, dict):
        _refuse(f"{values!r:.60} is no JSON object")
    if b"\\u" in raw:
        _check_unicode(values)
    unknown = [repr(name) for name in values if name not in ("id", *SOURCES, *SAMPLING)]
    if unknown:
        known = ", ".join(("id", *SOURCES, *SAMPLING))
        _refuse(f"unknown key {', '.join(unknown)}", f"Known: {known}")
    request_id = values.get("id", line)
    if not _is_id(request_id):
        _refuse(f"id = {_json(request_id)}; allowed: a string or an integer")
    given = [source for source in SOURCES if source in values]
    if len(given) != 1:
        _refuse(f"{' and '.join(given) or 'no prompt'}; allowed: one of {', '.join(SOURCES)}")
    _check_prompt(given[0], values[given[0]])
    own = {name: values[name] for name in SAMPLING if name in values}
    return JobRequest(request_id, given[0], values[given[0]], _params({**defaults, **own}))


def _check_prompt(source: str, value: object) -> None:
    """The prompt's JSON type; the model checks the rest."""
    if source == "prompt":
        good, allowed = isinstance(value, str), "a string"
    elif source == "messages":
        good = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        allowed = "a list of {role, content} objects"
    else:
        good = isinstance(value, list) and all(type(item) is int for item in value)
        allowed = "a list of token ids"
    if not good or (source != "prompt" and not value):
        _refuse(f"{source} = {_json(value)}; allowed: {allowed}")


def _params(values: Mapping[str, object]) -> SamplingParams:
    try:
        params = from_mapping(values, "--sampling")
    except (ValueError, OverflowError) as error:  # numbers of more digits than Python takes
        raise UserError(f"a sampling field: {error}", exit_code=EXIT_USAGE) from error
    if params.seed is None:
        # A seed drawn afresh would give another answer after every interruption.
        _refuse("seed = null; allowed: an integer from 0 to 18446744073709551615")
    return params


def _check_unicode(values: Mapping[str, object]) -> None:
    for name, value in values.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            surrogate = error.object[error.start]
            _refuse(f"{name!r:.60} = {_json(value)}; not Unicode: lone surrogate {surrogate!r}")
        except RecursionError:
            _refuse(f"{name!r:.60}: nested too deep")


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _json(value: object) -> str:
    """A value as the file has it, short enough to show."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _refuse(message: str, hint: str = "") -> NoReturn:
    raise UserError(message, hint, EXIT_USAGE)
