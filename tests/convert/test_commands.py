"""The converter's command line, as a user types it: flags, what is printed where, exit codes.

stdout carries the result and nothing else, a dry run writes nothing and foretells what is
written, and an output that is something else is never touched.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hf_configs import LINEAR_V2, V2, V2_5
from native_cases import SIDE_FILES, Said, checkpoint, loaded, native_arrays, tree

from convert import progress
from convert.__main__ import main, parser

ROOT = Path(__file__).resolve().parents[2]
BOTH_WAYS = [("hf-to-native", "hf"), ("native-to-hf", "native")]
COMMANDS = ("hf-to-native", "native-to-hf", "inspect", "verify")
SOURCE = checkpoint(V2_5, "commands", shards=2)
TENSORS = sum(len(arrays) for arrays in native_arrays(SOURCE).values())
NATIVE_BYTES = sum(a.nbytes for arrays in native_arrays(SOURCE).values() for a in arrays.values())

Run = Callable[..., Said]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a released checkpoint, hf, and its native form, native; not to be changed."""
    place = tmp_path_factory.mktemp("made")
    SOURCE.write(place / "hf")
    assert main(["hf-to-native", str(place / "hf"), str(place / "native"), "--quiet"]) == 0
    return place


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *args: Said(capsys, *args)


def typed(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m convert` in another folder."""
    return subprocess.run(
        [sys.executable, "-m", "convert", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder: when it was changed, and its size."""
    stats = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {str(path): (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


def size_of(folder: Path) -> int:
    return sum(map(len, tree(folder).values()))


# ---- as typed


def test_the_commands_as_a_user_types_them(tmp_path: Path) -> None:
    SOURCE.write(tmp_path / "hf")
    done = typed("hf-to-native", "hf", "native", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert re.fullmatch(
        rf"native: {TENSORS} tensors, \d+\.\d kB, \d+\.\d s, \d+\.\d\d GB/s, peak "
        r"memory \d+\.\d\d MB\n",
        done.stdout,
    )
    assert "not copied: modeling_bailing_moe.py" in done.stderr
    assert done.stderr.startswith("BailingMoeV2_5ForCausalLM, decay layer offset 0: ")
    done = typed("native-to-hf", "native", "back", "--quiet", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tensors"] == len(SOURCE.tensors)
    done = typed("verify", "back", cwd=tmp_path)
    assert (done.returncode, done.stdout.startswith("back: Hugging Face, ")) == (0, True)
    done = typed("inspect", "native", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout[:7]) == (0, "", "native\n")
    done = typed("hf-to-native", "absent", "other", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: absent: not a readable folder")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "native"]


def test_the_installed_command_is_the_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    target = project["scripts"]["bailing-convert"]
    entry = importlib.metadata.EntryPoint("bailing-convert", target, "console_scripts")
    assert entry.load() is main
    assert parser().prog == "bailing-convert"


# ---- help


def parsers() -> dict[str, argparse.ArgumentParser]:
    (found,) = [a.choices for a in parser()._actions if isinstance(a.choices, dict)]
    return found


def long_flags() -> dict[str, list[str]]:
    return {
        name: [word for action in p._actions for word in action.option_strings if word[:2] == "--"]
        for name, p in parsers().items()
    }


def test_there_are_at_most_twelve_flags() -> None:
    flags = {flag for words in long_flags().values() for flag in words}
    assert tuple(parsers()) == COMMANDS
    assert 9 <= len(flags) <= 12
    assert {"--dtype", "--decay-layer-offset", "--dry-run", "--json", "--quiet"} < flags


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text, remarks = capsys.readouterr()
    assert remarks == ""
    assert text.startswith(f"usage: bailing-convert {command} ")
    for flag in long_flags()[command]:
        assert flag in text
    for action in parsers()[command]._actions:
        assert action.help


def test_help_of_all_commands(tmp_path: Path) -> None:
    done = typed("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in COMMANDS)
    done = typed(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


# ---- a dry run


@pytest.mark.parametrize("workers", ["1", "5"])
@pytest.mark.parametrize(
    ("command", "source", "flags"),
    [
        ("hf-to-native", "hf", ()),
        ("hf-to-native", "hf", ("--dtype", "float32")),
        ("hf-to-native", "hf", ("--dtype", "bfloat16", "--decay-layer-offset", "1")),
        ("native-to-hf", "native", ()),
    ],
)
def test_a_dry_run_foretells_what_is_written(
    made: Path,
    tmp_path: Path,
    run: Run,
    command: str,
    source: str,
    flags: tuple[str, ...],
    workers: str,
) -> None:
    args = (command, made / source, tmp_path / "out", *flags, "--workers", workers, "--json")
    before = state(made), state(tmp_path)
    said = run(*args, "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert (state(made), state(tmp_path)) == before
    plan = json.loads(said.out)
    done = json.loads(run(*args).out)
    made_files = tree(tmp_path / "out")
    weights = {name for name in made_files if name.endswith(".safetensors")}
    assert plan["tensors"] == done["tensors"] == len(loaded(tmp_path / "out"))
    groups = plan["groups"]
    assert sum(g["files"] * g["tensors"] for g in groups) == plan["tensors"]
    assert sum(g["files"] for g in groups) == len(weights)
    assert {g[key] for g in groups for key in ("first_file", "last_file")} <= weights
    assert sum(g["bytes"] for g in groups) == plan["tensor_bytes"] == done["tensor_bytes"]
    assert plan["tensor_bytes"] == sum(a.nbytes for a in loaded(tmp_path / "out").values())
    dtypes = {str(array.dtype) for array in loaded(tmp_path / "out").values()}
    assert {dtype for g in groups for dtype in g["dtypes"]} == dtypes
    assert plan["small_files"] == {
        name: len(made_files[name]) for name in made_files.keys() - weights - {"manifest.json"}
    }
    assert plan["needed_bytes"] == size_of(tmp_path / "out")
    assert plan["fits"] is True
    assert plan["free_bytes"] > plan["needed_bytes"]
    assert plan["peak_memory_bytes"] >= 2**20
    assert plan["workers"] == int(workers)
    assert plan["estimated_seconds"] >= 0
    assert plan["gb_per_s"] > 0
    assert (plan["command"], plan["architecture"]) == (command, V2_5)
    assert plan["decay_layer_offset"] == (1 if "1" in flags else 0)


def test_a_dry_run_in_words(made: Path, tmp_path: Path, run: Run) -> None:
    said = run("hf-to-native", made / "hf", tmp_path / "out", "--dry-run")
    lines = said.out.splitlines()
    assert said.err == ""
    assert lines[0] == f"{V2_5}, decay layer offset 0: {TENSORS} tensors"
    assert re.search(r"^  embed\.safetensors +1 x +1 tensors +10\.9 kB  bfloat16$", said.out, re.M)
    assert re.search(r"^  kept, not used: \d+ tensors, MTP", said.out, re.M)
    assert f"  other files: config.json, {', '.join(sorted(SIDE_FILES))}" in lines
    assert "  not copied: modeling_bailing_moe.py" in lines
    assert [line.partition(":")[0] for line in lines[-3:]] == ["disk", "memory", "time"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_groups_layers_of_one_kind(tmp_path: Path, run: Run) -> None:
    source = checkpoint(V2, "alike", num_hidden_layers=5)
    source.write(tmp_path / "hf")
    args = ("hf-to-native", tmp_path / "hf", tmp_path / "out", "--dry-run")
    groups = json.loads(run(*args, "--json").out)["groups"]
    (alike,) = [group for group in groups if group["files"] > 1]
    wanted = native_arrays(source)
    layers = [wanted[f"layer-{layer:03d}.safetensors"] for layer in range(1, 5)]
    assert (alike["first_file"], alike["last_file"]) == (
        "layer-001.safetensors",
        "layer-004.safetensors",
    )
    assert (alike["files"], alike["tensors"]) == (4, len(layers[0]))
    assert alike["bytes"] == sum(a.nbytes for arrays in layers for a in arrays.values())
    assert alike["dtypes"] == ["bfloat16", "float32"]
    total = sum(a.nbytes for arrays in wanted.values() for a in arrays.values())
    assert sum(group["bytes"] for group in groups) == total
    assert f"layer-001 ... layer-004.safetensors      4 x {len(layers[0]):>5}" in run(*args).out


def test_a_dry_run_needs_a_place_to_be(made: Path, tmp_path: Path, run: Run) -> None:
    said = run("hf-to-native", made / "hf", tmp_path / "absent" / "out", "--dry-run")
    assert (said.code, said.out) == (2, "")
    assert f"{tmp_path / 'absent'}: no such folder" in said.err


# ---- results


def test_results_as_json(made: Path, tmp_path: Path, run: Run) -> None:
    said = run("hf-to-native", made / "hf", tmp_path / "out", "--json")
    done = json.loads(said.out)
    assert said.out.count("\n") == 1
    assert done["command"] == "hf-to-native"
    assert done["output"] == str(tmp_path / "out")
    assert done["tensors"] == TENSORS
    assert done["tensor_bytes"] == done["written_bytes"] == NATIVE_BYTES
    assert (done["resumed_bytes"], done["already_complete"]) == (0, False)
    assert done["seconds"] > 0
    assert done["peak_memory_bytes"] > 2**24
    assert done["notes"] == ["not copied: modeling_bailing_moe.py"]
    for folder, kind in ((made / "hf", "Hugging Face"), (made / "native", "native")):
        said = run("inspect", folder, "--json")
        assert (said.code, said.err) == (0, "")
        assert (report := json.loads(said.out))["folder"] == str(folder)
        assert kind in report.values()
        said = run("verify", folder, "--json")
        assert (said.code, json.loads(said.out)["sound"]) == (0, True)


@pytest.mark.parametrize(("command", "source"), BOTH_WAYS)
def test_run_again_it_says_that_all_is_done(
    made: Path, tmp_path: Path, run: Run, command: str, source: str
) -> None:
    args = (command, made / source, tmp_path / "out", "--workers", "1")
    assert run(*args).code == 0
    before = state(tmp_path)
    said = run(*args)
    assert said.code == 0
    assert said.out == (
        f"{tmp_path / 'out'}: already complete, made of the same files; nothing was written\n"
    )
    done = json.loads(run(*args, "--json").out)
    assert (done["already_complete"], done["written_bytes"]) == (True, 0)
    del before[str(tmp_path)]  # a lock comes and goes beside the output
    after = state(tmp_path)
    del after[str(tmp_path)]
    assert after == before


def test_quiet_is_quiet(made: Path, tmp_path: Path, run: Run) -> None:
    """Also about warnings, notes and resumed work; the result is on stdout all the same."""
    source = checkpoint(LINEAR_V2, "quiet", rope_scaling={"type": "yarn", "factor": 2.0})
    source.config["max_position_embeddings"] = 100
    source = source.with_tensors({"lm_head.weight": np.zeros((97, 56), np.float32)})
    source.write(tmp_path / "hf")
    for flags, quiet in (((), False), (("--quiet",), True)):
        out = tmp_path / f"native{quiet}"
        for args in (
            ("hf-to-native", tmp_path / "hf", out),
            ("native-to-hf", out, tmp_path / f"back{quiet}"),
            ("verify", out),
        ):
            said = run(*args, *flags)
            assert (said.code, said.out.count("\n")) == (0, 1)
            assert (said.err == "") == (quiet or args[0] == "verify")
            if args[0] == "hf-to-native" and not quiet:
                assert "note: lm_head.weight holds nothing but zeros" in said.err


def test_warnings_go_to_stderr_unless_quiet(tmp_path: Path, run: Run) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    source = checkpoint(V2, "warned", rope_scaling=scaling, max_position_embeddings=999)
    source.write(tmp_path / "hf")
    said = run("hf-to-native", tmp_path / "hf", tmp_path / "native")
    assert said.code == 0
    assert re.search(r"^warning: .*max_position_embeddings", said.err, re.M)
    said = run("hf-to-native", tmp_path / "hf", tmp_path / "again", "--quiet")
    assert (said.code, said.err) == (0, "")


def test_notes_are_capped_on_screen(tmp_path: Path, run: Run) -> None:
    source = checkpoint(V2, "zeros")
    names = sorted(n for n in source.tensors if ".experts." in n and n.endswith("proj.weight"))[:14]
    zeros = {name: np.zeros_like(source.tensors[name]) for name in names}
    zeros["model.layers.1.mlp.gate.expert_bias"] = np.zeros(4, np.float32)
    source.with_tensors(zeros).write(tmp_path / "hf")
    said = run("hf-to-native", tmp_path / "hf", tmp_path / "native")
    notes = [line for line in said.problems if line.startswith("note: ")]
    assert notes[:10] == [f"note: {name} holds nothing but zeros" for name in names[:10]]
    assert notes[10:] == ["note: and 5 more (--json lists all)"]
    said = run("hf-to-native", tmp_path / "hf", tmp_path / "again", "--json")
    found = json.loads(said.out)["notes"]
    assert found[:14] == [f"{name} holds nothing but zeros" for name in names]
    assert len(found) == 15


# ---- progress

LINE = re.compile(
    r"( {0,2}\d{1,3}) %  (\d+\.\d\d) of \d+\.\d\d GB  \d+\.\d\d GB/s  \d+ s left  "
    r"memory \d+\.\d\d GB  (\S+)"
)


@pytest.mark.parametrize("words", [*((*way, "OUT") for way in BOTH_WAYS), ("verify", "native")])
def test_progress_names_tensors_rates_and_memory(
    made: Path, tmp_path: Path, run: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    args = [tmp_path / "out" if word == "OUT" else made / word for word in words[1:]]
    said = run(words[0], *args, "--workers", "1")
    found = [match for line in said.err.splitlines() if (match := LINE.fullmatch(line))]
    # What is read to be verified, and what is written.
    read = set() if words[0] == "hf-to-native" else loaded(made / "native").keys()
    written = set() if words[0] == "verify" else loaded(tmp_path / "out").keys()
    assert {match[3] for match in found} == read | written
    shares = [int(match[1]) for match in found]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert shares[0] < 20
    assert said.out.count("\n") == 1
    assert not LINE.search(said.out)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_rewritten_and_cleared(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_TERMINAL_SECONDS", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["hf-to-native", str(made / "hf"), str(tmp_path / "out")]) == 0
    before, *shown, after = terminal.getvalue().split("\r")
    assert before.endswith("\n")
    assert after == "note: not copied: modeling_bailing_moe.py\n"
    assert len(shown) > TENSORS
    assert all(LINE.fullmatch(line.rstrip()) for line in shown[:-1])
    assert max(map(len, shown)) < 100
    # Each line covers the one before it, and blanks the last.
    assert all(len(line) >= len(last.rstrip()) for last, line in pairwise(shown))
    assert shown[-1].strip() == ""


def test_what_was_finished_before_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    line = progress.ProgressLine(quiet=False)
    line.begin(10**10, 25 * 10**8)
    assert capsys.readouterr().err == "going on: 2.50 of 10.00 GB were finished before\n"
    progress.ProgressLine(quiet=True).begin(10**10, 25 * 10**8)
    assert capsys.readouterr() == ("", "")
