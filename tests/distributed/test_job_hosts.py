"""Process 0 leads, the others take the same steps: with engines that cost nothing."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import LIMITS, FakeEngine
from groups import Ends, members, together

from bailing_jax.cli.job import run_job
from bailing_jax.cli.job_hosts import AHEAD, Leader, agree_on_sizes, follow, take_part
from bailing_jax.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Interrupted,
    Terminated,
    UserError,
)
from bailing_jax.group import AT_ONCE, DRAIN, Group

HOST = socket.gethostname()
class Hosts:
    """A job over processes that are threads: `run` gives what came of each."""

    def __init__(
        self, groups: list[Group], ends: Ends, folder: Path, engines: list[FakeEngine]
    ) -> None:
        self.groups, self.ends, self.engines = groups, ends, engines
        self.source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.said: list[str] = []

    def run(self) -> list[object]:
        def lead() -> int:
            group, engine = self.groups[0], self.engines[0]

            def load() -> Any:
                group.order("load")
                agree_on_sizes(group, engine.limits)
                return Leader(engine, group), None  # pyright: ignore[reportArgumentType]

            return run_job(
                load, self.source, self.output, {"seed": 0}, self.said.append,
                is_stopping=lambda: group.stop != 0,
            )  # fmt: skip

        def obey(index: int) -> int:
            def load() -> Any:
                agree_on_sizes(self.groups[index], self.engines[index].limits)
                return self.engines[index]

            return follow(self.groups[index], load)

        parts = [lead, *(lambda i=i: obey(i) for i in range(1, len(self.groups)))]
        return together(
            *(lambda g=g, p=p: take_part(g, p) for g, p in zip(self.groups, parts, strict=True))
        )

    def answers(self) -> dict[int, list[int]]:
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        found = [json.loads(line) for line in lines]
        assert len({line["id"] for line in found}) == len(found)
        return {line["id"]: line["token_ids"] for line in found}


ENTRIES = [
    {"id": i, "prompt_ids": [i, 3], "max_tokens": 2 + i % 7, "temperature": 0.5 * (i % 2),
     "logit_bias": {"7": -1.5}, "stop_token_ids": [9], "min_p": 0.1}
    for i in range(40)
]  # fmt: skip
WANT = {e["id"]: [e["id"] + 3 + k for k in range(e["max_tokens"])] for e in ENTRIES}


@pytest.fixture(autouse=True)
def no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a main thread can take signals, and these processes are threads."""
    monkeypatch.setattr(signal, "signal", lambda *_args: signal.SIG_DFL)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    stack: list[Any] = []

    def make(*engines: FakeEngine, entries: list[dict[str, Any]] = ENTRIES) -> Hosts:
        context = members(len(engines))
        groups, ends = context.__enter__()
        stack.append(context)
        made = Hosts(groups, ends, tmp_path, list(engines))
        made.source.write_text("".join(json.dumps(e) + "\n" for e in entries))
        return made

    yield make
    for context in stack:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("size", [2, 4])
def test_all_engines_are_asked_the_same_in_the_same_order(
    hosts: Callable[..., Hosts], size: int
) -> None:
    job = hosts(*(FakeEngine() for _ in range(size)))
    assert job.run() == [EXIT_OK] * size
    assert job.answers() == WANT
    first, *others = job.engines
    assert first.steps > 10
    for other in others:
        assert other.log == first.log
    assert all(group.is_finished for group in job.groups)


def test_process_0_never_runs_far_ahead(hosts: Callable[..., Hosts]) -> None:
    lead = 0

    def slow(engine: FakeEngine) -> None:
        nonlocal lead
        time.sleep(0.02)
        lead = max(lead, job.engines[0].steps - engine.steps)

    job = hosts(FakeEngine(), FakeEngine(slow))
    assert job.run() == [EXIT_OK] * 2
    assert 1 < lead <= AHEAD + 1


def test_when_all_is_done_nobody_loads(hosts: Callable[..., Hosts]) -> None:
    job = hosts(FakeEngine(), FakeEngine())
    lines = [
        {"id": i, "text": None, "token_ids": tokens, "finish_reason": "length", "usage": {}}
        for i, tokens in WANT.items()
    ]
    job.output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert job.run() == [EXIT_OK] * 2
    assert [engine.log for engine in job.engines] == [[], []]


def test_processes_with_other_tokens_are_found_out(
    hosts: Callable[..., Hosts], capsys: pytest.CaptureFixture[str]
) -> None:
    """A schedule or an engine that differs between hosts would go on and write nonsense."""

    def other(engine: FakeEngine) -> None:
        engine.shift = 1 * (engine.steps == 5)

    job = hosts(FakeEngine(), FakeEngine(), FakeEngine(other))
    results = job.run()
    assert isinstance(results[0], UserError)
    message = f"process 2 of 3 ({HOST}) has other tokens than process 0 of 3 ({HOST}) since step 6"
    assert results[0].message == f"process 0 of 3 ({HOST}): {message}"
    for index in (1, 2):
        assert job.ends.wait_for(index) == EXIT_FAILURE
    assert capsys.readouterr().err.count(message) == 2


def test_engines_of_other_sizes_are_refused_before_they_run(hosts: Callable[..., Hosts]) -> None:
    """How many pages fit is each host's own affair; the schedule depends on it."""
    small = FakeEngine()
    small.limits = replace(LIMITS, max_num_pages=4)
    job = hosts(FakeEngine(), small)
    results = job.run()
    assert isinstance(results[0], UserError)
    assert results[0].exit_code == EXIT_USAGE
    assert (
        f"process 1 of 2 ({HOST}): engine max_num_pages = 4; process 0 of 2 ({HOST}) has null"
        in results[0].message
    )
    assert job.engines[0].log == []


@pytest.mark.parametrize(
    ("how", "signum", "code", "error"),
    [
        (DRAIN, signal.SIGTERM, EXIT_TERMINATED, Terminated),
        (AT_ONCE, signal.SIGTERM, EXIT_TERMINATED, Terminated),
        (AT_ONCE, signal.SIGINT, EXIT_INTERRUPTED, Interrupted),
    ],
)
@pytest.mark.parametrize("who", [0, 2])
def test_all_stop_at_the_same_step_and_the_same_command_goes_on(
    hosts: Callable[..., Hosts], how: int, signum: int, code: int, error: type, who: int
) -> None:
    """A wish of any process; what is running is finished, or dropped and done again later."""
    wished = False

    def wish(engine: FakeEngine) -> None:
        nonlocal wished
        if engine.steps == 6 and not wished:
            wished = True
            job.groups[who].wish_to_stop(how, signum)

    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    engines[who]._fault = wish
    entries = [{**entry, "max_tokens": 60} for entry in ENTRIES]
    job = hosts(*engines, entries=entries)
    results = job.run()
    assert isinstance(results[0], error)
    assert results[1:] == [code] * 2
    steps = [engine.steps for engine in job.engines]
    assert steps == [steps[0]] * 3
    done = job.answers()
    want = {e["id"]: [e["id"] + 3 + k for k in range(60)] for e in entries}
    assert len(done) < len(want)
    assert done.items() <= want.items()
    if how == DRAIN:
        submitted = sum(item != "step" for item in job.engines[0].log)
        assert len(done) == submitted
    left = f"{40 - len(done)} of 40 requests are left; the same command goes on"
    assert job.said[-1] == left
    again = hosts(*(FakeEngine() for _ in range(3)), entries=entries)
    assert again.run() == [EXIT_OK] * 3
    assert again.answers() == want


def test_a_mistake_in_the_input_ends_all(
    hosts: Callable[..., Hosts], capsys: pytest.CaptureFixture[str]
) -> None:
    job = hosts(FakeEngine(), FakeEngine())
    job.source.write_text("{}\n")
    results = job.run()
    assert isinstance(results[0], UserError)
    assert results[0].exit_code == EXIT_USAGE
    assert job.ends.wait_for(1) == EXIT_USAGE
    said = capsys.readouterr().err
    assert f"error: process 1 of 2 ({HOST}): process 0 of 2 ({HOST}): {job.source}, line 1" in said


def test_an_error_of_the_program_ends_all_and_keeps_its_traceback(
    hosts: Callable[..., Hosts], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Group, "await_verdict", lambda _self: None)

    def fault(engine: FakeEngine) -> None:
        if engine.steps == 3:
            raise ZeroDivisionError("planted")

    job = hosts(FakeEngine(), FakeEngine(fault), FakeEngine())

    def run() -> None:
        # No process ends here, so its threads wait for ever, which `together` minds.
        with contextlib.suppress(AssertionError):
            job.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for index in (0, 2):
        assert job.ends.wait_for(index) == EXIT_FAILURE
    said = capsys.readouterr().err
    assert "ZeroDivisionError: planted" in said
    words = f"process 1 of 3 ({HOST}): the program failed (ZeroDivisionError)"
    assert f"error: process 0 of 3 ({HOST}): {words}" in said
    assert f"error: process 2 of 3 ({HOST}): {words}" in said
