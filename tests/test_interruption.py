"""Ctrl-C inside a callback of the garbage collector or a finaliser, where Python drops it."""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable

import pytest

from bailing_jax.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    Terminated,
    run_command,
)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException]]:
    """The kinds of what Python could raise to nobody."""
    kinds: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: kinds.append(lost.exc_type))
    return kinds


def works_on(seconds: float) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.001)
    return EXIT_OK


class Raises:
    def __init__(self, what: Callable[[], object]) -> None:
        self.what = what

    def __del__(self) -> None:
        self.what()


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_python_drops_it_in_a_finaliser(lost: list[type[BaseException]]) -> None:
    """What the others need to be true."""
    Raises(press)
    assert works_on(0.1) == EXIT_OK
    assert lost == [KeyboardInterrupt]


def test_r085_ctrl_c_in_a_finaliser_ends_the_command(
    lost: list[type[BaseException]], capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        Raises(press)
        return works_on(30)

    start = time.monotonic()
    assert run_command(command) == EXIT_INTERRUPTED
    assert time.monotonic() - start < 10
    assert capsys.readouterr().err == "interrupted\n"
    assert lost == []


def test_it_is_raised_until_it_comes_out(lost: list[type[BaseException]]) -> None:
    swallowed: list[str] = []

    def wait_for_it() -> None:
        try:
            works_on(10)
        except KeyboardInterrupt:
            swallowed.append("again")
            raise

    def command() -> int:
        Raises(press)
        for _ in range(3):
            Raises(wait_for_it)
        return works_on(30)

    assert run_command(command) == EXIT_INTERRUPTED
    assert swallowed == ["again"] * 3
    assert lost == []


def test_a_callback_of_the_collector_keeps_nothing(lost: list[type[BaseException]]) -> None:
    def callback(_phase: str, _info: dict[str, int]) -> None:
        gc.callbacks.remove(callback)
        press()

    def command() -> int:
        gc.callbacks.append(callback)
        gc.collect()
        return works_on(30)

    assert run_command(command) == EXIT_INTERRUPTED
    assert lost == []


def test_a_termination_stays_one(lost: list[type[BaseException]]) -> None:
    def terminate() -> None:
        raise Terminated

    def command() -> int:
        Raises(terminate)
        return works_on(30)

    assert run_command(command) == EXIT_TERMINATED
    assert lost == []


def test_other_errors_go_where_they_went(lost: list[type[BaseException]]) -> None:
    def fail() -> None:
        raise ValueError

    def command() -> int:
        Raises(fail)
        return works_on(0.05)

    assert run_command(command) == EXIT_OK
    assert lost == [ValueError]


def test_a_command_that_ended_leaves_nothing_to_come(lost: list[type[BaseException]]) -> None:
    def command() -> int:
        Raises(press)
        return EXIT_OK

    assert run_command(command) == EXIT_OK
    works_on(0.1)
    assert lost == []
