"""Running a command of the converter in this process, and judging how it refused."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from convert.__main__ import main


class Run(NamedTuple):
    """What a command did; `raised` is an exception that nobody caught."""

    code: int | None
    stdout: str
    stderr: str
    raised: str


def run(*arguments: str | Path) -> Run:
    """Run the converter in this process."""
    stdout, stderr, code, raised = io.StringIO(), io.StringIO(), None, ""
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = main([str(argument) for argument in arguments])
        except BaseException as error:
            raised = repr(error)
    return Run(code, stdout.getvalue(), stderr.getvalue(), raised)


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything under a folder: kind, size, mtime and, unless it is huge, content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status, content = path.lstat(), b""
        if stat.S_ISREG(status.st_mode) and status.st_size < 2**24:
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path).encode()
        when = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, when, content)
    return found


def refusal_problems(done: Run, code: int, said: Iterable[str]) -> list[str]:
    """What is wrong with how a command refused."""
    first, _, _ = done.stderr.partition("\n")
    checks = {
        f"raised {done.raised}": not done.raised,
        f"exit code {done.code}, not {code}": done.code == code,
        "no error: line": first.startswith("error: "),
        "a traceback": "Traceback" not in done.stderr,
        "a result on stdout": not done.stdout,
        "more than 4000 characters": len(done.stderr) < 4000,
        "control characters": done.stderr.replace("\n", "").isprintable(),
    }
    checks |= {f"does not say {text!r}": text in done.stderr for text in said}
    return [problem for problem, good in checks.items() if not good]
