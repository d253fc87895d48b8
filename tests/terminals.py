"""Processes at a real terminal: what is typed there, and what they show."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Ctrl-C on this terminal is for this process, which takes it as Python does.
_AT_TERMINAL = """
import fcntl, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


class Terminal:
    """A Python program whose stdin is a terminal; stdout and stderr are too, or are `pipes`.

    What can be seen is called "screen", and "out" and "err" where these are pipes.
    """

    def __init__(
        self, program: str, *args: object, folder: Path, pipes: tuple[str, ...] = ()
    ) -> None:
        """Start it; processes with the same `folder` share their compiled programs."""
        self._keyboard, inside = os.openpty()
        ends = {name: subprocess.PIPE if name in pipes else inside for name in ("out", "err")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL + program, *map(str, args)],
            stdin=inside,
            stdout=ends["out"],
            stderr=ends["err"],
            start_new_session=True,
            env=_environment(folder),
        )
        os.close(inside)
        self._files = {"screen": self._keyboard}
        for name, stream in (("out", self.process.stdout), ("err", self.process.stderr)):
            if stream is not None:
                self._files[name] = stream.fileno()
        self.seen = dict.fromkeys(self._files, b"")
        self._read = dict.fromkeys(self._files, 0)

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def press_ctrl_c(self) -> None:
        """Ctrl-C where a line is awaited, once the program sleeps.

        Between the echo of a key and its wait for the next one, Python's line editing notices a
        signal only when another key comes (`readline_until_enter_or_signal` of CPython); a person
        is never that quick, a test is.
        """
        give_up = time.monotonic() + 120
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < give_up, self.seen
            time.sleep(0.01)
        self.type("\x03")

    def wait_for(self, name: str, word: str) -> None:
        """Read until `word` comes, after what was waited for before."""
        give_up = time.monotonic() + 120
        while (found := self.seen[name].find(word.encode(), self._read[name])) < 0:
            assert time.monotonic() < give_up, (word, self.seen)
            ready = select.select([self._files[name]], [], [], 1)[0]
            new = os.read(self._files[name], 4096) if ready else b""
            assert new or not ready, (word, self.seen)
            self.seen[name] += new
        self._read[name] = found + len(word.encode())

    def end(self) -> int:
        """Read until the process ends; its exit code."""
        give_up = time.monotonic() + 120
        while self.process.poll() is None:
            assert time.monotonic() < give_up, self.seen
            self._drain(0.1)
        self._drain(0)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        os.close(self._keyboard)

    def _drain(self, patience: float) -> None:
        for name, file in self._files.items():
            with contextlib.suppress(OSError):  # how a terminal ends
                while select.select([file], [], [], patience)[0] and (new := os.read(file, 4096)):
                    self.seen[name] += new


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "INPUTRC": os.devnull,
        "TERM": "dumb",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def programs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compile cache for all processes of a test run."""
    return tmp_path_factory.getbasetemp() / "terminal_programs"
