"""The processes of a job and the connections between them: one from each process to process 0.

Process 0 says what is done next and the others do it, in that order: no process decides anything
by itself, so none can decide otherwise than the rest. The others report what came of it and pass
on wishes to stop.

Each process has a thread a connection, so that it notices also while its main thread computes or
waits inside jax that somebody is gone: the kernel closes the connections of a process that ends,
a host that vanishes stops acknowledging, and who is stuck stops sending signs of life. Whoever
notices says so, tells the others and ends the process; there is no way out of a collective that
waits for the dead. No jax.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bailing_jax import connection
from bailing_jax.connection import Link, Message
from bailing_jax.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    Terminated,
    UserError,
)
from bailing_jax.terminal import tell

# Signs of life go out this often, well within `connection.STUCK_S`.
ALIVE_S = 1.0
# How long a process that ends gives the others to hear why.
LAST_WORDS_S = 2.0
_POLL_S = 0.1

# How to stop: finish what is running, or at once.
DRAIN, AT_ONCE = 1, 2
STOP_CODES = {signal.SIGTERM: EXIT_TERMINATED, signal.SIGINT: EXIT_INTERRUPTED}


class Group:
    """This process among the others.

    Args:
        index: this process' number; process 0 leads.
        hosts: where each process runs.
        links: to every other process on process 0, else to process 0 only.
        end: ends this process with a code; may be called from any thread.

    Attributes:
        stop: what somebody wished: 0, DRAIN or AT_ONCE; process 0 heeds it.
        stop_code: the exit code that goes with it.
        steps_run: whether process 0 heeds `stop` already, so that a signal is a wish.
        is_finished: whether all came to the regular end.
    """

    def __init__(
        self,
        index: int,
        hosts: list[str],
        links: Mapping[int, Link],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.index = index
        self.size = len(hosts)
        self.stop = 0
        self.stop_code = EXIT_TERMINATED
        self.steps_run = self.is_finished = False
        self._hosts = hosts
        self._links = dict(links)
        self._end = end
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._heard = threading.Condition()
        self._reports: dict[int, dict[str, Message]] = {number: {} for number in links}
        self._gone: set[int] = set()
        self._leaving = False
        self._dying = threading.Lock()
        self._wish: Message | None = None
        threads = [threading.Thread(target=self._listen, args=item) for item in links.items()]
        for thread in (*threads, threading.Thread(target=self._sign_life)):
            thread.daemon = True
            thread.start()

    @property
    def leads(self) -> bool:
        """Whether this is process 0: it reads, decides, prints and writes."""
        return self.index == 0

    def name(self, number: int | None = None) -> str:
        """As in "process 1 of 4 (host7)"; None: this process."""
        number = self.index if number is None else number
        return f"process {number} of {self.size} ({self._hosts[number]})"

    def order(self, what: str, **details: Any) -> None:
        """Process 0: have all others do something next.

        Who can't be told is lost, and with it this process.
        """
        for number, link in self._links.items():
            try:
                link.send({"order": what, **details})
            except OSError as error:
                self._lost(number, error)

    def next_order(self) -> Message:
        """The others: what to do next; waits for it."""
        return self._commands.get()

    def report(self, about: str, **details: Any) -> None:
        """The others: tell process 0 what came of something."""
        try:
            self._links[0].send({"report": about, **details})
        except OSError as error:
            self._lost(0, error)

    def reports(self, about: str) -> dict[int, Message]:
        """Process 0: what each of the others reported about something; waits for all."""
        with self._heard:
            self._heard.wait_for(lambda: all(about in found for found in self._reports.values()))
            return {number: found.pop(about) for number, found in self._reports.items()}

    def wish_to_stop(self, how: int, signum: int) -> None:
        """Ask process 0 to stop all; safe in a signal handler, which may take no lock."""
        if self.leads:
            self._note_wish(how, signum)
        else:
            self._wish = {"stop": how, "signal": signum}

    def finish(self, code: int) -> None:
        """The regular end, after which nobody is missed: process 0 gives everybody the code."""
        if self.leads:
            self.order("end", code=code)
            self.reports("end")
            self._leaving = True
            self.order("leave")
        else:
            self.report("end")
            while self.next_order()["order"] != "leave":
                pass
            self._leaving = True
        self.is_finished = True

    def close(self) -> None:
        """Close the connections; after `finish`."""
        self._leaving = True
        for link in self._links.values():
            link.close()

    def fail(self, message: str, code: int) -> None:
        """Tell the others why this process is about to end, and with which code they should.

        Returns when they have heard, or after a moment. The caller ends the process.
        """
        with self._dying:  # once; if a listener is faster, it ends the process
            self._leaving = True
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.send({"failed": f"{self.name()}: {message}", "code": code})
            with self._heard:
                self._heard.wait_for(lambda: len(self._gone) == len(self._links), LAST_WORDS_S)

    def await_verdict(self, seconds: float = LAST_WORDS_S) -> None:
        """Give the listeners time to notice that somebody is gone, and to say so and end us.

        When a process dies, a collective may fail in the main thread first.
        """
        time.sleep(seconds)

    # Threads.

    def _listen(self, number: int, link: Link) -> None:
        """Take what comes from one process until it leaves or is lost."""
        while True:
            try:
                message = link.receive()
            except (OSError, EOFError, ValueError) as error:
                with self._heard:
                    self._gone.add(number)
                    self._heard.notify_all()
                if not self._leaving:
                    self._lost(number, error)
                return
            self._take(number, message)

    def _take(self, number: int, message: Message) -> None:
        if "order" in message:
            self._commands.put(message)
        elif "report" in message:
            with self._heard:
                self._reports[number][message["report"]] = message
                self._heard.notify_all()
        elif "stop" in message:
            self._note_wish(message["stop"], message["signal"])
        elif "failed" in message and not self._leaving:
            self._die(message["failed"], message["code"], number)

    def _note_wish(self, how: int, signum: int) -> None:
        if how > self.stop:
            self.stop_code = STOP_CODES.get(signal.Signals(signum), EXIT_TERMINATED)
            self.stop = how

    def _sign_life(self) -> None:
        """Send signs of life, and the wish to stop that a signal handler left here."""
        due = time.monotonic()
        while not self._leaving:
            wish, self._wish = self._wish, None
            now = time.monotonic()
            if wish is not None or now >= due:
                due = now + ALIVE_S
                for link in self._links.values():
                    with contextlib.suppress(OSError):  # who listens notices too
                        link.send(wish or {"alive": True})
            time.sleep(_POLL_S)

    def _lost(self, number: int, error: BaseException) -> None:
        if isinstance(error, TimeoutError) and error.errno is None:
            what = f"gave no sign of life for {connection.STUCK_S:g} s"
        elif isinstance(error, EOFError | ConnectionResetError | BrokenPipeError):
            what = "has ended (its stderr may say why)"
        elif isinstance(error, ValueError):
            what = f"sent what can't be understood ({error})"
        else:
            what = f"can't be reached any more ({error})"
        self._die(f"lost {self.name(number)}: it {what}", EXIT_FAILURE, number)

    def _die(self, message: str, code: int, about: int) -> None:
        """Say it, tell the others, end this process from whatever thread."""
        with self._dying:
            if self._leaving:  # this process is about to end for a reason of its own
                return
            self._leaving = True
            tell(f"error: {self.name()}: {message}")
            if self.leads:
                for number, link in self._links.items():
                    if number != about:
                        with contextlib.suppress(OSError):
                            link.send({"failed": message, "code": code})
            self._end(code)


def listen(port: int) -> socket.socket:
    """Process 0: a listening socket, on this port if it is free, else on any."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for choice in (port, 0):
        with contextlib.suppress(OSError, OverflowError):
            return socket.create_server(
                ("", choice), family=family, dualstack_ipv6=family == socket.AF_INET6
            )
    raise UserError("no port can be opened for the other processes to connect to")


def accept(
    listener: socket.socket,
    size: int,
    token: str,
    wait_s: float,
    end: Callable[[int], object] = os._exit,
) -> Group:
    """Process 0: wait for all others, tell each where the others run.

    Raises:
        UserError: not all came.
    """
    links: dict[int, Link] = {}
    hosts = [socket.gethostname()] + [""] * (size - 1)
    deadline = time.monotonic() + wait_s
    while len(links) < size - 1:
        try:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            sock, _ = listener.accept()
        except OSError as error:
            missing = ", ".join(str(n) for n in range(1, size) if n not in links)
            raise UserError(f"process 0 of {size}: no connection from process {missing}") from error
        link = Link(sock, 5.0)
        try:
            hello = link.receive()
            number = hello["index"]
            if hello["token"] != token or number in links or not 0 < number < size:
                raise ValueError("a stranger")
            hosts[number] = str(hello["host"])
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            link.close()  # not one of ours: a port scanner, another job
            continue
        links[number] = Link(sock)
    for link in links.values():
        link.send({"hosts": hosts})
    return Group(0, hosts, links, end)


def connect(
    address: tuple[str, int],
    index: int,
    size: int,
    token: str,
    wait_s: float,
    end: Callable[[int], object] = os._exit,
) -> Group:
    """The others: connect to process 0 and learn where everybody runs.

    Raises:
        UserError: process 0's port can't be reached.
    """
    try:
        sock = socket.create_connection(address, timeout=wait_s)
        link = Link(sock, wait_s)
        link.send({"index": index, "token": token, "host": socket.gethostname()})
        hosts = link.receive()["hosts"]
        return Group(index, hosts, {0: Link(sock)}, end)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"process {index} of {size}: process 0's port {address[1]} at {address[0]} can't be "
            f"reached: {error}",
            "A firewall between the hosts must let the coordinator's port and the next one pass.",
        ) from error


@contextlib.contextmanager
def stop_signals(group: Group) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into wishes while the steps run; before, they end this process.

    While it runs: SIGTERM drains, a second one or SIGINT stops at the next step, on all processes
    at the same. Before, and for whoever insists, `errors.Terminated` or KeyboardInterrupt is
    raised.
    """
    counts = {signal.SIGTERM: 0, signal.SIGINT: 0}

    def handle(signum: int, _frame: object) -> None:
        which = signal.Signals(signum)
        counts[which] += 1
        how = counts[which] + (which is signal.SIGINT)
        if group.steps_run and how <= AT_ONCE:
            group.wish_to_stop(how, signum)
            return
        raise Terminated if which is signal.SIGTERM else KeyboardInterrupt

    before = {which: signal.signal(which, handle) for which in counts}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
