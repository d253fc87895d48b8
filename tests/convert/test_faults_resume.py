"""What an unfinished conversion goes on from, and what it refuses: row S12.

It goes on with the files that its journal lists and that are still there, of the same conversion
of the same source; all else is refused with what is different, and left as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_jobs import Job, check_resumed, check_unfinished, jobs, places
from faulty_converter import Identity, Run, partial_of, snapshot

from bailing_jax.errors import EXIT_USAGE
from convert.native import MANIFEST_NAME

FINISHED = 3


def unfinished(job: Job, path: Path) -> dict[str, Identity]:
    """Kill a conversion when FINISHED files are; returns these."""
    journals = [
        n
        for n, (call, name, _) in enumerate(job.steps, start=1)
        if call == "replace" and name.endswith("journal.json.tmp")
    ]
    fault = {"do": "kill", "step": journals[FINISHED] + 4}  # the first journal lists no file
    assert job.run(path, fault=fault).code == -signal.SIGKILL
    kept = check_unfinished(job, path)
    assert len(kept) == FINISHED
    return kept


def check_refused(act: Callable[[], Run], path: Path, said: Sequence[str]) -> None:
    """It refuses to go on, says all of that, and leaves what is there as it is."""
    before = snapshot(path.parent)
    run = act()
    assert run.code == EXIT_USAGE, run.err
    error, hint = run.err.splitlines()[-2:]
    assert error.startswith(f"error: {partial_of(path)}: ")
    for text in said:
        assert text in error
    assert "delete that folder" in hint
    assert snapshot(path.parent) == before


# ---- another conversion


def touch_shard(source: Path) -> list[str]:
    shard = sorted(source.glob("*.safetensors"))[1]
    old = shard.stat().st_mtime_ns
    os.utime(shard, ns=(0, old + 1))
    return [f"source.files.{shard.name}.modified_ns is {old} there and {old + 1} here"]


def lengthen_shard(source: Path) -> list[str]:
    shard = sorted(source.glob("*.safetensors"))[1]
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padded = (length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8
    shard.write_bytes(padded + raw[8 + length :])
    return [f"source.files.{shard.name}.bytes is {len(raw)} there and {len(raw) + 8} here"]


def change_config(source: Path) -> list[str]:
    path = source / "config.json"
    path.write_text(path.read_text().replace("2.5", "1.5"))
    return ["config.routed_scaling_factor is 2.5 there and 1.5 here"]


def change_readme(source: Path) -> list[str]:
    (source / "README.md").write_text("Another.\n")
    return ["files.README.md."]


def add_template(source: Path) -> list[str]:
    (source / "chat_template.jinja").write_text("{{ messages }}")
    return ["files.chat_template.jinja is only in this one"]


@pytest.mark.parametrize(
    "change", [touch_shard, lengthen_shard, change_config, change_readme, add_template]
)
def test_s12_a_changed_source_is_not_gone_on_with(
    change: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    tiny, path = jobs()["one worker"], places(tmp_path, 1)[0]
    source = shutil.copytree(tiny.source, tmp_path / "source")
    job = replace(tiny, source=source)
    unfinished(job, path)
    said = change(source)
    check_refused(lambda: job.run(path), path, said)


OPTIONS = {
    "--dtype=bfloat16": "dtype is 'keep' there and 'bfloat16' here",
    "--decay-layer-offset=1": "config.decay_layer_offset is only in this one",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_s12_a_conversion_with_other_options_is_not_gone_on_with(
    option: str, tmp_path: Path
) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    kept = unfinished(job, path)
    check_refused(lambda: job.run(path, option), path, [OPTIONS[option]])
    check_resumed(job, [path], [kept])


def test_s12_another_source_or_command_is_not_gone_on_with(tmp_path: Path) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    kept = unfinished(job, path)
    other = shutil.copytree(job.source, tmp_path / "other")
    said = f"source.folder is '{job.source}' there and '{other}' here"
    check_refused(lambda: replace(job, source=other).run(path), path, [said])
    check_refused(lambda: jobs()["back"].run(path), path, ["architecture is only in that one"])
    check_resumed(job, [path], [kept])


def test_s12_the_way_back_of_another_folder_is_not_gone_on_with(tmp_path: Path) -> None:
    job, path = jobs()["back"], places(tmp_path, 1)[0]
    kept = unfinished(job, path)
    float32 = replace(jobs()["one worker"], made=tmp_path / "float32")
    assert float32.run(float32.made, "--dtype=float32").code == 0
    other = replace(job, source=float32.made)
    check_refused(lambda: other.run(path), path, ["manifest_sha256 is "])
    check_resumed(job, [path], [kept])


def test_s12_an_unfinished_conversion_outlives_a_wrong_output(tmp_path: Path) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    kept = unfinished(job, path)
    path.mkdir()
    for name, content in (("note.txt", "mine"), (MANIFEST_NAME, "{")):
        (path / name).write_text(content)
        before = snapshot(path.parent)
        run = job.run(path)
        assert run.code == EXIT_USAGE
        assert str(path) in run.err
        assert snapshot(path.parent) == before
        (path / name).unlink()
    check_resumed(job, [path], [kept])  # an empty folder is no obstacle


# ---- damage


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def lengthen(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 1)


@pytest.mark.parametrize("damage", [shorten, lengthen, Path.unlink])
def test_s12_a_damaged_finished_file_is_made_again(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    kept = unfinished(job, path)
    name = sorted(kept)[1]
    damage(partial_of(path) / "files" / name)
    del kept[name]
    check_resumed(job, [path], [kept])


def test_s12_strange_files_among_the_finished_are_removed(tmp_path: Path) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    kept = unfinished(job, path)
    files = partial_of(path) / "files"
    for name in ("stranger.bin", "layer-001.safetensors.tmp", "README.md"):
        (files / name).write_bytes(b"?")
    (files / "folder" / "inner").mkdir(parents=True)
    (files / "folder" / "stranger.bin").write_bytes(b"?")
    check_resumed(job, [path], [kept])


def changed(journal: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(journal), **fields}).encode()


def change_a_hash(journal: bytes) -> bytes:
    content = json.loads(journal)
    hashes = content["files"]["embed.safetensors"]["tensors"]
    name = min(hashes)
    hashes[name] = hashes[name][::-1]
    return json.dumps(content).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _journal: b"",
    "half": lambda journal: journal[: len(journal) // 2],
    "zeros": lambda journal: bytes(len(journal)),
    "a list": lambda _journal: b"[]",
    "an object": lambda _journal: b"{}",
    "no identity": lambda journal: changed(journal, identity=None),
    "no files": lambda journal: changed(journal, files=None),
    "files are a list": lambda journal: changed(journal, files=["embed.safetensors"]),
    "a record is a number": lambda journal: changed(journal, files={"embed.safetensors": 3}),
    "a record is empty": lambda journal: changed(journal, files={"embed.safetensors": {}}),
    "a hash is another": change_a_hash,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_s12_a_damaged_journal_is_not_gone_on_with(damage: str, tmp_path: Path) -> None:
    job, path = jobs()["one worker"], places(tmp_path, 1)[0]
    unfinished(job, path)
    journal = partial_of(path) / "journal.json"
    journal.write_bytes(DAMAGES[damage](journal.read_bytes()))
    check_refused(lambda: job.run(path), path, ["its journal is damaged"])
    shutil.rmtree(partial_of(path))  # as it says
    check_resumed(job, [path], [{}])
