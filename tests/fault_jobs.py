"""The conversions that the fault tests disturb, and what each of these tests asks of the outcome.

`jobs()` are made once for all tests, as `converter()` is started once.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from convert_faults import contents
from faulty_converter import (
    Converter,
    Identity,
    Run,
    Step,
    convert,
    identity,
    journaled,
    partial_of,
    request,
    write_source,
)

from bailing_jax.errors import EXIT_FAILURE, EXIT_OK

NAMES = ("one worker", "two workers", "back")
_SHARD_BYTES = 9000  # five shards of the tiny model


@dataclass(frozen=True)
class Job:
    """A conversion, what it makes, where it did, and its steps when nothing happens."""

    command: str
    source: Path
    workers: int
    made: Path
    shard_bytes: int | None = None
    result: Mapping[str, str] | None = None
    steps: Sequence[Step] = ()

    def to(self, path: Path, *more: str, **options: Any) -> dict[str, Any]:
        """The request to convert to `path`."""
        argv = [self.command, self.source, path, "--workers", str(self.workers), *more]
        return request(*argv, shard_bytes=self.shard_bytes, **options)

    def run(self, path: Path, *more: str, **options: Any) -> Run:
        """Convert to `path`."""
        return converter().run(self.to(path, *more, **options))

    def run_faults(
        self, paths: Sequence[Path], faults: Sequence[Mapping[str, Any]]
    ) -> list[Run]:
        """Convert to each place, with a fault each."""
        pairs = zip(paths, faults, strict=True)
        return converter().run_all([self.to(path, fault=fault) for path, fault in pairs])

    def faults(self, do: str, of: str | None = None, **more: Any) -> list[dict[str, Any]]:
        """That fault at each step, or at each call of one function."""
        count = sum(of in (None, name) for name, _, _ in self.steps)
        return [{"do": do, "of": of, "step": n, **more} for n in range(1, count + 1)]


@functools.cache
def converter() -> Converter:
    """One for all tests."""
    started = Converter()
    atexit.register(started.end)
    return started


@functools.cache
def jobs() -> dict[str, Job]:
    """The conversions by name; what they make is what a real converter makes."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    source, native = write_source(folder / "source"), folder / "native"
    done = convert("hf-to-native", source, native)
    assert done.returncode == EXIT_OK, done.stderr
    found = {
        "one worker": Job("hf-to-native", source, 1, folder / "one", None, contents(native)),
        "two workers": Job("hf-to-native", source, 2, folder / "two", None, contents(native)),
        "back": Job("native-to-hf", native, 1, folder / "back", _SHARD_BYTES),
    }
    for name, job in found.items():
        run = job.run(job.made, watched=True)
        assert run.code == EXIT_OK, run.err
        found[name] = replace(job, steps=run.steps, result=job.result or contents(job.made))
        assert contents(job.made) == found[name].result
        # No call that changes a folder is left out.
        assert run.audited == sum(call not in ("pwrite", "fsync") for call, _, _ in run.steps)
    assert len(weights(found["back"])) == 5
    # The way back leads to the same weights, so its result is not just any checkpoint.
    again = replace(found["one worker"], source=folder / "back")
    assert again.run(folder / "again").code == EXIT_OK
    assert weights(again).items() <= contents(folder / "again").items()
    return found


def weights(job: Job) -> dict[str, str]:
    """The weight files a job makes."""
    assert job.result is not None
    return {n: digest for n, digest in job.result.items() if n.endswith(".safetensors")}


def rng_of(name: str) -> random.Random:
    """Random numbers of the test's own, the same in every run."""
    return random.Random(zlib.crc32(name.encode()))


def places(folder: Path, count: int) -> list[Path]:
    """Outputs to be, each the only thing in its folder."""
    for n in range(count):
        (folder / f"{n:04}").mkdir()
    return [folder / f"{n:04}" / "out" for n in range(count)]


def check_unfinished(job: Job, path: Path) -> dict[str, Identity]:
    """Nothing is to be seen, or all; what the journal lists is complete. Returns these files."""
    if path.exists():
        assert contents(path) == job.result
    assert set(os.listdir(path.parent)) <= {path.name, partial_of(path).name}
    kept = journaled(path)
    if kept:
        found = contents(path if path.exists() else partial_of(path) / "files")
        assert {name: found[name] for name in kept}.items() <= weights(job).items()
    return kept


def check_complete(job: Job, path: Path) -> None:
    """The output is what it should be, and nothing else is left."""
    assert contents(path) == job.result
    assert os.listdir(path.parent) == [path.name]


def check_resumed(
    job: Job, paths: Sequence[Path], kept: Sequence[Mapping[str, Identity]]
) -> None:
    """The same command completes them all, and writes no file that is kept a second time."""
    runs = converter().run_all([job.to(path) for path in paths])
    for path, before, run in zip(paths, kept, runs, strict=True):
        assert run.code == EXIT_OK, run.err
        check_complete(job, path)
        assert {name: identity(path / name) for name in before} == before
        shutil.rmtree(path.parent)


def check_killed(job: Job, faults: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Each fault kills; what it leaves is sound, and goes on to the right end."""
    paths = places(folder, len(faults))
    runs = job.run_faults(paths, faults)
    assert [run.code for run in runs] == [-signal.SIGKILL] * len(faults)
    kept = [check_unfinished(job, path) for path in paths]
    assert sum(map(bool, kept)) > len(faults) // 3
    check_resumed(job, paths, kept)


def check_disk_error(run: Run, path: Path, code: int) -> None:
    """One line says what failed where, one what to do; no output."""
    assert run.code == EXIT_FAILURE, run.err
    *before, error, hint = run.err.splitlines()
    assert not any(line.startswith(("error", "Traceback")) for line in before)
    assert error == f"error: {path}: cannot be written: {os.strerror(code)}"
    assert "free space, quota" in hint
    assert "run the same command again" in hint
    assert not run.out


@functools.cache
def mounting() -> Converter:
    """A converter that has mounts of its own, where the system allows that; found by trying."""
    said = ""
    folder = Path(tempfile.mkdtemp())
    atexit.register(folder.rmdir)
    for options in ("-m", "-rm"):  # as root, and as anybody
        prefix = ["unshare", options]
        argv = [*prefix, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except OSError as error:
            said = str(error)
            continue
        if done.returncode == 0:
            started = Converter(*prefix)
            atexit.register(started.end)
            return started
        said = done.stderr.strip()
    pytest.skip(f"no process may have mounts of its own here, so no disk can be full: {said}")


def mount(disk: Path, pages: int) -> Path:
    """An empty disk of a number of pages of memory, for the converter that has mounts."""
    disk.mkdir()
    size = f"size={pages * os.sysconf('SC_PAGE_SIZE')}"
    mounting().command("mount", "-t", "tmpfs", "-o", size, "tmpfs", disk)
    return disk


def remount(disk: Path, option: str) -> None:
    """Change an option of the disk."""
    mounting().command("mount", "-o", f"remount,{option}", disk)
