"""The converter's progress on stderr: tensor, share, GB/s, memory.

On a terminal one line is rewritten twice a second; elsewhere a line is added every ten seconds,
so that a log stays short.
"""

from __future__ import annotations

import resource
import sys
import threading
import time

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 10.0


class ProgressLine:
    """Counts bytes and prints; safe to share between threads."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._every = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        self._lock = threading.Lock()
        self._total = self._done = self._before = 0
        self._start = self._shown = time.monotonic()
        self._width = 0

    def begin(self, total_bytes: int, finished_bytes: int) -> None:
        """Start the clock."""
        self._total, self._done, self._before = total_bytes, finished_bytes, finished_bytes
        self._start = self._shown = time.monotonic()
        if finished_bytes and not self._quiet:
            print(
                f"going on: {finished_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB were "
                "finished before",
                file=sys.stderr,
            )

    def add(self, tensor: str, num_bytes: int) -> None:
        """Count, and print if it is time."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if self._quiet or now - self._shown < self._every:
                return
            self._shown = now
            self._print(self._line(tensor, now))

    def end(self) -> None:
        """Clear the line on a terminal."""
        with self._lock:
            if self._width:
                self._print("", end="\r")
                self._width = 0

    @property
    def seconds(self) -> float:
        """Since `begin`."""
        return time.monotonic() - self._start

    def _line(self, tensor: str, now: float) -> str:
        rate = (self._done - self._before) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(rate, 1.0)
        share = 100 * self._done / max(self._total, 1)
        return (
            f"{share:3.0f} %  {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB  "
            f"{rate / 1e9:.2f} GB/s  {left:.0f} s left  memory {peak_memory() / 1e9:.2f} GB  "
            f"{tensor}"
        )

    def _print(self, line: str, end: str = "") -> None:
        if not self._terminal:
            print(line, file=sys.stderr, flush=True)
            return
        line = line[:99]
        padding = " " * (self._width - len(line))
        print(f"\r{line}{padding}", end=end, file=sys.stderr, flush=True)
        self._width = len(line)


def peak_memory() -> int:
    """The most memory this process has had at a time, in bytes."""
    if sys.platform == "linux":
        # Not getrusage: what that says begins with the size of the process that started this one.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            found = [line.split()[1] for line in status if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
