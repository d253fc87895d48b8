"""What the converter's commands refuse: with exit code 2, a reason on stderr, and nothing written.

Bad flags and sources, outputs that are something else, and native folders that do not hold what
the way back needs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_configs import V2_5
from native_cases import (
    SIDE_FILES,
    Said,
    alter,
    checkpoint,
    drop,
    flip,
    put,
    tree,
    with_manifest,
)

from bailing_jax.errors import EXIT_USAGE
from convert.__main__ import main

BOTH_WAYS = [("hf-to-native", "hf"), ("native-to-hf", "native")]
SOURCE = checkpoint(V2_5, "refused", shards=2)
NORM, MTP = "model.norm.weight", "model.layers.3.eh_proj.weight"

Run = Callable[..., Said]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a released checkpoint, hf, and its native form, native; not to be changed."""
    place = tmp_path_factory.mktemp("made")
    SOURCE.write(place / "hf")
    assert main(["hf-to-native", str(place / "hf"), str(place / "native"), "--quiet"]) == 0
    return place


@pytest.fixture
def native(made: Path, tmp_path: Path) -> Path:
    """A native folder of the test's own, to be damaged."""
    return shutil.copytree(made / "native", tmp_path / "native")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *args: Said(capsys, *args)


# ---- flags and sources


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dtype", "float16"), "--dtype float16: must be keep, bfloat16, float32"),
        (("--dtype", ""), "--dtype : must be keep"),
        (("--format", "onnx"), "--format onnx: must be native, orbax"),
        (("--decay-layer-offset", "2"), "--decay-layer-offset 2: must be 0, 1"),
        (("--decay-layer-offset", "-1"), "--decay-layer-offset -1: must be 0, 1"),
        (("--workers", "0"), "--workers 0: must be 1 to 64"),
        (("--workers", "-3"), "--workers -3: must be 1 to 64"),
        (("--workers", "65"), "--workers 65: must be 1 to 64"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_bad_values_are_refused_with_those_allowed(
    made: Path,
    tmp_path: Path,
    run: Run,
    flags: tuple[str, ...],
    said: str,
    dry: tuple[str, ...],
) -> None:
    found = run("hf-to-native", made / "hf", tmp_path / "out", *flags, *dry)
    assert (found.code, found.out) == (2, "")
    assert found.problems[0].startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("hf-to-native", "a"),
        ("hf-to-native", "a", "b", "c"),
        ("hf-to-native", "a", "b", "--decay-layer-offset", "x"),
        ("hf-to-native", "a", "b", "--workers", "1.5"),
        ("native-to-hf", "a", "b", "--dtype", "float32"),
        ("inspect", "a", "--quiet"),
        ("convert", "a", "b"),
    ],
)
def test_what_cannot_be_parsed_is_bad_usage(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words])
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("command", "source", "said"),
    [
        ("hf-to-native", "absent", "not a readable folder"),
        ("hf-to-native", "hf/config.json", "not a readable folder"),
        ("hf-to-native", "native", "is a native folder already"),
        ("native-to-hf", "absent", "has no manifest.json"),
        ("native-to-hf", "hf", "has no manifest.json"),
        ("inspect", "absent", "not a readable folder"),
        ("verify", "absent", "not a readable folder"),
    ],
)
def test_the_source_must_be_what_the_command_wants(
    made: Path, tmp_path: Path, run: Run, command: str, source: str, said: str
) -> None:
    output = (tmp_path / "out",) if command.endswith(("hf", "native")) else ()
    found = run(command, made / source, *output)
    assert (found.code, found.out) == (2, "")
    assert found.problems[0].startswith(f"{made / source}: {said}")
    assert list(tmp_path.iterdir()) == []


# ---- outputs


def _file(path: Path, _source: Path) -> None:
    path.write_text("mine")


def _full(path: Path, _source: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def _link(path: Path, _source: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def _broken_link(path: Path, _source: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def _source_itself(path: Path, source: Path) -> None:
    path.symlink_to(source)


@pytest.mark.parametrize("make", [_file, _full, _link, _broken_link, _source_itself])
@pytest.mark.parametrize(("command", "source"), BOTH_WAYS)
def test_an_output_that_is_something_else_is_left_alone(
    made: Path,
    tmp_path: Path,
    run: Run,
    command: str,
    source: str,
    make: Callable[[Path, Path], None],
) -> None:
    output = tmp_path / "out"
    make(output, made / source)
    before = tree(tmp_path), tree(made), sorted(os.listdir(tmp_path))
    found = run(command, made / source, output)
    assert (found.code, found.out) == (2, "")
    assert found.problems[-2].startswith(f"{output}: ")
    assert (tree(tmp_path), tree(made), sorted(os.listdir(tmp_path))) == before


@pytest.mark.parametrize("place", ["inside", "above"])
def test_the_output_lies_outside_the_source(
    made: Path, tmp_path: Path, run: Run, place: str
) -> None:
    SOURCE.write(tmp_path / "a" / "hf")
    output = tmp_path / "a" / "hf" / "out" if place == "inside" else tmp_path / "a"
    before = tree(tmp_path)
    for dry in ((), ("--dry-run",)):
        found = run("hf-to-native", tmp_path / "a" / "hf", output, *dry)
        assert (found.code, found.out) == (2, "")
        assert "must lie outside the source folder" in found.err
    assert tree(tmp_path) == before


def test_an_output_without_a_parent_is_refused(made: Path, tmp_path: Path, run: Run) -> None:
    found = run("hf-to-native", made / "hf", tmp_path / "absent" / "out")
    assert (found.code, found.out) == (2, "")
    assert f"mkdir -p {tmp_path / 'absent'}" in found.err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_as_good_as_none(made: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()
    assert run("hf-to-native", made / "hf", tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == tree(made / "native")


def test_other_flags_are_another_result(made: Path, tmp_path: Path, run: Run) -> None:
    args: tuple[Any, ...] = ("hf-to-native", made / "hf", tmp_path / "out")
    assert run(*args).code == 0
    before = tree(tmp_path)
    for flags in (("--dtype", "float32"), ("--decay-layer-offset", "1")):
        found = run(*args, *flags)
        assert found.code == 2
        assert "already exists and is not the result of this command" in found.err
    assert tree(tmp_path) == before


# ---- the way back needs the manifest's sources and side files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("tensors", NORM, "sources", NORM), f"{NORM}.sources lacks {NORM}"),
        (put("tensors", NORM, "sources", "more", value="float16"), "has the stranger 'more'"),
    ],
)
def test_sources_must_be_those_of_the_model(
    native: Path,
    change: Callable[[Any], object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_manifest(native, change)
    assert main(["native-to-hf", str(native), str(native.parent / "hf")]) == EXIT_USAGE
    assert said in capsys.readouterr().err
    assert not (native.parent / "hf").exists()


@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.experts.up_proj.weight", MTP])
def test_r111_a_damaged_native_folder_does_not_come_back(
    native: Path, name: str, run: Run
) -> None:
    """Or the fault would be in a checkpoint that has no hashes, where nobody finds it."""
    alter(native, name, flip, hashed=False)
    found = run("native-to-hf", native, native.parent / "hf", "--quiet")
    assert (found.code, found.out) == (EXIT_USAGE, "")
    assert f"tensor '{name}' differs from its sha256" in found.err
    assert sorted(os.listdir(native.parent)) == ["native"]


@pytest.mark.parametrize("fault", ["changed", "missing", "link"])
@pytest.mark.parametrize("name", sorted(SIDE_FILES))
def test_side_files_return_as_they_were_or_not_at_all(
    native: Path, name: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "changed":
        (native / name).write_bytes(SIDE_FILES[name] + b" ")
    else:
        os.rename(native / name, native.parent / name)
    if fault == "link":
        (native / name).symlink_to(native.parent / name)
    assert main(["native-to-hf", str(native), str(native.parent / "hf")]) == EXIT_USAGE
    assert f"{native / name}: " in capsys.readouterr().err
    assert not (native.parent / "hf").exists()


@pytest.mark.parametrize("name", ["LICENSE", "config.json"])
def test_pipes_and_folders_are_not_read(native: Path, name: str) -> None:
    (native / name).unlink()
    for make in (os.mkfifo, os.mkdir):
        make(native / name)
        assert main(["native-to-hf", str(native), str(native.parent / "hf")]) == EXIT_USAGE
        shutil.move(native / name, native.parent / make.__name__)


@pytest.mark.parametrize(("command", "source"), BOTH_WAYS)
@pytest.mark.parametrize("damage", ["weights gone", "side file gone", "side file edited"])
def test_a_result_that_lost_something_is_not_called_complete(
    made: Path, tmp_path: Path, run: Run, command: str, source: str, damage: str
) -> None:
    output = tmp_path / "out"
    assert run(command, made / source, output).code == 0
    side = output / "LICENSE"
    if damage == "weights gone":
        next(output.glob("*.safetensors")).unlink()
    elif damage == "side file gone":
        side.unlink()
    else:
        side.write_bytes(side.read_bytes() + b"\n")
    found = run(command, made / source, output)
    assert "already exists and is not the result of this command" in found.err
    assert (found.code, found.out) == (EXIT_USAGE, "")


def test_a_source_with_another_side_file_is_another_conversion(
    made: Path, tmp_path: Path, run: Run
) -> None:
    source = shutil.copytree(made / "hf", tmp_path / "hf")
    assert run("hf-to-native", source, tmp_path / "out").code == 0
    side = source / "LICENSE"
    side.write_bytes(side.read_bytes() + b"\n")
    found = run("hf-to-native", source, tmp_path / "out")
    assert (found.code, found.out) == (EXIT_USAGE, "")
    assert "already exists" in found.err
