"""A disk that is full or fails: row S13.

Whatever call fails, the converter says in one line what could not be written and why, and in a
second what to do; there is no output, the input is as it was, and once the disk works the same
command goes on. First with calls that fail by themselves, then on disks that are really too small.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from fault_jobs import (
    Job,
    check_disk_error,
    check_resumed,
    check_unfinished,
    jobs,
    mount,
    mounting,
    places,
    remount,
)
from faulty_converter import snapshot
from slow import slow_but

from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_OK

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
CALLS = [
    *(("one worker", call) for call in ("pwrite", "fsync", "open", "replace", "rename", "mkdir")),
    *(("two workers", call) for call in ("pwrite", "fsync")),
    *(("back", call) for call in ("fsync", "replace")),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_s13_any_call_that_fails(name: str, call: str, tmp_path: Path) -> None:
    job = jobs()[name]
    source = snapshot(job.source)
    faults = [f | {"errno": ERRORS[n % 3]} for n, f in enumerate(job.faults("fail", call))]
    paths = places(tmp_path, len(faults))
    runs = job.run_faults(paths, faults)
    for run, path, fault in zip(runs, paths, faults, strict=True):
        check_disk_error(run, path, fault["errno"])
    kept = [check_unfinished(job, path) for path in paths]
    # The last fsync is of the folder in which the output has just got its name.
    seen = [fault["step"] for fault, path in zip(faults, paths, strict=True) if path.exists()]
    assert seen == ([len(faults)] if call == "fsync" else [])
    assert snapshot(job.source) == source
    assert any(kept) == (call != "mkdir")
    check_resumed(job, paths, kept)


def test_s13_a_disk_without_locks(tmp_path: Path) -> None:
    fault = {"do": "fail", "of": "flock", "step": 1, "errno": errno.ENOLCK}
    run = jobs()["one worker"].run(tmp_path / "out", fault=fault)
    check_disk_error(run, tmp_path / "out", errno.ENOLCK)


def check_on_disk(job: Job, disk: Path) -> None:
    """The conversion to `disk` succeeds, and leaves the output alone there."""
    run = mounting().run(job.to(disk / "out"))
    assert run.code == EXIT_OK, run.err
    assert job.result is not None
    found = {f"out/{name}": digest for name, digest in job.result.items()}
    assert mounting().contents(disk) == {"out": "folder", **found}


@pytest.mark.parametrize("name", slow_but(["one worker"], ["one worker", "back"]))
def test_s13_disks_that_are_too_small(name: str, tmp_path: Path) -> None:
    job = jobs()[name]
    for pages in range(1, 1000):
        disk = mount(tmp_path / str(pages), pages)
        run = mounting().run(job.to(disk / "out", boundless=True))
        if run.code == EXIT_OK:
            break
        check_disk_error(run, disk / "out", errno.ENOSPC)
        assert "out" not in mounting().contents(disk)
        remount(disk, "size=16m")
        check_on_disk(job, disk)
    assert pages > 20
    check_on_disk(job, disk)


def test_s13_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    job, disk = jobs()["one worker"], mount(tmp_path / "disk", 12)

    def finished() -> dict[str, str]:
        found = mounting().contents(disk)
        return {name: digest for name, digest in found.items() if name.endswith(".safetensors")}

    def refused() -> bool:
        run = mounting().run(job.to(disk / "out"))
        return run.code == EXIT_DOES_NOT_FIT and f"error: {disk / 'out'}: " in run.err

    assert refused()
    assert not mounting().contents(disk)
    # Begun on the word of a disk that promised more.
    check_disk_error(
        mounting().run(job.to(disk / "out", boundless=True)), disk / "out", errno.ENOSPC
    )
    before = mounting().contents(disk)
    assert refused()
    # Not a file more, and what was finished is still there.
    assert mounting().contents(disk).keys() <= before.keys()
    assert finished()
    remount(disk, "size=16m")
    check_on_disk(job, disk)
