"""Kill one process of a job at a random moment, again and again, and see what the others do.

Each time a job of 2 or 4 processes on this machine (the real command, gloo between them) goes on
with the same output. When one of its processes gets SIGKILL, all others must end within 10
seconds, with a code that is not 0 and a message that names it. In the end the job runs to its end
undisturbed, and its output, sorted, must be byte for byte that of one process that nobody
disturbed (exact mode).

    python scripts/kill_workers.py --kills 20
    python scripts/kill_workers.py --quick

    python scripts/kill_workers.py --mesh data=2 --processes 2

The model is one over the devices of all processes, so collectives stand in every step, and whoever
waits in one when another process is killed must get out of it too.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
# The root comes before it: tests/ has folders named like the packages they test.
sys.path.insert(0, str(ROOT))

# From the kill to the end of the last process.
LIMIT_S = 10.0
# A process nobody ends; it says then where it stands.
WORKER_LIMIT_S = 400
NUM_REQUESTS = 40
_OPTIONS = (
    "--max-num-seqs", "3", "--max-model-len", "96", "--prefill-chunk", "16", "--batch-invariant",
)  # fmt: skip


# Two layers, one of each kind of attention: compiling is what takes time. All that four devices
# divide is a multiple of four.
_DIVISIBLE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "group_norm_size": 2,
    "vocab_size": 324,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}


@dataclass
class Kill:
    """One job that lost a process.

    Attributes:
        processes: how many it had.
        victim: which was killed.
        moment: when, in words.
        seconds: from the kill until the last of the others had ended.
        codes: the exit codes of the others.
        named: how many of the others named the victim on stderr.
        done: answers in the output afterwards.
        faults: what was not as it must be.
    """

    processes: int
    victim: int
    moment: str
    seconds: float
    codes: list[int]
    named: int
    done: int
    faults: list[str]


class Job:
    """A model, requests, and processes that answer them.

    Args:
        folder: where everything goes.
        num_requests: of the input.
        mesh: over the devices of all processes; None: the command's default.
        devices: of each process.
    """

    def __init__(
        self,
        folder: Path,
        num_requests: int = NUM_REQUESTS,
        mesh: str | None = None,
        devices: int = 1,
    ) -> None:
        from tiny_models import LINEAR, write_tiny_model

        self.folder = folder
        self.mesh = mesh
        self.devices = devices
        self.num_requests = num_requests
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.model = folder / "model"
        self.model.mkdir()
        write_tiny_model(self.model, {**LINEAR, **_DIVISIBLE})
        lines = [
            {
                "id": f"q{i}", "prompt_ids": [1 + i, 5, 7 * i % 300], "ignore_eos": True,
                "max_tokens": 30 + i % 5 * 12, "temperature": i % 2, "seed": i,
            }
            for i in range(num_requests)
        ]  # fmt: skip
        self.input.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(self, output: Path, *more: str) -> list[str]:
        """One process' command line."""
        return [
            sys.executable, str(Path(__file__).resolve()), "--worker", "--model",
            str(self.model), "--input", str(self.input), "--output", str(output),
            *_OPTIONS, *more,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Of every process: this source, its CPU devices, a cache of their own."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "BAILING_DEBUG": "0",
        }

    def start(self, count: int, *more: str) -> list[Worker]:
        """All processes of one job."""
        port = free_port()
        return [
            Worker(
                self.command(
                    self.output, "--coordinator-address", f"127.0.0.1:{port}",
                    "--num-processes", str(count), "--process-id", str(index),
                    *(("--mesh", self.mesh) if self.mesh else ()), *more,
                ),
                self.folder / f"stderr{index}",
                self.environment(),
            )
            for index in range(count)
        ]  # fmt: skip

    def done(self) -> int:
        """Complete lines of the output."""
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def undisturbed(self) -> list[bytes]:
        """The sorted output of one process alone."""
        whole = self.folder / "whole.jsonl"
        subprocess.run(
            self.command(whole, "--quiet"), env=self.environment(), check=True, cwd=self.folder
        )
        return sorted(whole.read_bytes().splitlines(keepends=True))


class Worker:
    """A started process and its stderr."""

    def __init__(self, command: list[str], errors: Path, environment: dict[str, str]) -> None:
        self._errors = errors
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, env=environment
            )

    @property
    def said(self) -> str:
        """Its stderr so far."""
        return self._errors.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Wait until it has said something."""
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.said}"
            time.sleep(0.05)

    def end(self, seconds: float) -> int:
        """Wait for its end; returns the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {seconds:.1f} s:\n{self.said}") from None


def free_port() -> int:
    """A port that nothing listens on at the moment, and neither on the next."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def kill_one(job: Job, count: int, rng: random.Random) -> Kill | None:
    """Start a job, kill one of its processes; None: it was done before."""
    victim = rng.randrange(count)
    workers = job.start(count)
    try:
        moment = _await_moment(job, workers, rng)
        if moment is None:
            return None
        start = time.monotonic()
        workers[victim].process.send_signal(signal.SIGKILL)
        faults: list[str] = []
        others = [worker for index, worker in enumerate(workers) if index != victim]
        codes: list[int] = []
        for worker in others:
            try:
                codes.append(worker.end(max(start + 3 * LIMIT_S - time.monotonic(), 0.1)))
            except AssertionError as error:
                faults.append(str(error))
        seconds = time.monotonic() - start
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    named = sum(f"process {victim} of {count}" in worker.said for worker in others)
    if seconds > LIMIT_S:
        faults.append(f"{seconds:.1f} s until all had ended")
    if 0 in codes:
        faults.append(f"exit codes {codes}")
    faults += [f"nothing on stderr of {w.process.args}" for w in others if not w.said.strip()]
    return Kill(count, victim, moment, round(seconds, 2), codes, named, job.done(), faults)


def _await_moment(job: Job, workers: list[Worker], rng: random.Random) -> str | None:
    """Wait for the moment of a kill: while they load and compile, or after so many answers more.

    Not before they have come together: who dies earlier is as one that never came, which only a
    launcher can tell; the others wait for it as long as they would in that case.
    """
    had = job.done()
    early = rng.random() < 0.35
    delay = rng.uniform(0, 8) if early else rng.uniform(0, 0.05)
    more = rng.randrange(min(20, job.num_requests - had))
    deadline = time.monotonic() + WORKER_LIMIT_S

    def has_come() -> bool:
        if early:
            return f": {job.num_requests} requests" in workers[0].said
        return job.done() > had + more

    while not has_come():
        if any(worker.process.poll() is not None for worker in workers):
            return None
        assert time.monotonic() < deadline, workers[0].said
        time.sleep(0.002)
    time.sleep(delay)
    # Behind its last answer a job ends in order, whoever is killed: there is nothing left to lose.
    if job.done() == job.num_requests or any(w.process.poll() is not None for w in workers):
        return None
    came = f"{delay:.1f} s after they had come together" if early else "while they answered"
    return f"{came}, {job.done()} of {job.num_requests} answers"


def run(kills: int, counts: list[int], seed: int, mesh: str | None = None) -> dict[str, Any]:
    """Kill so often; returns the report."""
    rng = random.Random(seed)
    found: list[Kill] = []
    endings = 0
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), mesh=mesh)
        want = job.undisturbed()
        faults: list[str] = []
        while len(found) < kills or job.done() < job.num_requests:
            count = counts[len(found) % len(counts)]
            kill = kill_one(job, count, rng) if len(found) < kills else None
            if kill is not None:
                found.append(kill)
                faults += [f"kill {len(found)}: {fault}" for fault in kill.faults]
                print(f"{len(found)}/{kills}: {kill}", file=sys.stderr, flush=True)
                if job.done() < job.num_requests:
                    continue
            codes = [worker.end(WORKER_LIMIT_S) for worker in job.start(count)]
            faults += [f"an undisturbed job ended with {codes}"] * (set(codes) != {0})
            if sorted(job.output.read_bytes().splitlines(keepends=True)) != want:
                faults.append("the output is not that of an undisturbed job")
            endings += 1
            if len(found) < kills:
                job.output.unlink()
    seconds = sorted(kill.seconds for kill in found)
    return {
        "kills": len(found),
        "jobs_completed_and_compared": endings,
        "seconds_median": seconds[len(seconds) // 2],
        "seconds_max": seconds[-1],
        "survivors": sum(len(kill.codes) for kill in found),
        "survivors_that_named_the_victim": sum(kill.named for kill in found),
        "faults": faults,
        "each": [asdict(kill) for kill in found],
    }


def work(arguments: list[str]) -> int:
    """Be one process: the generate command."""
    faulthandler.dump_traceback_later(WORKER_LIMIT_S, exit=True)
    from bailing_jax import generate

    _share_programs()
    return generate.main(arguments)


def _share_programs() -> None:
    """Let all processes read what process 0 compiled: on a CPU jax keeps programs by device."""
    from jax._src import cache_key

    of_options = cache_key._hash_serialized_compile_options
    cache_key._hash_serialized_compile_options = lambda hashed, options, **_: of_options(
        hashed, options, strip_device_assignment=True
    )
    cache_key._hash_accelerator_config = cache_key._hash_devices


def main() -> int:
    """Run, print the report as JSON; 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", default="2,4,2", help="of the jobs, in turn")
    parser.add_argument("--mesh", help="of all processes, each of one device (default: auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 kills, 2 processes")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.processes = 2, "2"
    counts = [int(count) for count in args.processes.split(",")]
    report = run(args.kills, counts, args.seed, args.mesh)
    print(json.dumps(report, indent=1))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
