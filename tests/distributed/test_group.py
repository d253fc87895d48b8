"""Connections between processes: order, agreement, wishes, and who notices a loss."""

from __future__ import annotations

import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from groups import TOKEN, members, together

from bailing_jax import connection, group
from bailing_jax.agreement import agree
from bailing_jax.connection import Link
from bailing_jax.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Terminated,
    UserError,
)
from bailing_jax.group import AT_ONCE, DRAIN, Group, stop_signals


def wait_until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # pyright: ignore[reportCallIssue]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_orders_arrive_in_order_and_reports_come_from_all() -> None:
    with members(4) as (groups, ends):
        first, *others = groups
        for number in range(50):
            first.order("add", number=number)
        for other in others:
            assert [other.next_order()["number"] for _ in range(50)] == [*range(50)]
            other.report("sum", value=100 + other.index)
        assert {n: m["value"] for n, m in first.reports("sum").items()} == {1: 101, 2: 102, 3: 103}
        assert [member.leads for member in groups] == [True, False, False, False]
        assert not any(ends.values())


def test_everybody_knows_everybodys_name() -> None:
    host = socket.gethostname()
    with members(3) as (groups, _):
        for member in groups:
            assert member.name() == f"process {member.index} of 3 ({host})"
            assert member.name(2) == f"process 2 of 3 ({host})"


def test_large_messages_pass_both_ways() -> None:
    prompt = [*range(300_000)]
    with members(2) as ((first, second), _):
        first.order("submit", prompt=prompt)
        assert second.next_order()["prompt"] == prompt
        second.report("back", prompt=prompt)
        assert first.reports("back")[1]["prompt"] == prompt


def test_whoever_is_lost_is_named_by_all_and_all_end(capsys: pytest.CaptureFixture[str]) -> None:
    with members(4) as (groups, ends):
        groups[2]._leaving = True  # the rest of what a killed process no longer does
        groups[2]._links[0].close()
        for index in (0, 1, 3):
            assert ends.wait_for(index) == EXIT_FAILURE
        said = capsys.readouterr().err.splitlines()
        for index in (0, 1, 3):
            (line,) = [line for line in said if f"error: {groups[index].name()}: " in line]
            assert f"lost {groups[2].name()}: it has ended" in line


def test_when_process_0_is_lost_the_others_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    with members(3) as (groups, ends):
        groups[0]._leaving = True
        for link in groups[0]._links.values():
            link.close()
        assert [ends.wait_for(index) for index in (1, 2)] == [EXIT_FAILURE] * 2
        assert capsys.readouterr().err.count(f"lost {groups[0].name()}") == 2


def test_a_process_that_is_stuck_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is there and its host acknowledges, but it gives no sign of life."""
    monkeypatch.setattr(connection, "STUCK_S", 0.5)
    with members(2) as ((_, second), ends):
        second._links[0]._sending.acquire()  # nothing leaves it any more
        assert ends.wait_for(0) == EXIT_FAILURE
        assert "it gave no sign of life for 0.5 s" in capsys.readouterr().err
        second._links[0]._sending.release()


def test_signs_of_life_keep_a_silent_group_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "ALIVE_S", 0.1)
    monkeypatch.setattr(connection, "STUCK_S", 1.0)
    with members(3) as (_, ends):
        time.sleep(2.0)
        assert not any(ends.values())


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="an option of Linux")
def test_the_kernel_gives_up_a_vanished_host_within_ten_seconds() -> None:
    """No packet can be lost on purpose here, so what the kernel was told is read back."""
    with members(2) as ((first, _), _):
        sock = first._links[1]._socket

        def option(name: str) -> int:
            return sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))

        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        probes = option("TCP_KEEPIDLE") + option("TCP_KEEPINTVL") * option("TCP_KEEPCNT")
        assert probes < 10
        assert 1000 < option("TCP_USER_TIMEOUT") < 10_000


def test_who_fails_takes_the_others_along_with_its_code_and_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with members(3) as (groups, ends):
        groups[1].fail("tiny: no such folder", EXIT_USAGE)
        assert [ends.wait_for(index) for index in (0, 2)] == [EXIT_USAGE] * 2
        said = capsys.readouterr().err
        words = f"{groups[1].name()}: tiny: no such folder"
        assert f"error: {groups[0].name()}: {words}\n" in said
        assert f"error: {groups[2].name()}: {words}\n" in said
        assert ends[1] == []  # it says what happened itself, and ends when it has


def test_after_the_regular_end_nobody_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    with members(3) as (groups, ends):

        def obey(member: Group) -> object:
            code = member.next_order()["code"]
            member.finish(code)
            return code

        first, *others = groups
        assert together(lambda: first.finish(7), *(lambda o=o: obey(o) for o in others)) == [
            None, 7, 7,
        ]  # fmt: skip
        assert all(member.is_finished for member in groups)
        for member in groups:
            member.close()
        time.sleep(0.3)
        assert not any(ends.values())
        assert capsys.readouterr().err == ""


def test_wishes_to_stop_reach_process_0_and_the_stronger_one_wins() -> None:
    with members(3) as (groups, _):
        first = groups[0]
        assert first.stop == 0
        groups[2].wish_to_stop(DRAIN, signal.SIGTERM)
        wait_until(lambda: first.stop == DRAIN)
        assert first.stop_code == EXIT_TERMINATED
        groups[1].wish_to_stop(AT_ONCE, signal.SIGINT)
        wait_until(lambda: first.stop == AT_ONCE)
        assert first.stop_code == EXIT_INTERRUPTED
        groups[2].wish_to_stop(DRAIN, signal.SIGTERM)
        time.sleep(0.4)
        assert (first.stop, first.stop_code) == (AT_ONCE, EXIT_INTERRUPTED)


def test_a_signal_is_a_wish_while_steps_run_and_an_end_before() -> None:
    with members(2) as ((first, _), _):
        before = signal.getsignal(signal.SIGTERM)
        with stop_signals(first):
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with stop_signals(first):
            first.steps_run = True
            signal.raise_signal(signal.SIGTERM)
            assert first.stop == DRAIN
            signal.raise_signal(signal.SIGTERM)
            assert (first.stop, first.stop_code) == (AT_ONCE, EXIT_TERMINATED)
            with pytest.raises(Terminated):  # somebody insists
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before


def test_equal_facts_let_all_go_on() -> None:
    with members(3) as (groups, ends):
        facts = {"config.json hidden_size": "36", "version of jax": "0.10.2"}
        assert together(*(lambda m=m: agree(m, facts, "facts") for m in groups)) == [None] * 3
        assert not any(ends.values())


def test_a_difference_names_host_field_and_both_values() -> None:
    """Programs that differ between hosts would meet in no collective, or in the wrong one."""
    host = socket.gethostname()
    facts = {"config.json hidden_size": "36", "version of jax": "0.10.2", "XLA_FLAGS": "not set"}
    other = {"config.json hidden_size": "40", "version of jax": "0.10.2", "extra.json a": "1"}
    with members(3) as (groups, ends):
        ran = [facts, other, facts]
        waiting = [
            threading.Thread(target=agree, args=(m, f, "facts"), daemon=True)
            for m, f in zip(groups[1:], ran[1:], strict=True)
        ]
        for thread in waiting:
            thread.start()
        with pytest.raises(UserError) as caught:
            agree(groups[0], facts, "facts")
        assert caught.value.exit_code == EXIT_USAGE
        assert caught.value.message.splitlines()[1:] == [
            f"process 1 of 3 ({host}): {name} = {theirs}; process 0 of 3 ({host}) has {ours}"
            for name, theirs, ours in (
                ("XLA_FLAGS", "missing", "not set"),
                ("config.json hidden_size", "40", "36"),
                ("extra.json a", "1", "missing"),
            )
        ]
        groups[0].fail(caught.value.message, caught.value.exit_code)
        assert [ends.wait_for(index) for index in (1, 2)] == [EXIT_USAGE] * 2


def test_strangers_are_turned_away() -> None:
    """Who does not know the token, sends rubbish, or takes a number that is taken."""
    with group.listen(0) as listener, ThreadPoolExecutor(1) as pool:
        address = ("127.0.0.1", listener.getsockname()[1])
        first = pool.submit(group.accept, listener, 2, TOKEN, 10.0, lambda _code: None)
        rubbish = b"GET / HTTP/1.1\r\n\r\n"
        for hello in (rubbish, struct.pack(">I", 2**31), struct.pack(">I", 2) + b"[]"):
            with socket.create_connection(address) as sock:
                sock.sendall(hello)
        for hello in (
            {"index": 1, "token": "another", "host": "x"},
            {"index": 2, "token": TOKEN, "host": "x"},
            {"index": 0, "token": TOKEN, "host": "x"},
            {"token": TOKEN},
        ):
            link = Link(socket.create_connection(address))
            link.send(hello)
            with pytest.raises((EOFError, OSError)):
                link.receive()
        second = group.connect(address, 1, 2, TOKEN, 10.0, lambda _code: None)
        assert first.result().name(1) == second.name()
        second._leaving = first.result()._leaving = True
        second.close()
        first.result().close()


def test_processes_that_do_not_connect_are_named() -> None:
    with group.listen(0) as listener, pytest.raises(UserError, match="from process 1, 2"):
        group.accept(listener, 3, TOKEN, 0.2)


def test_a_port_that_cannot_be_reached_is_named() -> None:
    with group.listen(0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match=f"port {port} at 127.0.0.1 can't be reached") as caught:
        group.connect(("127.0.0.1", port), 1, 2, TOKEN, 2.0)
    assert "firewall" in caught.value.hint


def test_a_taken_port_is_replaced_by_another() -> None:
    with group.listen(0) as one:
        port = one.getsockname()[1]
        with group.listen(port) as two:
            assert two.getsockname()[1] not in (0, port)
    with group.listen(70_000) as three:
        assert three.getsockname()[1] > 0
