"""LLMs that processes make by themselves under jax.distributed: what they compare, and answers."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checks import assert_same_bits
from kill_workers import Job as ModelJob
from kill_workers import Worker, free_port
from tiny_models import LINEAR, write_tiny_model
from tolerances import TOLERANCES

from bailing_jax.errors import EXIT_OK, EXIT_USAGE

pytestmark = pytest.mark.unoptimised

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()

LOADS = """
import sys, time
import bailing_jax
from bailing_jax import distributed, errors, runtime
import jax
address, index, folder, num_bytes, options = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
runtime.memory_bytes = lambda *_: int(num_bytes)
options = eval(options)
distributed.WAIT_S = options.pop("wait", distributed.WAIT_S)
jax.devices()  # here jax itself waits for the others
time.sleep(options.pop("sleep", 0))
def load():
    bailing_jax.LLM(folder, max_num_seqs=64, max_model_len=512, **options)
sys.exit(errors.run_command(load, {}))
"""


class Pair:
    """Two processes that load a model, each with arguments of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.workers = folder, []
        self.models = [folder / "model0", folder / "model1"]
        for model in self.models:
            model.mkdir()
            write_tiny_model(model)

    def run(
        self, *, memory: tuple[int, int] = (10**9, 10**9), options: tuple[str, str] = ("{}", "{}")
    ) -> list[int]:
        """Their exit codes."""
        address = f"127.0.0.1:{free_port()}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        # The tests' debug mode is for one process.
        environment.pop("BAILING_DEBUG", None)
        self.workers = [
            Worker(
                [sys.executable, "-c", LOADS, address, str(index), str(self.models[index]),
                 str(memory[index]), options[index]],
                self._folder / f"stderr{index}",
                environment,
            )
            for index in range(2)
        ]  # fmt: skip
        return [worker.end(120) for worker in self.workers]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for worker in made.workers:
        worker.process.kill()
        worker.process.wait()


def refused(pair: Pair, field: str, theirs: str, ours: str) -> None:
    """Both name the field and both values, before any weight was read."""
    words = (
        rf"process 1 of 2 \({HOST}\): {field} = {theirs}; process 0 of 2 \({HOST}\) has {ours}\n"
    )
    for worker in pair.workers:
        assert re.search(words, worker.said), worker.said
        assert "reading" not in worker.said
        assert "Traceback" not in worker.said


def test_equal_processes_load(pair: Pair) -> None:
    """Their copies of the model lie in different folders."""
    assert pair.run() == [EXIT_OK] * 2, pair.workers[0].said
    assert all("reading" in worker.said for worker in pair.workers)


def test_room_for_other_numbers_of_pages_is_refused(pair: Pair) -> None:
    """Both have room for the model, but not for every sequence at full length."""
    assert pair.run(memory=(10_000_000, 9_500_000)) == [EXIT_USAGE] * 2, pair.workers[0].said
    refused(pair, "engine max_num_pages", r"\d+", r"\d+")
    assert "smaller max_num_seqs or max_model_len" in pair.workers[1].said


def test_another_argument_is_refused(pair: Pair) -> None:
    """One that leaves every size as it is: programs would differ."""
    options = ("{}", "{'rope_dtype': 'bfloat16'}")
    assert pair.run(options=options) == [EXIT_USAGE] * 2, pair.workers[0].said
    refused(pair, "option rope_dtype", '"bfloat16"', "null")


def test_another_model_is_refused(pair: Pair) -> None:
    """Of the same shapes."""
    write_tiny_model(pair.models[1], {**LINEAR, "rms_norm_eps": 1e-5})
    assert pair.run() == [EXIT_USAGE] * 2, pair.workers[0].said
    refused(pair, "config.json rms_norm_eps", "1e-05", "1e-06")


def test_who_does_not_come_is_named(pair: Pair) -> None:
    codes = pair.run(options=("{'wait': 3}", "{'sleep': 8}"))
    assert codes[0] != EXIT_OK
    words = r"process 1 of 2 did not come as far as this one \(facts 1\): .*3s"
    assert re.search(words, pair.workers[0].said), pair.workers[0].said
    assert "Traceback" not in pair.workers[0].said


SHARED_MEMORY = """
import sys
from bailing_jax import runtime
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
print("its bytes:", runtime.memory_bytes(2), file=sys.stderr)
"""


def test_processes_of_one_host_share_its_memory(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    workers = [
        Worker(
            [sys.executable, "-c", SHARED_MEMORY, address, str(index)],
            tmp_path / f"stderr{index}",
            environment,
        )
        for index in range(2)
    ]
    assert [worker.end(120) for worker in workers] == [EXIT_OK] * 2, workers[0].said
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for worker in workers:
        assert f"its bytes: {half}\n" in worker.said


@pytest.mark.slow
def test_an_llm_under_jax_distributed_scores_and_generates_as_one_device_does(
    tmp_path: Path,
) -> None:
    """Every process makes the same calls, and gets the whole of what comes of them."""
    model_job = ModelJob(tmp_path, 1)
    model_job.devices = 1
    script = str(Path(__file__).with_name("llm_worker.py"))
    address = f"127.0.0.1:{free_port()}"

    def start(name: str, *who: str) -> Worker:
        files = (str(model_job.model), str(model_job.folder / f"{name}.npz"))
        return Worker(
            [sys.executable, script, *who, *files],
            model_job.folder / f"stderr_{name}",
            model_job.environment(),
        )

    both = [start(f"of_two_{index}", address, "2", str(index)) for index in range(2)]
    try:
        assert [worker.end(300) for worker in both] == [0, 0], both[0].said + both[1].said
    finally:
        for worker in both:
            worker.process.kill()
    assert start("alone", "-", "1", "0").end(300) == 0
    zero, one, alone = (
        np.load(model_job.folder / f"{name}.npz") for name in ("of_two_0", "of_two_1", "alone")
    )
    assert set(zero) >= {"logits", "state0"}
    # Each process read the parts of its own device: a half of what is divided.
    whole = int(zero["bytes_of_weights"])
    for seen in (zero, one):
        assert whole / 2 <= int(seen["bytes_read"]) < 0.6 * whole
    for name in set(zero) - {"bytes_read"}:
        assert_same_bits(zero[name], one[name])
        if name == "tokens":
            assert_same_bits(zero[name], alone[name])
        elif name != "drawn":
            scale = max(1.0, np.abs(alone[name]).max())
            error = np.abs(zero[name] - alone[name]).max() / scale
            assert error <= TOLERANCES["mesh_logits"], (name, error)
