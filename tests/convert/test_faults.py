"""Killed anywhere, a conversion leaves no wrong folder and can go on: rows S11 and S12.

S11: the manifest is the last file, and nothing has its name before it is on the disk. S12: after
a SIGKILL before any step, in the middle of any write, at any moment, after a second one, with
whatever was not fsynced lost, the output is whole or not there, and the same command goes on to
the same bytes without writing again what was finished. Ctrl-C is no different.

A step is a call that changes the disk. `convert_faults` does the harm, `fault_jobs` looks at it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from convert_faults import contents
from fault_jobs import (
    NAMES,
    Job,
    check_complete,
    check_killed,
    check_resumed,
    check_unfinished,
    jobs,
    places,
    rng_of,
    weights,
)
from faulty_converter import (
    CONFIG,
    ROOT,
    Identity,
    command,
    convert,
    environment,
    identity,
    journaled,
    partial_of,
)
from random_checkpoints import random_tensors, write_checkpoint
from slow import slow_but

from bailing_jax.errors import EXIT_INTERRUPTED, EXIT_OK
from convert.native import MANIFEST_NAME

KEPT = "what is finished is kept: run the same command to go on"


# ---- killed at a step


@pytest.mark.parametrize("name", slow_but(["one worker"], NAMES))
def test_s12_killed_before_any_step(name: str, tmp_path: Path) -> None:
    job = jobs()[name]
    assert len(job.steps) > 140
    check_killed(job, job.faults("kill"), tmp_path)
    # There is no step after the last.
    beyond = {"do": "kill", "step": len(job.steps) + 1}
    assert job.run(tmp_path / "out", fault=beyond).code == EXIT_OK


@pytest.mark.parametrize("name", slow_but(["two workers"], NAMES))
def test_s12_killed_halfway_through_any_write(name: str, tmp_path: Path) -> None:
    check_killed(jobs()[name], jobs()[name].faults("half", "pwrite"), tmp_path)


def test_s12_killed_and_what_was_not_fsynced_is_lost(tmp_path: Path) -> None:
    job = jobs()["one worker"]
    faults = zip(job.faults("lose"), job.steps, strict=True)
    # Between two writes to a file nothing else can be lost than after them.
    check_killed(job, [fault for fault, (call, _, _) in faults if call != "pwrite"], tmp_path)


def test_s12_killed_twice(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rng, job = rng_of(request.node.name), jobs()["one worker"]
    paths = places(tmp_path, 60)
    first = [rng.randrange(1, len(job.steps) + 1) for _ in paths]
    # How many steps are left depends on how many files are finished.
    second = [rng.randrange(1, 45 + (len(job.steps) - n) // 2) for n in first]
    kept: list[dict[str, Identity]] = [{} for _ in paths]
    for steps, at_least in ((first, len(paths)), (second, 40)):
        runs = job.run_faults(
            paths, [{"do": rng.choice(["kill", "lose"]), "step": n} for n in steps]
        )
        assert {run.code for run in runs} <= {-signal.SIGKILL, EXIT_OK}
        assert sum(run.code != EXIT_OK for run in runs) >= at_least
        for path, before in zip(paths, kept, strict=True):
            now = check_unfinished(job, path)
            assert before.items() <= now.items() or path.exists()
            before |= now
    check_resumed(job, paths, kept)


def test_s12_killed_while_it_tidies_up(tmp_path: Path) -> None:
    job = jobs()["one worker"]
    renamed = next(n for n, step in enumerate(job.steps, start=1) if step[0] == "rename")
    pairs = [(n, m) for n in range(renamed + 1, len(job.steps) + 1) for m in range(1, 9)]
    paths = places(tmp_path, len(pairs))
    for which in (0, 1):
        runs = job.run_faults(paths, [{"do": "kill", "step": pair[which]} for pair in pairs])
        killed = [run.code == -signal.SIGKILL for run in runs]
        assert all(killed) if which == 0 else any(killed)
        for path in paths:
            assert contents(path) == job.result
    check_resumed(job, paths, [journaled(path) for path in paths])


# ---- ended at a moment


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, float]:
    """A checkpoint that takes a while, and how long a real converter writes it."""
    folder = tmp_path_factory.mktemp("big")
    larger = {"num_hidden_layers": 6, "hidden_size": 250, "vocab_size": 9000, "num_experts": 8}
    config = {**CONFIG, **larger, "moe_intermediate_size": 90}
    write_checkpoint(folder / "source", config, random_tensors(config, 3), shards=4)
    process = begun(folder / "source", folder / "out")
    start = time.monotonic()
    _, err = process.communicate()
    seconds = time.monotonic() - start
    assert process.returncode == EXIT_OK, err
    out = folder / "out"
    assert sum(path.stat().st_size for path in out.iterdir()) > 20_000_000
    job = Job("hf-to-native", folder / "source", 2, out, result=contents(out))
    shutil.rmtree(out)
    return job, seconds


def begun(source: Path, path: Path) -> subprocess.Popen[str]:
    """A real converter which now begins to write, or goes on; or has ended already."""
    journal = partial_of(path) / "journal.json"
    before = identity(journal) if journal.exists() else None
    process = subprocess.Popen(
        command("hf-to-native", source, path, "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    while process.poll() is None:
        with suppress(FileNotFoundError):
            if identity(journal) != before:
                break
        time.sleep(0.001)
    return process


def end_at_random(
    big: tuple[Job, float], path: Path, rng: random.Random, by: signal.Signals
) -> tuple[int, str]:
    """Begin or go on, and send the signal while what is left is written: exit code and stderr."""
    job, seconds = big
    left = 1 - len(journaled(path)) / len(weights(job))
    process = begun(job.source, path)
    time.sleep(rng.uniform(0, seconds * left))
    process.send_signal(by)
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.slow
def test_s12_killed_at_50_random_moments(
    request: pytest.FixtureRequest, big: tuple[Job, float], tmp_path: Path
) -> None:
    rng, job, kills, resumed = rng_of(request.node.name), big[0], 0, 0
    path = places(tmp_path, 1)[0]
    for _ in range(150):
        if kills == 50:
            break
        kept = journaled(path)
        code, err = end_at_random(big, path, rng, signal.SIGKILL)
        assert code in (-signal.SIGKILL, EXIT_OK), err
        kills += code != EXIT_OK
        resumed += bool(kept)
        check_unfinished(job, path)
        if path.exists():
            assert {name: identity(path / name) for name in kept} == kept
            assert convert("hf-to-native", job.source, path).returncode == EXIT_OK
            check_complete(job, path)
            shutil.rmtree(path)
    assert kills == 50
    assert resumed > 10
    assert convert("hf-to-native", job.source, path).returncode == EXIT_OK
    check_complete(job, path)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Processes started now heed SIGINT, even if this one was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_s12_interrupted_at_random_moments(
    request: pytest.FixtureRequest, big: tuple[Job, float], tmp_path: Path
) -> None:
    rng, job, interrupted = rng_of(request.node.name), big[0], 0
    path = places(tmp_path, 1)[0]
    for _ in range(50):
        if interrupted == 8:
            break
        code, err = end_at_random(big, path, rng, signal.SIGINT)
        kept = check_unfinished(job, path)
        if path.exists():
            shutil.rmtree(path.parent)  # the signal came too late
            path.parent.mkdir()
            continue
        assert code == EXIT_INTERRUPTED, err
        assert err.splitlines()[-2:] == [KEPT, "interrupted"]
        assert partial_of(path).exists() == bool(kept)
        interrupted += 1
    assert interrupted == 8
    assert convert("hf-to-native", job.source, path).returncode == EXIT_OK
    check_complete(job, path)


# ---- in which order


@pytest.mark.parametrize("name", NAMES)
def test_s11_every_file_is_on_the_disk_before_it_has_its_name(name: str) -> None:
    job = jobs()[name]
    calls = [(call, path) for call, path, _ in job.steps]
    folder = next(path for call, path in calls if call == "rename")
    journal = ("open", f"{os.path.dirname(folder)}/journal.json.tmp")
    replaced = [n for n, (call, _) in enumerate(calls) if call == "replace"]
    assert len(replaced) > len(job.result or ())
    for n in replaced:
        path = calls[n][1]
        opened = max(i for i in range(n) if calls[i] == ("open", path))
        synced = calls.index(("fsync", path), opened)
        assert ("pwrite", path) in calls[opened:synced]
        assert ("pwrite", path) not in calls[synced:n]
        assert synced < n
        # And the name is on the disk before anything relies on it.
        named = calls.index(("fsync", os.path.dirname(path)), n)
        assert not {journal, ("rename", folder)} & set(calls[n:named])
    published = calls.index(("rename", folder))
    assert calls[published + 1] == ("fsync", str(job.made.parent))
    assert {call for call, _ in calls[published + 2 :]} == {"unlink", "rmdir"}


@pytest.mark.parametrize("name", NAMES)
def test_s11_the_manifest_is_the_last_file(name: str) -> None:
    job = jobs()[name]
    assert job.result is not None
    folder = next(path for call, path, _ in job.steps if call == "rename")
    named = [path for call, path, _ in job.steps if call == "replace" and path.startswith(folder)]
    names = [os.path.basename(path).removesuffix(".tmp") for path in named]
    assert sorted(names) == sorted(job.result)
    assert not any(".tmp" in name or name.startswith(".") for name in job.result)
    assert (names[-1] == MANIFEST_NAME) == (job.command == "hf-to-native")
    are_weights = [name.endswith(".safetensors") for name in names]
    assert are_weights == sorted(are_weights, reverse=True)
    # Every byte came by way of a step.
    sizes = [sum(size for _, path, size in job.steps if path == temporary) for temporary in named]
    assert sizes == [(job.made / name).stat().st_size for name in names]
