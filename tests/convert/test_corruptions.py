"""Bad checkpoints, over a thousand of them: refused by name, and without a trace.

Whatever is wrong with a source, `hf-to-native` ends with an error that names the file and, where
there is one, the tensor; it leaves no output and nothing beside it, and the source as it was.
What only looks unusual is converted to the very same tensors.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corrupt_folders
import corrupt_models
import corrupt_shards
import harmless_changes
import numpy as np
import pytest
from corruptions import CONFIG, CONFIGS, Case, Kind, Victim, tensors_of, write_sound
from refusals import Run, refusal_problems, run, snapshot

from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, UserError
from convert import commands, safetensors_file, to_native
from convert.output_folder import OutputFolder
from convert.safetensors_file import SafetensorsFile
from convert.source import open_source

KINDS = [*corrupt_shards.KINDS, *corrupt_folders.KINDS, *corrupt_models.KINDS]
# Of a kind's cases at least this share come out different; the rest drew what another drew.
DIFFERENT = 0.9


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of a tiny conversion's time, and no subject of these tests."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


class Workshop:
    """Sound checkpoints and a place to damage copies of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source, self.output = root / "in" / "model", root / "out" / "native"
        self._sound: dict[str, dict[str, tuple[bytes, int]]] = {}
        for checkpoint in CONFIGS:
            write_sound(root / checkpoint, checkpoint)
            self._sound[checkpoint] = {
                path.name: (path.read_bytes(), path.stat().st_mtime_ns)
                for path in (root / checkpoint).iterdir()
            }

    def copy(self, checkpoint: str) -> Path:
        """A fresh copy, alone in its folder; the output's folder is empty."""
        for folder in (self.source.parent, self.output.parent):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self.source.mkdir()
        for name, (content, when) in self._sound[checkpoint].items():
            (self.source / name).write_bytes(content)
            os.utime(self.source / name, ns=(when, when))
        return self.source

    def refuse(self, case: Case) -> tuple[list[str], str]:
        """What is wrong with how a case is refused, and a digest of the damaged folder."""
        said = case.damage(self.copy(case.checkpoint))
        before = snapshot(self.source.parent)
        done = run("hf-to-native", self.source, self.output, "--quiet")
        problems = refusal_problems(done, EXIT_USAGE, said)
        problems += self.traces()
        if snapshot(self.source.parent) != before:
            problems.append("the source was written to")
        # Without mtimes: those differ in copies of the same.
        what = repr([(name, *entry[:2], entry[3]) for name, entry in before.items()])
        shown = [f"{case.name}: {problem}\n{done.stderr[:1000]}" for problem in problems]
        return shown, hashlib.sha256(what.encode()).hexdigest()

    def convert(self) -> tuple[Run, dict[str, Any]]:
        """Convert the source: what was said, and the tensors made."""
        done = run("hf-to-native", self.source, self.output, "--quiet")
        return done, tensors_of(self.output) if done.code == EXIT_OK else {}

    def traces(self) -> list[str]:
        """What was left of an output."""
        return [f"left {path.name}" for path in self.output.parent.iterdir()]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("corruptions"))


def test_there_are_a_thousand_corruptions_of_every_row() -> None:
    names = [case.name for kind in KINDS for case in kind.cases()]
    assert len(names) == len(set(names))
    assert DIFFERENT * len(names) >= 1000
    rows = Counter(name[:3] for name in names)
    assert set(rows) == {f"s{row:02}" for row in range(1, 11)}
    assert min(rows.values()) >= 50
    assert min(len({case.checkpoint for case in kind.cases()}) for kind in KINDS) == len(CONFIGS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_corrupt_checkpoints_are_refused(workshop: Workshop, kind: Kind) -> None:
    problems, different, cases = [], set[str](), kind.cases()
    for case in cases:
        found, digest = workshop.refuse(case)
        problems += found
        different.add(digest)
    assert problems == []
    assert len(different) >= DIFFERENT * len(cases)


# ---------------------------------------------------------------- what means nothing is accepted


@pytest.fixture(scope="module")
def sound_tensors(workshop: Workshop) -> dict[str, dict[str, Any]]:
    """What each sound checkpoint is converted to."""
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in CONFIGS:
        workshop.copy(checkpoint)
        done, found[checkpoint] = workshop.convert()
        assert done.code == EXIT_OK, done
    return found


def test_there_are_many_harmless_changes() -> None:
    assert sum(len(kind.cases()) for kind in harmless_changes.KINDS) >= 60


@pytest.mark.parametrize("kind", harmless_changes.KINDS, ids=lambda kind: kind.name)
def test_harmless_changes_change_no_tensor(
    workshop: Workshop, sound_tensors: dict[str, dict[str, Any]], kind: Kind
) -> None:
    for case in kind.cases():
        pristine = snapshot(workshop.copy(case.checkpoint).parent)
        case.damage(workshop.source)
        before = snapshot(workshop.source.parent)
        assert before != pristine, case.name
        done, tensors = workshop.convert()
        assert (done.code, done.stderr, done.raised) == (EXIT_OK, "", ""), case.name
        assert tensors == sound_tensors[case.checkpoint], case.name
        assert workshop.traces() == ["left native"], case.name
        assert snapshot(workshop.source.parent) == before, case.name


# ---------------------------------------------------------------- S06: while it is being read


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def _rewrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _replace(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    new.rename(path)


def _replace_by_link(path: Path) -> None:
    _replace(path)
    path.rename(path.parent.parent / path.name)
    path.symlink_to(f"../{path.name}")


CHANGES: dict[str, Callable[[Path], None]] = {
    "grows": _append,
    "shrinks": lambda path: os.truncate(path, path.stat().st_size - 1),
    "is emptied": lambda path: os.truncate(path, 0),
    "is rewritten in place": _rewrite,
    "is replaced by one of its size": _replace,
    "is replaced by a link": _replace_by_link,
}
MOMENTS = (0.0, 0.5, 1.0)  # after the first tensor is read, halfway, after the last


def during(change: Callable[[], object], reads: int, patch: pytest.MonkeyPatch) -> None:
    """Make a change once that many different tensors have been read."""
    real, lock, seen = SafetensorsFile.read_into, threading.Lock(), set[str]()

    def read_into(self: SafetensorsFile, name: str, out: np.ndarray) -> None:
        real(self, name, out)
        with lock:
            before = len(seen)
            seen.add(name)
            if before < reads == len(seen):
                change()

    patch.setattr(SafetensorsFile, "read_into", read_into)


def finished_files(patch: pytest.MonkeyPatch) -> list[str]:
    """The weight files that are finished from now on."""
    finished: list[str] = []
    real = OutputFolder.finish

    def finish(self: OutputFolder, name: str, record: dict[str, Any] | None) -> None:
        real(self, name, record)
        finished.extend([name] * name.endswith(".safetensors"))

    patch.setattr(OutputFolder, "finish", finish)
    return finished


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_s06_a_shard_that_changes_during_the_conversion_is_noticed(
    workshop: Workshop, change: str, moment: float
) -> None:
    for number, checkpoint in enumerate(CONFIGS):
        shard = sorted(workshop.copy(checkpoint).glob("*.safetensors"))[number]
        reads = max(1, round(moment * len(tensors_of(workshop.source))))
        with pytest.MonkeyPatch.context() as patch:
            during(lambda shard=shard: CHANGES[change](shard), reads, patch)
            done, _ = workshop.convert()
        said = (str(shard), "the file changed while being read")
        assert refusal_problems(done, EXIT_FAILURE, said) + workshop.traces() == [], done


def test_s06_a_config_that_changes_before_it_is_copied_is_noticed(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workshop.copy("linear") / CONFIG
    real = commands.plan_native

    def plan(*args: Any) -> Any:
        config.write_text(config.read_text().replace("600000", "700000"))
        return real(*args)

    monkeypatch.setattr(commands, "plan_native", plan)
    done, _ = workshop.convert()
    said = (str(config), "the file changed while being read")
    assert refusal_problems(done, EXIT_FAILURE, said) + workshop.traces() == [], done


def test_s12_a_conversion_goes_on_when_a_lost_shard_is_back(
    workshop: Workshop, sound_tensors: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is gone for a while is no bad input: what is finished waits for it."""
    shard = sorted(workshop.copy("v2").glob("*.safetensors"))[0]
    aside = workshop.source.parent / shard.name
    with pytest.MonkeyPatch.context() as patch:
        during(lambda: shard.rename(aside), len(tensors_of(workshop.source)), patch)
        done, _ = workshop.convert()
    assert refusal_problems(done, EXIT_FAILURE, [str(shard), "cannot be read"]) == [], done
    assert workshop.traces() == ["left .native.partial"]
    aside.rename(shard)
    finished = finished_files(monkeypatch)
    done, tensors = workshop.convert()
    assert (done.code, tensors) == (EXIT_OK, sound_tensors["v2"])
    assert workshop.traces() == ["left native"]
    assert finished == []


# ---------------------------------------------------------------- S09, S11: when others are written


@pytest.mark.parametrize("checkpoint", CONFIGS)
@pytest.mark.parametrize("value", corrupt_models.BITS)
def test_s09_a_bad_value_in_the_last_file_takes_the_others_with_it(
    workshop: Workshop, value: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = Victim(workshop.copy(checkpoint), checkpoint, 0, f"last {value} {checkpoint}")
    said = corrupt_models.plant(victim, corrupt_models.BITS[value], corrupt_models.in_the_last_file)
    finished = finished_files(monkeypatch)
    done = run("hf-to-native", workshop.source, workshop.output, "--quiet", "--workers", "1")
    assert refusal_problems(done, EXIT_USAGE, said) + workshop.traces() == [], done
    assert len(finished) > 3


# ---------------------------------------------------------------- the checks can fail


def _uncaught(_folder: Path) -> None:
    raise KeyError("planted")


def _meddling(folder: Path) -> Any:
    (folder / "notes").write_text("been here")
    return open_source(folder)


PLANTED: dict[str, tuple[str, Any, str, object, str]] = {
    "no value is looked at": (
        "s09_value_of_no_weight", to_native, "check_values", lambda *_: False, "exit code 0",
    ),
    "an output stays": (
        "s09_value_of_no_weight", OutputFolder, "discard", lambda _self: None, "left .native.",
    ),
    "an exception nobody caught": (
        "s01_header_length", commands, "open_source", _uncaught, "raised KeyError",
    ),
    "the source is written to": (
        "s01_header_length", commands, "open_source", _meddling, "the source was written to",
    ),
    "no file is named": (
        "s01_header_length", safetensors_file, "malformed",
        lambda _path, problem: UserError(problem, "", EXIT_USAGE), "does not say",
    ),
    "another exit code": (
        "s01_header_length", safetensors_file, "malformed",
        lambda path, problem: UserError(f"{path}: {problem}"), "exit code 1, not 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(
    workshop: Workshop, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, where, attribute, replacement, complaint = PLANTED[bug]
    case = next(kind for kind in KINDS if kind.name == name).cases()[0]
    assert workshop.refuse(case)[0] == []
    monkeypatch.setattr(where, attribute, replacement)
    assert any(complaint in problem for problem in workshop.refuse(case)[0])
