"""Runs conversions in processes that die, stop or meet a failing disk at a chosen step.

A script: `faulty_converter.Converter` starts it, because a process with threads, as pytest has,
is no good for forking. It answers one JSON request a line. For each it forks processes that run
`convert.__main__.main` with the functions that change the disk wrapped, in those processes alone:
the calls are counted, and the one that the request names comes to harm.

What the fault `do`es, at the `step`-th call (`of` one function, or of any):
    kill   SIGKILL just before it
    half   SIGKILL when half of its bytes are written (of pwrite)
    lose   SIGKILL just before it, and what was not fsynced is lost: those files are empty
    stop   SIGSTOP just before it; the request {"go_on": pid} lets it run on
    fail   OSError with `errno` instead of it
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from convert import (
    commands,  # noqa: F401  (imported before the forks, not in each of them)
    side_files,
    to_hf,
)
from convert.__main__ import main

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WRAPPED: tuple[tuple[types.ModuleType, str], ...] = (
    *((os, name) for name in ("open", "pwrite", "fsync", "replace", "rename")),
    *((os, name) for name in ("unlink", "mkdir", "rmdir")),
    (fcntl, "flock"),
)
# What Python itself reports, whichever function was called; the last ones are not wrapped.
AUDITED = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock",
    "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime",
)  # fmt: skip

# Looking at a tokenizer takes a process and half a second; its answer is the same each time.
_try_out = functools.cache(side_files._try_out)


def contents(folder: str | Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by relative name; of folders, that they are."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Steps:
    """Counts the calls that change the disk, and does the harm at the one chosen."""

    def __init__(self, fault: dict[str, Any] | None) -> None:
        self.log: list[tuple[str, str, int]] = []
        self.audited = 0
        self._fault = fault or {}
        self._lock = threading.RLock()
        self._count = 0
        self._paths: dict[int, str] = {}
        self._unsynced: dict[int, int] = {}  # by inode a descriptor, which outlives a rename
        self._real: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Wrap the functions."""
        for module, name in WRAPPED:
            self._real[name] = getattr(module, name)
            setattr(module, name, functools.partial(self._call, name))

    def audit(self, below: str) -> None:
        """Have Python count what happens `below` a folder."""

        def count(event: str, args: tuple[Any, ...]) -> None:
            if event in AUDITED or (event == "open" and args[2] & WRITING):
                self.audited += event == "fcntl.flock" or str(args[0]).startswith(below)

        sys.addaudithook(count)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name != "open" or args[1] & WRITING:
            with self._lock:
                self._step(name, args)
        # A killed process loses nothing it did not fsync, so the tests need not wait for a disk.
        result = None if name == "fsync" else self._real[name](*args, **kwargs)
        with self._lock:
            if name == "open":
                self._paths[result] = str(args[0])
            elif name == "pwrite" and os.fstat(args[0]).st_ino not in self._unsynced:
                self._unsynced[os.fstat(args[0]).st_ino] = os.dup(args[0])
            elif name == "fsync" and os.fstat(args[0]).st_ino in self._unsynced:
                os.close(self._unsynced.pop(os.fstat(args[0]).st_ino))
        return result

    def _step(self, name: str, args: tuple[Any, ...]) -> None:
        if self._fault.get("of") in (None, name):
            self._count += 1
            if self._count == self._fault.get("step"):
                self._harm(args)
        where = self._paths[args[0]] if isinstance(args[0], int) else str(args[0])
        self.log.append((name, where, len(args[1]) if name == "pwrite" else 0))

    def _harm(self, args: tuple[Any, ...]) -> None:
        kind = self._fault["do"]
        if kind == "fail":
            raise OSError(self._fault["errno"], os.strerror(self._fault["errno"]))
        if kind == "half":
            descriptor, data, offset = args
            self._real["pwrite"](descriptor, data[: len(data) // 2], offset)
        if kind == "lose":
            for descriptor in self._unsynced.values():
                os.ftruncate(descriptor, 0)
        os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)


class Server:
    """Answers requests; keeps the processes that it started and that have not ended."""

    def __init__(self) -> None:
        self._running: dict[int, list[IO[bytes]]] = {}

    def answer(self, request: dict[str, Any]) -> Any:
        if "contents" in request:
            return contents(request["contents"])
        if "command" in request:
            done = subprocess.run(request["command"], capture_output=True, text=True, check=False)
            return [done.returncode, done.stderr]
        if "go_on" in request:
            os.kill(request["go_on"], signal.SIGCONT)
            return self._wait(request["go_on"])
        return self._convert(request["runs"], request["at_once"])

    def end(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)

    def _convert(self, requests: list[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
        for tokenizer in {Path(r["argv"][1], "tokenizer.json") for r in requests}:
            if tokenizer.is_file():
                _try_out(tokenizer, tokenizer.read_bytes())
        ended = []
        for first in range(0, len(requests), at_once):
            waiting, go = os.pipe()
            group = requests[first : first + at_once]
            pids = [self._fork(request, waiting, go) for request in group]
            os.close(waiting)
            os.close(go)  # all begin now
            ended += [self._wait(pid) for pid in pids]
        return ended

    def _fork(self, request: dict[str, Any], waiting: int, go: int) -> int:
        files: list[IO[bytes]] = []
        for _ in ("out", "err", "log"):
            files.append(tempfile.TemporaryFile())  # noqa: SIM115  (closed by _wait)
        pid = os.fork()
        if pid:
            self._running[pid] = files
            return pid
        code = 70
        try:
            os.close(go)
            os.read(waiting, 1)
            os.dup2(files[0].fileno(), 1)
            os.dup2(files[1].fileno(), 2)
            code = _run(request, files[2].fileno())
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _wait(self, pid: int) -> dict[str, Any]:
        _, status = os.waitpid(pid, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        files = self._running[pid] if stopped else self._running.pop(pid)
        # Not through their positions: a process that was stopped writes on from there.
        out, err, log = (os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0) for f in files)
        for file in [] if stopped else files:
            file.close()
        return {
            "pid": pid,
            "code": None if stopped else os.waitstatus_to_exitcode(status),
            "out": out.decode(),
            "err": err.decode(),
            **json.loads(log or b'{"steps": [], "audited": 0}'),
        }


def _run(request: dict[str, Any], log: int) -> int:
    """In the forked process: the conversion, and its steps if they are to be watched."""
    side_files._try_out = _try_out
    to_hf.SHARD_BYTES = request["shard_bytes"] or to_hf.SHARD_BYTES
    if request["boundless"]:
        fields = tuple(os.statvfs("/"))
        endless = os.statvfs_result((*fields[:3], 2**50, 2**50, *fields[5:]))
        os.statvfs = lambda _path: endless
    steps = Steps(request["fault"])
    steps.install()
    if not request["watched"]:
        return main(request["argv"])
    steps.audit(str(Path(request["argv"][2]).parent))
    code = main(request["argv"])
    os.write(log, json.dumps({"steps": steps.log, "audited": steps.audited}).encode())
    return code


def serve() -> None:
    """Answer every line of the input with a line."""
    server = Server()
    gc.freeze()  # a forked process need not copy what its collector would only look at
    try:
        for line in sys.stdin:
            print(json.dumps(server.answer(json.loads(line))), flush=True)
    finally:
        server.end()


if __name__ == "__main__":
    serve()
