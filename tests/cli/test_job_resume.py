"""A job killed at any moment, or ended by an error, goes on and loses and repeats nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_runs import SHORT, no_model, read, run, sorted_lines, watch_os, whole_run, write_input
from tiny_models import is_idle, linear_llm

from bailing_jax.cli import job_output
from bailing_jax.cli.job import run_job
from bailing_jax.cli.job_input import Requests
from bailing_jax.cli.job_output import Output
from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, UserError

pytestmark = pytest.mark.unoptimised


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def finished(source: Path, tmp_path: Path) -> list[bytes]:
    return whole_run(source, tmp_path)


# Interrupted and continued.


class Killed(BaseException):
    """In place of a SIGKILL: nobody handles it."""


def run_killed(
    monkeypatch: pytest.MonkeyPatch, source: Path, output: Path, after_bytes: int
) -> None:
    """A job that ends when it has written so many bytes."""
    room = after_bytes

    def write(fd: int, data: memoryview) -> int:
        nonlocal room
        if len(data) > room:
            os.write(fd, data[:room])
            raise Killed
        room -= len(data)
        return os.write(fd, data)

    with monkeypatch.context() as patch:
        watch_os(patch, "write", write)
        with pytest.raises(Killed):
            run(linear_llm(), source, output)
    assert is_idle(linear_llm())


def test_a_job_killed_at_any_byte_goes_on_without_loss_or_repetition(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = list(itertools.accumulate(len(line) for line in finished))
    places = {0, 1, *(end + d for end in ends for d in (-2, -1, 0, 1, 9)), ends[0] // 2}
    for place in sorted(p for p in places if p < ends[-1]):
        output.unlink(missing_ok=True)
        run_killed(monkeypatch, source, output, place)
        # A file in which nothing stands is gone.
        assert (output.stat().st_size if output.exists() else 0) == place
        run(linear_llm(), source, output)
        assert sorted_lines(output) == sorted(finished), place


def test_a_job_may_be_killed_again_and_again(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    kills, whole = 0, 0
    while whole < len(finished) - 1:
        run_killed(monkeypatch, source, output, rng.randrange(len(finished[0]) * 2))
        kills += 1
        assert output.read_bytes().count(b"\n") >= whole if output.exists() else not whole
        whole = output.read_bytes().count(b"\n") if output.exists() else 0
    assert kills > 3
    run(linear_llm(), source, output)
    assert sorted_lines(output) == sorted(finished)


@pytest.mark.parametrize("whole", [0, 1, 5])
def test_a_torn_last_line_of_any_length_is_cut_off(
    source: Path, output: Path, finished: list[bytes], whole: int
) -> None:
    kept = b"".join(finished[:whole])
    for length in range(1, len(finished[whole])):
        output.write_bytes(kept + finished[whole][:length])
        said: list[str] = []
        with Requests(source, {}) as requests, Output(output, said.append) as target:
            assert sum(target.read_done(requests)) == whole
            assert output.stat().st_size == len(kept) + length  # not touched yet
            assert said == []
            target.start()
            assert f"its last line is torn ({length} bytes)" in said[0]
            assert output.read_bytes() == kept


@pytest.mark.parametrize(
    "tail", [b'{"id": 1, "te\n', b'{"id"\0\0\0', b"\0" * 512, b"{\0\0\n", b'{"id": "\xc3\n']
)
def test_what_a_power_cut_leaves_is_cut_off_too(
    source: Path, output: Path, finished: list[bytes], tail: bytes
) -> None:
    output.write_bytes(b"".join(finished[:3]) + tail)
    said: list[str] = []
    run(linear_llm(), source, output, say=said.append)
    assert sorted_lines(output) == sorted(finished)
    assert any(f"torn ({len(tail)} bytes)" in line for line in said)
    assert any("8 requests, 3 done" in line for line in said)


def test_done_requests_are_not_run_again(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, ran = linear_llm(), []
    submit = llm.submit
    monkeypatch.setattr(llm, "submit", lambda r, p: (ran.append(r.params.seed), submit(r, p)))
    output.write_bytes(b"".join(finished[2:6]))
    run(llm, source, output)
    done = [SHORT_IDS[line["id"]] for line in map(json.loads, finished[2:6])]
    assert sorted(ran + done) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert output.read_bytes().startswith(b"".join(finished[2:6]))


SHORT_IDS = {entry["id"]: entry["seed"] for entry in SHORT}


def test_when_all_is_done_no_model_is_loaded(
    source: Path, output: Path, finished: list[bytes]
) -> None:
    output.write_bytes(b"".join(finished))
    said: list[str] = []
    assert run_job(no_model, source, output, {}, said.append) == EXIT_OK
    assert said == [f"{output}: all 8 requests are done already"]
    assert output.read_bytes() == b"".join(finished)


DRIVER = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from tiny_models import tiny_llm
from job_runs import Prompts
from bailing_jax.cli.job import run_job

def load():
    llm = tiny_llm(max_num_seqs=2)
    return llm, Prompts(llm)

defaults = {"max_tokens": 5, "seed": 0, "ignore_eos": True}
sys.exit(run_job(load, Path(sys.argv[3]), Path(sys.argv[4]), defaults, print))
"""


def test_a_process_killed_by_the_system_leaves_nothing_to_repair(
    source: Path, output: Path, tmp_path: Path
) -> None:
    """Not even the lock, though the template's child may outlive it."""
    entries = [
        {"id": i, "prompt": f"tell {i}", "temperature": 1, "max_tokens": 3 + i % 4}
        for i in range(150)
    ]
    write_input(source, entries)
    here = Path(__file__).resolve().parent
    arguments = [str(here.parent), str(here), str(source), str(output)]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    kill_at = random.randrange(1, 60)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if output.exists() and output.read_bytes().count(b"\n") >= kill_at:
            break
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    assert kill_at <= output.read_bytes().count(b"\n") < 150, said
    run(linear_llm(), source, output)
    whole = tmp_path / "whole.jsonl"
    run(linear_llm(), source, whole)
    assert sorted_lines(output) == sorted_lines(whole)


def test_ctrl_c_says_what_is_left_and_keeps_what_is_done(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, steps, said = linear_llm(), itertools.count(), []
    step = llm.step

    def interrupted() -> None:
        if next(steps) == 5:
            raise KeyboardInterrupt
        step()

    synced = watch_os(monkeypatch, "fsync")
    with monkeypatch.context() as patch:
        patch.setattr(llm, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(llm, source, output, say=said.append)
    assert is_idle(llm)
    done = len(read(output))
    assert 0 < done < 8
    assert said[-1] == f"{8 - done} of 8 requests are left; the same command goes on"
    assert synced == [output.stat().st_size]
    run(llm, source, output)
    assert sorted_lines(output) == sorted(finished)


def test_lines_are_on_disk_at_the_end_and_every_few_seconds(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = watch_os(monkeypatch, "fsync")
    run(linear_llm(), write_input(source, SHORT), output)
    assert synced[-1] == output.stat().st_size
    assert len(synced) < len(SHORT)
    synced.clear()
    output.unlink()
    monkeypatch.setattr(job_output, "SYNC_S", 0)
    run(linear_llm(), source, output)
    ends = itertools.accumulate(len(line) for line in output.read_bytes().splitlines(True))
    assert synced[:-1] == list(ends)


# What goes wrong while it runs.


def failure(code: int, *args: Any, **kwargs: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        run(*args, **kwargs)
    assert caught.value.exit_code == code
    assert is_idle(args[0])
    return caught.value


@pytest.mark.parametrize("torn", [0, 11])
def test_a_full_disk_ends_the_job_and_keeps_what_is_done(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch, torn: int
) -> None:
    room = len(finished[0]) + len(finished[1]) + torn

    def write(fd: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = os.write(fd, data[:room])
        room -= count
        return count

    with monkeypatch.context() as patch:
        watch_os(patch, "write", write)
        error = failure(EXIT_FAILURE, linear_llm(), source, output)
    assert error.message == f"{output}: cannot be written: No space left on device"
    assert "the same command goes on" in error.hint
    assert output.read_bytes()[: -torn or None] == b"".join(finished[:2])
    run(linear_llm(), source, output)
    assert sorted_lines(output) == sorted(finished)


def test_a_line_written_in_pieces_is_whole(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a slow pipe takes it."""
    watch_os(monkeypatch, "write", lambda fd, data: os.write(fd, data[:7]))
    run(linear_llm(), source, output)
    assert sorted_lines(output) == sorted(finished)


def test_a_disk_that_fails_only_when_asked_is_noticed(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    watch_os(monkeypatch, "fsync", fsync)
    error = failure(EXIT_FAILURE, linear_llm(), write_input(source, SHORT), output)
    assert error.message == f"{output}: cannot be written: Input/output error"


def test_a_reader_of_stdout_that_leaves_ends_the_job(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        error = failure(EXIT_FAILURE, linear_llm(), write_input(source, SHORT), None)
    assert error.message == "stdout: cannot be written: Broken pipe"
    assert error.hint == ""


def test_a_line_that_changes_while_the_job_runs_is_noticed(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that are added are nobody's business."""
    llm = linear_llm()
    step = llm.step
    # Longer than what is read ahead.
    entries = [f'{{"prompt_ids": [{i}], "max_tokens": 2}}{" " * 20_000}\n' for i in range(1, 12)]
    text = "".join(entries)
    # Of the same length, so that nothing but the line itself tells.
    other = text.replace("[11]", "[12]")

    def runs(changed: str, do: Callable[[], Any]) -> Any:
        def changing() -> None:
            source.write_text(changed)
            step()

        source.write_text(text)
        output.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(llm, "step", changing)
            return do()

    error = runs(other, lambda: failure(EXIT_FAILURE, llm, source, output))
    assert error.message == f"{source}, line 11: changed since the job started"
    assert "kept" in error.hint
    assert 0 < len(read(output)) < 11
    runs(text + '{"more": 1}\n', lambda: run(llm, source, output))
    assert len(read(output)) == 11


def test_an_error_of_the_engine_is_no_users_and_keeps_what_is_done(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, steps = linear_llm(), itertools.count()
    step = llm.step
    with monkeypatch.context() as patch:
        patch.setattr(llm, "step", lambda: step() if next(steps) < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(llm, source, output)
    assert is_idle(llm)
    assert 0 < len(read(output)) < 8
    run(llm, source, output)
    assert sorted_lines(output) == sorted(finished)
