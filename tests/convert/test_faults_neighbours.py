"""Others at the same folders, and tensors that are not what was planned: rows S10, S14 and S15.

S14: of several converters at one output one works, the others say so. S15: the input is only
read, and lies apart from the output. S10: a tensor of another size than planned is an error.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_faults import contents
from fault_jobs import (
    Job,
    check_complete,
    check_disk_error,
    check_resumed,
    check_unfinished,
    converter,
    jobs,
    mount,
    mounting,
    places,
    remount,
    weights,
)
from faulty_converter import (
    ROOT,
    command,
    convert,
    environment,
    identity,
    journaled,
    partial_of,
    request,
    snapshot,
)

from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, UserError
from convert.native import MANIFEST_NAME
from convert.output_folder import locked
from convert.writer import Conversion, OutFile, OutTensor, write

# ---- S14: several at one output


def test_s14_a_second_one_at_any_step(tmp_path: Path) -> None:
    job = jobs()["one worker"]
    calls = [call for call, _, _ in job.steps]
    locked, last = calls.index("flock") + 1, len(calls)
    unlocked = last - 1
    assert job.steps[unlocked - 1][0] == "unlink"
    assert job.steps[unlocked - 1][1].endswith("/lock")
    chosen = {*range(1, 14), *range(14, last - 10, 13), *range(last - 10, last + 1)}
    for step in sorted(chosen):
        path = places(tmp_path, 1)[0]
        first = job.run(path, fault={"do": "stop", "step": step})
        assert first.code is None
        second = job.run(path)
        if locked < step <= unlocked:
            assert second.code == EXIT_FAILURE
            assert f"error: {path}: another conversion is writing to it" in second.err
        else:
            assert second.code == EXIT_OK, second.err
        kept = check_unfinished(job, path)
        ended = converter().go_on(first)
        assert ended.code == EXIT_OK, ended.err
        check_complete(job, path)
        assert {name: identity(path / name) for name in kept} == kept
        shutil.rmtree(path.parent)


def test_s14_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    fault = {"do": "kill", "step": [call for call, _, _ in job.steps].index("flock") + 2}
    assert job.run(path, fault=fault).code == -signal.SIGKILL
    assert os.listdir(partial_of(path)) == ["lock"]
    check_resumed(job, [path], [{}])


def test_s14_a_lock_that_was_removed_counts_for_nothing(tmp_path: Path) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    locked = [call for call, _, _ in job.steps].index("flock") + 1
    # It has opened the lock that the next one removes, as nothing is finished.
    first = job.run(path, fault={"do": "stop", "step": locked})
    disk = {"do": "fail", "of": "pwrite", "step": 1, "errno": errno.EIO}
    assert job.run(path, fault=disk).code == EXIT_FAILURE
    assert not partial_of(path).exists()
    third = job.run(path, fault={"do": "stop", "step": locked + 60})
    before = check_unfinished(job, path)
    refused = converter().go_on(first)
    assert refused.code == EXIT_FAILURE
    assert f"error: {path}: another conversion is writing to it" in refused.err
    assert before
    assert check_unfinished(job, path) == before
    assert converter().go_on(third).code == EXIT_OK
    check_complete(job, path)


def test_s14_a_folder_that_was_removed_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before was still there for mkdir, and is gone when mkdir's error is looked into."""
    make, refusals = os.mkdir, [FileExistsError(errno.EEXIST, "File exists")] * 2

    def mkdir(*args: Any, **options: Any) -> None:
        if refusals:
            raise refusals.pop()
        make(*args, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with locked(tmp_path / "out"):
        assert os.listdir(tmp_path / ".out.partial") == ["lock"]
    assert not refusals
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("what", ["file", "link to nothing"])
def test_s14_something_else_of_the_folders_name_is_refused(tmp_path: Path, what: str) -> None:
    partial = tmp_path / ".out.partial"
    partial.write_text("mine") if what == "file" else partial.symlink_to(tmp_path / "gone")
    before = os.lstat(partial)
    with pytest.raises(UserError, match=r"out: cannot be written: File exists"):
        locked(tmp_path / "out").__enter__()
    assert os.lstat(partial) == before
    assert os.listdir(tmp_path) == [".out.partial"]


def check_one_wrote(job: Job, path: Path, ended: Sequence[tuple[int | None, str, str]]) -> None:
    """One process wrote the output; the others were refused, or found it complete."""
    written = []
    for code, out, err in ended:
        assert code in (EXIT_OK, EXIT_FAILURE), err
        if code == EXIT_OK:
            written.append(not json.loads(out)["already_complete"])
        else:
            assert f"error: {path}: another conversion is writing to it" in err
            assert not out
    assert sum(written) == 1
    check_complete(job, path)


def test_s14_six_at_once(tmp_path: Path) -> None:
    job, refused = jobs()["one worker"], 0
    for path in places(tmp_path, 12):
        runs = converter().run_all([job.to(path, "--json")] * 6, at_once=6)
        check_one_wrote(job, path, [(run.code, run.out, run.err) for run in runs])
        refused += sum(run.code == EXIT_FAILURE for run in runs)
    assert refused


def test_s14_six_real_converters_at_once(tmp_path: Path) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    processes = [
        subprocess.Popen(
            command(job.command, job.source, path, "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        for _ in range(6)
    ]
    said = [process.communicate() for process in processes]
    codes = [process.returncode for process in processes]
    check_one_wrote(job, path, [(code, *both) for code, both in zip(codes, said, strict=True)])


# ---- S15: the input


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint nobody may write to."""
    source = shutil.copytree(jobs()["one worker"].source, tmp_path / "input" / "source")
    paths = [*source.iterdir(), source, source.parent]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)
    yield source
    for path, mode in zip(reversed(paths), reversed(modes), strict=True):
        path.chmod(mode)


def test_s15_the_input_is_only_read(unwritable: Path, tmp_path: Path) -> None:
    before = snapshot(unwritable.parent)
    native, hf = tmp_path / "native", tmp_path / "hf"
    assert convert("hf-to-native", unwritable, native).returncode == EXIT_OK
    between = snapshot(native)
    assert convert("native-to-hf", native, hf).returncode == EXIT_OK
    assert convert("verify", native, unwritable, "--full").returncode == EXIT_OK
    assert convert("inspect", unwritable).returncode == EXIT_OK
    # And where it ends badly, and goes on.
    job = replace(jobs()["one worker"], source=unwritable, result=contents(native))
    faults = job.faults("fail", "replace", errno=errno.EIO)[::4]
    paths = places(tmp_path, len(faults))
    assert all(run.code == EXIT_FAILURE for run in job.run_faults(paths, faults))
    check_resumed(job, paths, [journaled(path) for path in paths])
    assert snapshot(unwritable.parent) == before
    assert snapshot(native) == between


def test_s15_a_source_on_a_read_only_disk(tmp_path: Path) -> None:
    job, disk = jobs()["one worker"], mount(tmp_path / "disk", 1000)
    mounting().command("cp", "-R", job.source, disk / "source")
    assert mounting().run(request("hf-to-native", disk / "source", disk / "native")).code == EXIT_OK
    remount(disk, "ro")
    made, back = tmp_path / "made", tmp_path / "back"
    assert mounting().run(request("hf-to-native", disk / "source", made)).code == EXIT_OK
    assert mounting().run(request("native-to-hf", disk / "native", back)).code == EXIT_OK
    assert weights(job).items() <= contents(made).items()
    refused = mounting().run(request("hf-to-native", disk / "source", disk / "out"))
    check_disk_error(refused, disk / "out", errno.EROFS)


OVERLAPS: dict[str, Callable[[Path], Path]] = {
    "the same": lambda source: source,
    "the same, by another way": lambda source: source / ".." / source.name,
    "the same, through a link": lambda source: source.parent / "link",
    "inside": lambda source: source / "native",
    "inside, through a link": lambda source: source.parent / "link" / "native",
    "around it": lambda source: source.parent,
}


@pytest.mark.parametrize("name", ["one worker", "back"])
@pytest.mark.parametrize("where", OVERLAPS)
def test_s15_input_and_output_lie_apart(where: str, name: str, tmp_path: Path) -> None:
    source = shutil.copytree(jobs()[name].source, tmp_path / "around" / "source")
    (source.parent / "link").symlink_to(source)
    before = snapshot(tmp_path)
    path = OVERLAPS[where](source)
    run = replace(jobs()[name], source=source).run(path)
    assert run.code == EXIT_USAGE
    assert run.err.startswith(f"error: {path}: the output must lie outside the source folder")
    assert snapshot(tmp_path) == before


# ---- S10: tensors of the wrong size


class Silence:
    """Progress that nobody looks at."""

    def begin(self, total_bytes: int, finished_bytes: int) -> None:
        pass

    def add(self, tensor: str, num_bytes: int) -> None:
        pass


def of_blocks(sizes: Mapping[str, Sequence[int]]) -> Conversion:
    """A conversion to files of a tensor each, planned with 24 bytes and made of these blocks."""

    def file(name: str, blocks: Sequence[int]) -> OutFile:
        def make() -> Iterator[np.ndarray]:
            for size in blocks:
                yield np.full((size, 1), len(name), np.uint8)

        tensor = OutTensor(name, np.dtype(np.uint8), (3, 8), 24, make)
        return OutFile(f"{name}.safetensors", (tensor,), {})

    return Conversion(
        files=tuple(file(name, blocks) for name, blocks in sizes.items()),
        small={},
        last=lambda records: {MANIFEST_NAME: json.dumps(records, sort_keys=True).encode()},
        identity={"sizes": "planned"},
        is_done=lambda _folder: False,
        check_unchanged=lambda: None,
        notes=[],
    )


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("wrong", [[], [23], [16, 7], [25], [16, 9], [24, 1]])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_s10_blocks_of_another_size_are_an_error(
    place: int, wrong: list[int], workers: int, tmp_path: Path
) -> None:
    names = ["first", "second"]
    names.insert(place, "wrong")
    sizes = {"first": [24], "second": [8, 16], "wrong": [12, 12]}
    right = of_blocks({name: sizes[name] for name in names})
    one_wrong = of_blocks({name: (sizes | {"wrong": wrong})[name] for name in names})
    write(right, tmp_path / "right", 1, Silence())
    path = places(tmp_path, 1)[0]
    with pytest.raises(ValueError, match=f"wrong has 24 bytes, its blocks {sum(wrong)}$"):
        write(one_wrong, path, workers, Silence())
    assert not path.exists()
    if workers == 1:
        assert list(journaled(path)) == [f"{name}.safetensors" for name in names[:place]]
    assert "wrong.safetensors" not in journaled(path)
    write(right, path, workers, Silence())
    assert contents(path) == contents(tmp_path / "right")
    assert os.listdir(path.parent) == [path.name]


def test_s10_writes_that_take_a_few_bytes_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"first": [24], "second": [8, 16]}
    write(of_blocks(sizes), tmp_path / "whole", 1, Silence())
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    write(of_blocks(sizes), tmp_path / "pieces", 1, Silence())
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
