"""`verify`: sound folders pass, and every planted fault is found and named.

A fault whose hash in the manifest was made to fit is for --full, which puts the source's tensors
together again; quick checks find whatever differs from its hash, and values no weight has.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_configs import LINEAR_V2, V2, V2_5
from hypothesis import given, settings
from native_cases import (
    BFLOAT16,
    EXAMPLES,
    EXTRA,
    SIDE_FILES,
    Checkpoint,
    Said,
    alter,
    checkpoint,
    converted,
    draw_checkpoint,
    flip,
    is_extra,
    restored,
    tree,
)

from convert import native as native_format
from convert.__main__ import main
from convert.native import open_native

pytestmark = pytest.mark.filterwarnings("ignore::bailing_jax.config.ConfigWarning")

# Layer 0 is dense, layer 1 sparse; layer 2 has latent attention; the MTP layer is an extra.
SOURCE = checkpoint(V2_5, "verify", shards=2)
KV_B = "model.layers.2.attention.kv_b_proj"
EXPERTS = "model.layers.1.mlp.experts"
MTP = "model.layers.3.eh_proj.weight"
DENSE = "model.layers.2.attention.dense.weight"

Verify = Callable[..., Said]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(SOURCE, tmp_path_factory.mktemp("verify"))[1]


@pytest.fixture
def native(sound: Path, tmp_path: Path) -> Path:
    """A native folder of the test's own; its source is where it was recorded."""
    return shutil.copytree(sound, tmp_path / "native")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Verify:
    return lambda *args: Said(capsys, "verify", *args, "--quiet")


# ---- what is sound


@settings(EXAMPLES, max_examples=8)
@given(source=draw_checkpoint())
def test_sound_folders_pass(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> None:
    for flags in ([], ["--dtype", "bfloat16"], ["--dtype", "float32"]):
        folder, native = converted(source, tmp_path_factory.mktemp("sound"), *flags)
        before = tree(native)
        assert main(["verify", str(native)]) == 0
        assert main(["verify", str(native), "--full", "--workers", "3"]) == 0
        assert main(["verify", str(native), str(folder)]) == 0
        assert main(["verify", str(folder)]) == 0
        assert tree(native) == before


def test_what_was_checked_is_said(native: Path, sound: Path, run: Verify) -> None:
    tensors = len(json.loads((native / "manifest.json").read_text())["tensors"])
    checked = "names, shapes, dtypes, values"
    what = f"{native}: native, {tensors} tensors: sound ({checked}, hashes"
    assert run(native).out == run(native, "--quick").out == f"{what})\n"
    compared = f"{what}, {len(SOURCE.tensors)} equal to the source bit for bit)\n"
    assert run(native, "--full").out == run(native, sound.parent / "hf").out == compared
    count = f"{len(SOURCE.tensors)} tensors"
    folder = sound.parent / "hf"
    assert run(folder).out == f"{folder}: Hugging Face, {count}: sound ({checked})\n"
    assert not run(native, "--full").err


def test_a_decay_offset_of_the_converters_is_no_difference(tmp_path: Path, run: Verify) -> None:
    source = checkpoint(LINEAR_V2, "offset")
    _, native = converted(source, tmp_path, "--decay-layer-offset", "1")
    assert run(native, "--full").code == 0
    # A restored folder has that offset, and is as good a source.
    assert run(native, restored(native)).code == 0


def test_the_verdict_as_json(native: Path, sound: Path, run: Verify) -> None:
    verdict = json.loads(run(native, "--full", "--json").out)
    tensors = len(json.loads((native / "manifest.json").read_text())["tensors"])
    wanted = {"folder": str(native), "kind": "native", "sound": True, "tensors": tensors}
    assert verdict == wanted | {"compared": len(SOURCE.tensors), "problems": []}
    alter(native, "lm_head.weight", flip, hashed=False)
    said = run(native, "--json")
    assert (said.code, said.err) == (1, "")
    verdict = json.loads(said.out)
    problem = f"{native / 'head.safetensors'}: tensor 'lm_head.weight' differs from its sha256"
    assert verdict == wanted | {"sound": False, "compared": 0, "problems": [problem]}
    verdict = json.loads(run(sound.parent / "hf", "--json").out)
    assert (verdict["kind"], verdict["sound"]) == ("Hugging Face", True)
    assert (verdict["tensors"], verdict["compared"]) == (len(SOURCE.tensors), 0)


# ---- faults of the native folder


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("embed", "model.word_embeddings.weight"),
        ("layer-000", "model.layers.0.mlp.up_proj.weight"),
        ("layer-001", f"{EXPERTS}.down_proj.weight"),
        ("layer-001", "model.layers.1.mlp.gate.expert_bias"),
        ("layer-002", f"{KV_B}.value_weight"),
        ("head", "model.norm.weight"),
        ("extra", MTP),
    ],
)
def test_r111_a_flipped_bit_below_a_sound_header_is_found(
    native: Path, file: str, name: str, run: Verify
) -> None:
    alter(native, name, flip, hashed=False)
    said = run(native)
    assert said.code == 1
    assert said.problems == [
        f"{native / file}.safetensors: tensor '{name}' differs from its sha256"
    ]
    assert said.out.endswith("NOT sound, 1 problems\n")


def swap(array: np.ndarray) -> None:
    array[[1, 2]] = array[[2, 1]]


def transpose(array: np.ndarray) -> None:
    array[...] = np.ascontiguousarray(array.T).reshape(array.shape)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        (
            f"{EXPERTS}.up_proj.weight",
            swap,
            [f"{EXPERTS}.{i}.up_proj.weight" for i in (1, 2)],
        ),
        ("model.layers.0.mlp.gate_proj.weight", transpose, ["model.layers.0.mlp.gate_proj.weight"]),
        ("model.word_embeddings.weight", transpose, ["model.word_embeddings.weight"]),
        (f"{KV_B}.key_weight", flip, [f"{KV_B}.weight"]),
        (f"{KV_B}.value_weight", flip, [f"{KV_B}.weight"]),
        ("model.layers.1.mlp.gate.weight", flip, []),
        (MTP, flip, [MTP]),
    ],
)
def test_faults_with_a_fitting_hash_are_found_by_full_alone(
    native: Path,
    name: str,
    change: Callable[[np.ndarray], object],
    found: list[str],
    run: Verify,
) -> None:
    """The router's lowest float32 bit was never in the bfloat16 source, so none is lost."""
    alter(native, name, change)
    assert run(native).code == 0
    said = run(native, "--full")
    assert said.code == bool(found)
    names = sorted(problem.partition("tensor '")[2].partition("'")[0] for problem in said.problems)
    assert names == found
    assert all(problem.endswith(f"differs from {native}") for problem in said.problems)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e31", "-3e38"])
@pytest.mark.parametrize("name", ["model.norm.weight", f"{EXPERTS}.gate_proj.weight", MTP])
def test_s09_values_no_weight_has_are_found_by_quick_and_full(
    native: Path, name: str, value: str, run: Verify
) -> None:
    def put(array: np.ndarray) -> None:
        array.reshape(-1)[-3] = float(value)

    alter(native, name, put)
    for flags in ((), ("--quick",), ("--full",)):
        said = run(native, *flags)
        assert said.code == 1
        what = "NaN or infinite values" if value[-1] in "nf" else "values above 1e+30"
        assert f"tensor '{name}' has 1 {what}" in said.err


def test_s09_a_value_beyond_the_first_slab_says_where_it_is(
    native: Path, run: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(array: np.ndarray) -> None:
        array.reshape(-1)[[1005, 2007, 3000]] = np.nan

    alter(native, "lm_head.weight", put)
    assert "has 3 NaN" in run(native).err
    assert "elements from" not in run(native).err
    monkeypatch.setattr(native_format, "SLAB_BYTES", 1000)
    (problem,) = run(native).problems
    assert "has 1 NaN or infinite values of 500, the first at index (5,)" in problem
    assert problem.endswith("(of the 500 elements from the 1000-th on)")


@pytest.mark.parametrize("name", sorted(SIDE_FILES))
def test_a_changed_side_file_is_found(native: Path, name: str, run: Verify) -> None:
    content = SIDE_FILES[name]
    (native / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = run(native)
    assert (said.code, said.problems) == (1, [f"{native / name}: differs from its sha256"])


def test_all_problems_are_found_and_a_screenful_is_shown(native: Path, run: Verify) -> None:
    with open_native(native) as opened:
        names = sorted(opened.params)[:27]
    for name in names:
        alter(native, name, flip, hashed=False)
    (native / "LICENSE").write_bytes(b"")
    said = run(native)
    assert said.code == 1
    assert len(said.problems) == 21
    assert said.problems[-1] == "and 8 more"
    assert said.out.endswith(f"{len(_tensors(native))} tensors: NOT sound, 28 problems\n")
    found = json.loads(run(native, "--json").out)["problems"]
    assert len(found) == 28
    assert all(any(f"'{name}'" in problem for problem in found) for name in names)
    assert said.problems[:20] == found[:20]


def _tensors(native: Path) -> list[str]:
    return list(json.loads((native / "manifest.json").read_text())["tensors"])


# ---- a Hugging Face folder


@pytest.mark.parametrize("name", [DENSE, MTP])
def test_s09_bad_values_of_a_released_checkpoint_are_found(
    tmp_path: Path, name: str, run: Verify
) -> None:
    tensor = SOURCE.tensors[name].copy()
    tensor[3, 5] = np.nan
    folder = SOURCE.with_tensors({name: tensor}).write(tmp_path / "hf")
    said = run(folder)
    assert said.code == 1
    assert f"tensor '{name}' has 1 NaN or infinite values" in said.problems[0]
    assert "the first at index (3, 5)" in said.problems[0]
    assert said.out.endswith("NOT sound, 1 problems\n")


def test_r110_a_released_checkpoint_must_be_complete(tmp_path: Path, run: Verify) -> None:
    rest = {name: tensor for name, tensor in SOURCE.tensors.items() if name != DENSE}
    folder = Checkpoint(SOURCE.config, rest).write(tmp_path / "hf")
    said = run(folder)
    assert (said.code, said.out) == (2, "")
    assert f"e.g. {DENSE}" in said.err


# ---- exit code 2: what cannot be verified


def test_what_is_asked_must_make_sense(native: Path, sound: Path, run: Verify) -> None:
    source = sound.parent / "hf"
    for args, said in (
        ((native, source, "--quick"), "--quick does not read a source"),
        ((source, "--full"), "only a native folder is compared"),
        ((source, native), "only a native folder is compared"),
        ((native, native), "is a native folder itself"),
        ((native / "absent",), "not a readable folder"),
        ((native, "--workers", "0"), "--workers 0"),
    ):
        found = run(*args)
        assert (found.code, found.out) == (2, "")
        assert said in found.err
    with pytest.raises(SystemExit) as caught:
        run(native, "--quick", "--full")
    assert caught.value.code == 2


def test_a_recorded_source_that_is_gone_is_asked_for(tmp_path: Path, run: Verify) -> None:
    folder, native = converted(checkpoint(V2, "gone"), tmp_path)
    moved = folder.rename(tmp_path / "moved")
    said = run(native, "--full")
    assert said.code == 2
    assert str(folder) in said.err
    assert "verify NATIVE SOURCE" in said.err
    assert run(native).code == run(native, moved).code == run(native, moved, "--full").code == 0


def test_a_damaged_native_folder_is_refused_as_a_whole(native: Path, run: Verify) -> None:
    (native / EXTRA).unlink()
    said = run(native)
    assert (said.code, said.out) == (2, "")
    assert EXTRA in said.err


def test_the_extras_of_the_fixture_are_extras() -> None:
    assert is_extra(SOURCE, MTP)
    assert SOURCE.tensors[MTP].dtype == BFLOAT16
