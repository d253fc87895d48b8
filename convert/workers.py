"""Threads that share work and a limit on memory.

numpy, hashlib and the kernel all work outside Python's lock, so threads are enough.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class StoppedError(Exception):
    """Another worker failed, or the user interrupted."""


class Workers:
    """A number of threads, and the bytes they may hold together."""

    def __init__(self, count: int, memory: int) -> None:
        self._count = count
        self._stop = threading.Event()
        self._free = memory
        self._changed = threading.Condition()

    def for_each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Run `work` on every item; the first error stops the rest and is raised."""

        def guarded(item: Item) -> None:
            try:
                self.check()
                work(item)
            except BaseException:
                self._stop.set()
                raise

        with ThreadPoolExecutor(self._count, thread_name_prefix="convert") as pool:
            try:
                futures = [pool.submit(guarded, item) for item in items]
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop.set()  # Ctrl-C: the others end at their next check
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        errors = [e for e in (f.exception() for f in futures if not f.cancelled()) if e]
        for error in sorted(errors, key=lambda e: isinstance(e, StoppedError)):
            raise error

    def check(self) -> None:
        """Raise StoppedError if another worker has failed; to be called now and then."""
        if self._stop.is_set():
            raise StoppedError

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Wait until `num_bytes` more may be held; they count until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= num_bytes)
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free += num_bytes
                self._changed.notify_all()
