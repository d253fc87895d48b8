"""Runs `python -m bailing_jax.evaluate` in this process, as it is typed, with small sizes."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bailing_jax.errors import EXIT_OK
from bailing_jax.evaluate import main


@functools.cache
def programs() -> Path:
    """A compile cache that all tests of a process share."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = EXIT_OK) -> tuple[str, str]:
    """The command; what it wrote on stdout and on stderr."""
    assert main([str(arg) for arg in (*args, "--compile-cache", programs())]) == code
    return capsys.readouterr()


def result(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """The JSON line, the only thing on stdout."""
    out, _ = run(capsys, *args, "--json")
    assert out.count("\n") == 1
    return json.loads(out)


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of --output."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
