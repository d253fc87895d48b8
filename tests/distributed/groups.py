"""Groups of processes in one process: real connections, threads in place of processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from bailing_jax import group
from bailing_jax.errors import UserError
from bailing_jax.group import Group

TOKEN = "0123456789abcdef"


class Ends(dict[int, list[int]]):
    """The codes with which each member wanted its process to end."""

    def of(self, index: int) -> Callable[[int], object]:
        self[index] = []
        return self[index].append

    def wait_for(self, index: int, seconds: float = 10.0) -> int:
        """The code with which this member ends."""
        deadline = time.monotonic() + seconds
        while not self[index]:
            assert time.monotonic() < deadline, f"member {index} did not end"
            time.sleep(0.01)
        return self[index][0]


@contextmanager
def members(size: int) -> Iterator[tuple[list[Group], Ends]]:
    """A group of this size, connected."""
    ends = Ends()
    with group.listen(0) as listener, ThreadPoolExecutor(size) as pool:
        port = listener.getsockname()[1]
        others = [
            pool.submit(
                group.connect, ("127.0.0.1", port), index, size, TOKEN, 10.0, ends.of(index)
            )
            for index in range(1, size)
        ]
        first = group.accept(listener, size, TOKEN, 10.0, ends.of(0))
        groups = [first, *(other.result() for other in others)]
    try:
        yield groups, ends
    finally:
        for member in groups:
            member._leaving = True
        for member in groups:
            member.close()


def together(*calls: Callable[[], object]) -> list[object]:
    """The results of calls that wait for each other; an exception counts as a result.

    When the first one fails the others' processes would end under them; here they are left alone.
    """
    results: list[object] = [None] * len(calls)

    def call(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        if isinstance(results[0], UserError):
            break
        assert not thread.is_alive()
    return results
