"""Real processes, jax.distributed and gloo between them: signals, losses, and who does not come.

Most of them have an engine that costs nothing; the last ones run one tiny model over all devices.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_workers import LIMIT_S, Worker, free_port
from kill_workers import Job as ModelJob

from bailing_jax import small_model
from bailing_jax.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_TERMINATED, EXIT_USAGE

pytestmark = pytest.mark.unoptimised

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).resolve().parent / "worker.py"
HOST = socket.gethostname()
NUM_REQUESTS, NUM_TOKENS = 30, 40


class Job:
    """A job of the fake engine and its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.source.write_text(
            "".join(
                json.dumps({"id": i, "prompt_ids": [i + 1], "max_tokens": NUM_TOKENS}) + "\n"
                for i in range(NUM_REQUESTS)
            )
        )
        self.workers: list[Worker] = []

    def start(self, count: int, *models: Path, wait_s: float = 120) -> list[Worker]:
        """All processes, each with its model if any are given."""
        port = free_port()
        self.workers = [
            self.start_one(index, count, port, *models[index : index + 1], wait_s=wait_s)
            for index in range(count)
        ]
        return self.workers

    def start_one(self, index: int, count: int, port: int, *model: Path, wait_s: float) -> Worker:
        """One process."""
        command = [
            sys.executable, str(WORKER), str(wait_s), "--input", str(self.source),
            "--output", str(self.output), "--coordinator-address", f"127.0.0.1:{port}",
            "--num-processes", str(count), "--process-id", str(index),
            *(argument for path in model for argument in ("--model", str(path))),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        return Worker(command, self.folder / f"stderr{index}", environment)

    def await_answers(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while not self.output.exists() or self.output.read_bytes().count(b"\n") < count:
            assert all(worker.process.poll() is None for worker in self.workers), [
                worker.said for worker in self.workers
            ]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def codes(self, seconds: float = 120) -> list[int]:
        return [worker.end(seconds) for worker in self.workers]

    def answers(self) -> dict[int, list[int]]:
        found = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({line["id"] for line in found}) == len(found)
        return {line["id"]: line["token_ids"] for line in found}


WANT = {i: [i + 1 + k for k in range(NUM_TOKENS)] for i in range(NUM_REQUESTS)}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    for worker in made.workers:
        worker.process.kill()
        worker.process.wait()


def test_sigterm_to_any_process_drains_and_the_same_command_goes_on(job: Job) -> None:
    first, second = job.start(2)
    job.await_answers(5)
    second.process.send_signal(signal.SIGTERM)
    assert job.codes() == [EXIT_TERMINATED] * 2
    done = job.answers()
    assert 5 <= len(done) < NUM_REQUESTS
    assert done.items() <= WANT.items()
    left = f"{NUM_REQUESTS - len(done)} of {NUM_REQUESTS} requests are left; the same command"
    assert left in first.said
    assert first.said.endswith("terminated\n")
    # What ran was finished: the last answers came after the signal, and none is half done.
    first, second = job.start(2)
    assert job.codes() == [EXIT_OK] * 2
    assert f"{NUM_REQUESTS} requests, {len(done)} done" in first.said
    assert job.answers() == WANT
    assert first.said.startswith("waiting up to 120 s for the other processes; process 0 of 2")
    # Nothing of ours; gloo tells with whom it is connected.
    assert re.sub(r".*\[?Gloo\]?.*\n", "", second.said) == ""


def test_ctrl_c_stops_all_at_the_next_step(job: Job) -> None:
    first, _ = job.start(2)
    job.await_answers(2)
    first.process.send_signal(signal.SIGINT)
    assert job.codes() == [EXIT_INTERRUPTED] * 2
    assert job.answers().items() <= WANT.items()
    assert "requests are left; the same command goes on" in first.said
    assert first.said.endswith("interrupted\n")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_in_a_collective(job: Job, victim: int) -> None:
    job.start(2)
    job.await_answers(3)
    start = time.monotonic()
    job.workers[victim].process.kill()
    other = job.workers[1 - victim]
    assert other.end(LIMIT_S) not in (EXIT_OK, None)
    assert time.monotonic() - start < LIMIT_S
    ours = f"error: process {1 - victim} of 2 ({HOST}): lost process {victim} of 2 ({HOST})"
    # jax's own runtime lives in process 0, and may be faster to notice its end.
    jaxs = "JAX distributed service detected fatal errors"
    assert ours in other.said or (victim == 0 and jaxs in other.said)
    assert job.answers().items() <= WANT.items()


def test_a_model_that_differs_on_one_host_is_refused(job: Job, tmp_path: Path) -> None:
    models = [tmp_path / "one", tmp_path / "two"]
    for model in models:
        shutil.copytree(small_model.folder(), model)
    config = json.loads((models[1] / "config.json").read_text())
    theta = config["rope_theta"]
    (models[1] / "config.json").write_text(json.dumps({**config, "rope_theta": theta + 1}))
    with (models[1] / "model-00002-of-00002.safetensors").open("ab") as file:
        file.write(b"\0")
    first, second = job.start(2, *models)
    assert job.codes() == [EXIT_USAGE] * 2
    one, two = (f"process {index} of 2 ({HOST})" for index in range(2))
    difference = f"{two}: config.json rope_theta = {theta + 1}; {one} has {theta}\n"
    for worker in (first, second):
        assert "the processes of this job do not agree:" in worker.said
        assert difference in worker.said
        assert f"{two}: model-00002-of-00002.safetensors = " in worker.said
        assert "loaded" not in worker.said
        assert "Traceback" not in worker.said
    assert f"error: {one}: the processes" in first.said
    assert f"error: {two}: {one}: the processes" in second.said
    assert not job.output.exists()


def test_a_host_without_the_model_ends_all(job: Job, tmp_path: Path) -> None:
    first, second = job.start(2, small_model.folder(), tmp_path / "nowhere")
    assert job.codes() == [EXIT_USAGE] * 2
    words = f"process 1 of 2 ({HOST}): {tmp_path / 'nowhere'}: no such folder"
    assert f"error: {words}" in second.said
    assert f"error: process 0 of 2 ({HOST}): {words}" in first.said


def test_processes_that_do_not_come_are_waited_for_and_the_causes_named(job: Job) -> None:
    """Either side alone; the wait is announced before it begins."""
    job.workers = [job.start_one(i, 2, free_port(), wait_s=4) for i in range(2)]
    assert job.codes(60) == [EXIT_FAILURE] * 2
    first, second = job.workers
    assert first.said.startswith("waiting up to 4 s for the other processes; process 0 of 2")
    for index, worker in enumerate((first, second)):
        name = f"process {index} of 2 (flags), coordinator at 127.0.0.1:"
        assert re.search(rf"{re.escape(name)}\d+: still waiting for the others", worker.said)
        assert re.search(rf"error: {re.escape(name)}\d+: the others did not come", worker.said)
        assert "Two likely causes: another process was not started" in worker.said
        assert "can't be reached from every host (another address, a firewall)" in worker.said
    assert not job.output.exists()


@pytest.fixture(scope="module")
def model_job(tmp_path_factory: pytest.TempPathFactory) -> ModelJob:
    """A tiny model, requests, and one folder of compiled programs for all that follows."""
    return ModelJob(tmp_path_factory.mktemp("model_job"), NUM_ANSWERS)


@pytest.fixture(scope="module")
def undisturbed(model_job: ModelJob) -> list[bytes]:
    """What one process with one device answers."""
    return model_job.undisturbed()


NUM_ANSWERS = 16


def run_until(job: ModelJob, count: int, signum: int, victim: int) -> tuple[list[Worker], float]:
    """Start two processes, send one a signal in the middle; how long until all had ended."""
    workers = job.start(2)
    try:
        deadline = time.monotonic() + 240
        while job.done() < count:
            assert all(worker.process.poll() is None for worker in workers), workers[0].said
            assert time.monotonic() < deadline, workers[0].said
            time.sleep(0.001)
        start = time.monotonic()
        workers[victim].process.send_signal(signum)
        for worker in workers:
            worker.end(LIMIT_S if signum == signal.SIGKILL else 120)
        return workers, time.monotonic() - start
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def finish(job: ModelJob, undisturbed: list[bytes]) -> None:
    """The same command goes on to the same bytes."""
    had = job.done()
    assert 0 < had < NUM_ANSWERS
    workers = job.start(2)
    assert [worker.end(240) for worker in workers] == [EXIT_OK] * 2, workers[0].said
    assert f"{NUM_ANSWERS} requests, {had} done" in workers[0].said
    assert sorted(job.output.read_bytes().splitlines(keepends=True)) == undisturbed


def test_r096_a_model_over_two_processes_is_killed_and_goes_on_to_the_same_bytes(
    model_job: ModelJob, undisturbed: list[bytes]
) -> None:
    """No mesh is named: it is that of all devices."""
    model_job.output.unlink(missing_ok=True)
    model_job.mesh, model_job.devices = None, 1
    workers, seconds = run_until(model_job, 3, signal.SIGKILL, 1)
    assert seconds < LIMIT_S
    assert workers[0].process.returncode not in (EXIT_OK, None)
    assert "lost process 1 of 2" in workers[0].said
    mesh = "mesh data=1,expert=1,tensor=2: 2 of 2 devices in 2 processes;"
    assert mesh in workers[0].said
    assert mesh not in workers[1].said
    finish(model_job, undisturbed)


@pytest.mark.slow
def test_a_model_over_two_processes_of_two_devices_drains_and_goes_on_to_the_same_bytes(
    model_job: ModelJob, undisturbed: list[bytes]
) -> None:
    model_job.output.unlink(missing_ok=True)
    model_job.mesh, model_job.devices = "data=2,tensor=2", 2
    workers, _ = run_until(model_job, 3, signal.SIGTERM, 1)
    assert [worker.process.returncode for worker in workers] == [EXIT_TERMINATED] * 2
    finish(model_job, undisturbed)


def test_a_mesh_without_a_device_of_each_process_is_refused_before_weights_are_read(
    model_job: ModelJob,
) -> None:
    model_job.output.unlink(missing_ok=True)
    model_job.mesh, model_job.devices = "data=1", 1
    workers = model_job.start(2)
    assert [worker.end(120) for worker in workers] == [EXIT_USAGE] * 2
    words = "mesh: data=1,expert=1,tensor=1 leaves 1 of 2 processes without a device"
    for worker in workers:
        assert words in worker.said
        assert "reading" not in worker.said
        assert "Traceback" not in worker.said
    assert model_job.done() == 0


def test_hosts_with_room_for_other_numbers_of_pages_are_refused_before_weights_are_read(
    model_job: ModelJob,
) -> None:
    """Both have room for the model, but not for every sequence at full length."""
    model_job.output.unlink(missing_ok=True)
    model_job.devices = 1
    script = str(Path(__file__).with_name("memory_worker.py"))
    _, _, _, *arguments = model_job.command(
        model_job.output, "--max-num-seqs", "64", "--max-model-len", "512",
        "--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", "2",
    )  # fmt: skip
    workers = [
        Worker(
            [sys.executable, script, memory, *arguments, "--process-id", str(index)],
            model_job.folder / f"stderr{index}",
            model_job.environment(),
        )
        for index, memory in enumerate(("10000000", "9500000"))
    ]
    assert [worker.end(120) for worker in workers] == [EXIT_USAGE] * 2, workers[0].said
    words = rf"process 1 of 2 \({HOST}\): engine max_num_pages = \d+; process 0 of 2 .* has \d+"
    for worker in workers:
        assert re.search(words, worker.said)
        assert "reading" not in worker.said
        assert "Traceback" not in worker.said
    assert "Smaller --max-num-seqs or --max-model-len" in workers[0].said
    assert model_job.done() == 0
