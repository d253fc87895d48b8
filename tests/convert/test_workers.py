"""Threads that share a limit on memory: it is never exceeded, and the first error ends all work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from convert.workers import StoppedError, Workers

SECONDS = 20.0  # nothing here takes so long, unless it hangs


class Together:
    """Counts how much is held at once, by `holding` as `work` sees it."""

    def __init__(self) -> None:
        self.now = self.most = self.threads = self.most_threads = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self.now += amount
            self.threads += 1 if amount > 0 else -1
            self.most = max(self.most, self.now)
            self.most_threads = max(self.most_threads, self.threads)


def run(work: Callable[[], object]) -> object:
    """The result of `work` in a thread of its own, or its error; it must come to an end."""
    results: list[object] = []

    def guarded() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert results, "it hangs"
    return results[0]


def in_threads(count: int, work: Callable[[int], None], items: Iterable[int]) -> None:
    """`work` on every item by threads that do not keep the process alive if they wait forever."""
    waiting = list(items)

    def loop() -> None:
        with suppress(IndexError):
            while True:
                work(waiting.pop())

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "it hangs"


def until_stopped(workers: Workers) -> None:
    """Work that ends at its check."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        workers.check()
        time.sleep(0.001)


# ---- what is done


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_item_is_worked_on_once(count: int) -> None:
    done: list[int] = []
    Workers(count, 0).for_each(done.append, range(100))
    assert sorted(done) == list(range(100))
    Workers(count, 0).for_each(done.append, [])
    assert len(done) == 100


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_threads_as_asked_for_work_at_once(count: int) -> None:
    """All of them meet at a barrier; one fewer would wait there until it breaks."""
    barrier, together = threading.Barrier(count), Together()

    def work(_item: int) -> None:
        together.add(1)
        barrier.wait(SECONDS)
        together.add(-1)

    assert run(lambda: Workers(count, 0).for_each(work, range(4 * count))) is None
    assert together.most_threads == count


def test_workers_may_be_used_again() -> None:
    workers, done = Workers(2, 0), list[int]()
    for _ in range(3):
        workers.for_each(done.append, range(5))
    assert sorted(done) == sorted([*range(5)] * 3)


# ---- memory


@pytest.mark.parametrize("limit", [10, 13, 25, 1000])
def test_the_limit_is_never_exceeded_and_is_made_use_of(
    limit: int, rng: np.random.Generator
) -> None:
    workers, together = Workers(6, limit), Together()

    def work(size: int) -> None:
        with workers.holding(size):
            together.add(size)
            time.sleep(0.0005)
            together.add(-size)

    in_threads(6, work, [*map(int, rng.integers(1, 11, 120)), 10])
    assert 10 <= together.most <= limit
    assert together.most_threads > 1
    assert together.now == 0
    # All of it is free again.
    in_threads(1, work, [limit])
    assert together.most == limit


def test_all_that_is_held_is_given_back_after_an_error() -> None:
    workers = Workers(1, 8)
    with pytest.raises(RuntimeError), workers.holding(8):
        raise RuntimeError

    def work(size: int) -> None:
        with workers.holding(size):
            pass

    in_threads(1, work, [8])


def test_one_that_waits_for_memory_goes_on_when_there_is_some() -> None:
    workers, order = Workers(2, 10), list[str]()
    holds = threading.Event()

    def work(number: int) -> None:
        if number == 2:
            holds.wait(SECONDS)
        with workers.holding(6):
            order.append(f"{number} begins")
            holds.set()
            time.sleep(0.02)
            order.append(f"{number} ends")

    in_threads(2, work, [1, 2])
    assert order == ["1 begins", "1 ends", "2 begins", "2 ends"]


# ---- errors


@pytest.mark.parametrize("count", [1, 4])
def test_the_first_error_is_raised_and_the_rest_is_not_begun(count: int) -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 5:
            raise ValueError(f"item {item}")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="item 5"):
        Workers(count, 0).for_each(work, range(1000))
    assert len(begun) < 100


def test_the_others_end_at_their_next_check_and_hide_nothing() -> None:
    """Items before the failed one end with StoppedError; what is raised is the error."""
    workers, failed = Workers(3, 0), threading.Event()
    stopped: list[int] = []

    def work(item: int) -> None:
        if item == 2:
            failed.set()
            raise OSError("disk")
        failed.wait(SECONDS)
        try:
            until_stopped(workers)
        except StoppedError:
            stopped.append(item)
            raise

    found = run(lambda: workers.for_each(work, range(50)))
    assert isinstance(found, OSError)
    assert set(stopped) <= {0, 1}
    assert len(stopped) == 2


def test_one_that_waits_for_memory_ends_too() -> None:
    """Its memory is freed by the one that failed; it then stops at its first check."""
    workers, waits = Workers(2, 10), threading.Event()
    ended: list[int] = []

    def work(item: int) -> None:
        if item == 0:
            with workers.holding(10):
                waits.wait(SECONDS)
                time.sleep(0.01)
                raise ValueError("no weight")
        waits.set()
        with workers.holding(10):
            workers.check()
            ended.append(item)

    found = run(lambda: workers.for_each(work, range(20)))
    assert isinstance(found, ValueError)
    assert ended == []


def test_an_error_of_python_itself_is_not_swallowed() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise SystemExit(7)

    found = run(lambda: Workers(2, 0).for_each(work, range(10)))
    assert isinstance(found, SystemExit)
    assert found.code == 7


# ---- Ctrl-C


def test_ctrl_c_while_waiting_stops_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, begun, ended = Workers(2, 0), threading.Event(), list[int]()

    def interrupted(*_args: object, **_kwargs: object) -> None:
        begun.wait(SECONDS)
        raise KeyboardInterrupt

    def work(item: int) -> None:
        begun.set()
        try:
            until_stopped(workers)
        finally:
            ended.append(item)

    monkeypatch.setattr("convert.workers.wait", interrupted)
    found = run(lambda: workers.for_each(work, range(100)))
    assert isinstance(found, KeyboardInterrupt)
    # Nobody is left behind, and nobody began after it.
    assert len(ended) <= 2
    assert [t.name for t in threading.enumerate() if t.name.startswith("convert")] == []


def test_ctrl_c_while_the_work_is_handed_out_stops_the_workers_too() -> None:
    """A hundred thousand tensors take a second to hand out."""
    done: list[int] = []

    def items() -> Iterator[int]:
        yield from range(100)
        raise KeyboardInterrupt

    def work(item: int) -> None:
        time.sleep(0.005)
        done.append(item)

    found = run(lambda: Workers(2, 0).for_each(work, items()))
    assert isinstance(found, KeyboardInterrupt)
    assert len(done) < 60
