"""JSON from strangers, parsed strictly, and the errors that name what is wrong with a file.

Stricter than `json.loads`: UTF-8 only, no key twice in an object, no NaN or Infinity (nor 1e999),
bounded depth and number of items, an object on top.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bailing_jax.errors import EXIT_USAGE, UserError

DOWNLOAD_AGAIN = (
    "Download the file again and compare its size and checksum with the published ones."
)

_MAX_JSON_DEPTH = 200
# Commas and brackets together bound the number of objects a parse can build: about 190,000
# tensors in one file. A trillion parameters in fp8 are 120,000 tensors, in many files.
_MAX_JSON_ITEMS = 2**21
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CURLY_TO_SQUARE = bytes.maketrans(b"{}", b"[]")

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 160
_shorten.maxlist = 10


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse strict JSON that must be an object; `path` and `what` are named in errors.

    Stricter than `json.loads`: UTF-8 only, no key twice in an object, no NaN or Infinity (nor
    1e999), bounded depth and number of items.

    Raises:
        UserError: the bytes are not that.
    """
    brackets = raw.translate(_CURLY_TO_SQUARE, _NOT_BRACKETS)
    if raw.count(b",") + len(brackets) > _MAX_JSON_ITEMS:
        raise malformed(path, f"{what} has more than {_MAX_JSON_ITEMS} JSON items")
    # Checked before parsing, because how deep the parser may go depends on the caller's stack.
    # Brackets inside strings count too, which is why the limit is far above any real file's.
    if _depth(brackets) > _MAX_JSON_DEPTH:
        raise malformed(path, f"{what} is nested deeper than {_MAX_JSON_DEPTH} levels")
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite_float,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"{what} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise malformed(path, f"{what} must be a JSON object, got {show(document)}")
    return document


def malformed(path: Path, problem: str, hint: str = DOWNLOAD_AGAIN) -> UserError:
    """Build the error for a file whose content or kind is wrong."""
    return UserError(f"{path}: {problem}", hint, EXIT_USAGE)


def show(value: object) -> str:
    """Untrusted values for messages: control characters escaped, long ones cut."""
    return _shorten.repr(value)


def _depth(brackets: bytes) -> int:
    steps = np.where(np.frombuffer(brackets, np.uint8) == ord("["), 1, -1)
    return int(steps.cumsum().max(initial=0))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {show(twice)} appears twice")
    return result


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {show(text)} is out of range")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
