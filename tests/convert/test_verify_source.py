"""`verify --full`: a source that is another is found, whatever makes it another.

And what a comparison holds in memory is counted in the budget.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_configs import V2, V2_5
from native_cases import Checkpoint, Said, alter, checkpoint, converted, flip

from convert import verify
from convert.__main__ import main
from convert.native import open_native
from convert.progress import ProgressLine
from convert.source import open_source
from convert.workers import Workers

Verify = Callable[..., Said]

# Layer 1 is sparse, layer 2 has latent attention; the MTP layer is an extra.
SOURCE = checkpoint(V2_5, "verify source")
NORM, BIAS = "model.norm.weight", "model.layers.1.mlp.gate.expert_bias"
DENSE = "model.layers.2.attention.dense.weight"
MTP = "model.layers.3.eh_proj.weight"


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


def _other(**tensors: np.ndarray | None) -> dict[str, np.ndarray]:
    changed = {**SOURCE.tensors, **tensors}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def _flipped(name: str) -> np.ndarray:
    tensor = SOURCE.tensors[name].copy()
    flip(tensor)
    return tensor


def _wide(name: str) -> np.ndarray:
    return SOURCE.tensors[name].astype(np.float32)


SOURCE_FAULTS = {
    "changed": (_other(**{DENSE: _flipped(DENSE)}), f"tensor '{DENSE}' differs from "),
    "changed-extra": (_other(**{MTP: _flipped(MTP)}), f"tensor '{MTP}' differs from "),
    # The values are the same; the file is not.
    "dtype": (_other(**{NORM: _wide(NORM)}), f"tensor '{NORM}' is float32, was bfloat16"),
    "router-dtype": (_other(**{BIAS: _wide(BIAS)}), f"tensor '{BIAS}' is float32, was bfloat16"),
    "extra-dtype": (_other(**{MTP: _wide(MTP)}), f"tensor '{MTP}' is float32, was bfloat16"),
    "shape": (_other(**{DENSE: SOURCE.tensors[DENSE].T.copy()}), f"'{DENSE}' has shape (66, 56)"),
    "extra-shape": (_other(**{MTP: SOURCE.tensors[MTP].T.copy()}), f"'{MTP}' has shape (112, 56)"),
    "missing": (_other(**{DENSE: None}), f"1 tensors are only in one of both, e.g. '{DENSE}'"),
    "new": (_other(**{"a.new": np.zeros(2)}), "1 tensors are only in one of both, e.g. 'a.new'"),
}


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_source_that_is_another_is_found(native: Path, fault: str, run: Verify) -> None:
    tensors, said = SOURCE_FAULTS[fault]
    folder = dataclasses.replace(SOURCE, tensors=tensors).write(native.parent / "other")
    found = run(native, folder)
    assert found.code == 1
    (problem,) = found.problems
    assert problem.startswith(str(folder))
    assert said in problem


def test_a_source_with_other_names_is_found(native: Path, run: Verify) -> None:
    alias = BIAS.replace("gate.expert_bias", "experts.expert_bias")
    tensors = _other(**{BIAS: None, alias: SOURCE.tensors[BIAS]})
    folder = dataclasses.replace(SOURCE, tensors=tensors).write(native.parent / "other")
    (problem,) = run(native, folder).problems
    assert f"2 tensors are only in one of both, e.g. '{alias}'" in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 10_000.0}, "rope_theta is 10000.0 there and 600000 here"),
        ({"rope_theta": 600_000.0}, "rope_theta is 600000.0 there and 600000 here"),
        ({"more": 1}, "more is only in that one"),
    ],
)
def test_a_source_with_another_config_is_found(
    native: Path, changes: dict[str, object], said: str, run: Verify
) -> None:
    other = dataclasses.replace(SOURCE, config={**SOURCE.config, **changes})
    folder = other.write(native.parent / "other")
    found = run(native, folder)
    assert (found.code, found.problems) == (1, [f"{folder / 'config.json'}: {said}"])


def test_a_narrowed_folder_is_compared_with_the_rounded_source(
    tmp_path: Path, run: Verify
) -> None:
    tensors = {name: tensor.astype(np.float32) for name, tensor in SOURCE.tensors.items()}
    tensors[DENSE][0, 0] = 1 + 2**-9
    source = Checkpoint(SOURCE.config, tensors)
    folder, native = converted(source, tmp_path, "--dtype", "bfloat16")
    assert run(native, folder).code == 0
    alter(native, DENSE, flip)
    assert f"'{DENSE}' differs" in run(native, folder).err


# ---- memory


def test_comparisons_together_hold_no_more_than_the_budget(
    native: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies of the largest tensor, where there is nothing to spare."""
    with open_source(sound.parent / "hf") as source:
        sizes = {name: info.nbytes for name, info in source.tensors.items()}
    lock, held, most, together = threading.Lock(), dict[str, int](), 0, 0
    compare = verify._compare

    def watched(native: object, source: object, name: str, expected: object) -> list[str]:
        nonlocal most, together
        with lock:
            held[name] = 2 * sizes[name]
            most, together = max(most, sum(held.values())), max(together, len(held))
        time.sleep(0.001)
        result = compare(native, source, name, expected)  # type: ignore[arg-type]
        with lock:
            del held[name]
        return result

    monkeypatch.setattr(verify, "_compare", watched)
    monkeypatch.setattr(verify, "SPARE_BYTES", 0)
    verdict = verify.verify_native(native, sound.parent / "hf", 5, ProgressLine(quiet=True))
    assert verdict.compared == len(sizes)
    assert most == 2 * max(sizes.values())
    assert together > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "keep"])
@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
def test_a_comparison_holds_two_copies_of_its_tensor(
    tmp_path: Path, own: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(V2, "large", vocab_size=20_000)
    kind = np.dtype(getattr(ml_dtypes, own, own))
    tensors = {name: np.abs(t).clip(0, 1).astype(kind) for name, t in source.tensors.items()}
    folder, path = converted(Checkpoint(source.config, tensors), tmp_path, "--dtype", dtype)
    monkeypatch.setattr("convert.mapping.SLAB_BYTES", 2**16)
    monkeypatch.setattr("convert.to_native.SLAB_BYTES", 2**16)
    with open_native(path) as native, open_source(folder) as original:
        expected = verify.checkpoint_tensors(native, native.model_config())
        for name in ("lm_head.weight", "model.word_embeddings.weight"):
            tracemalloc.start()
            assert verify._compare(native, original, name, expected) == []
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2 * tensors[name].nbytes + 2**21 + 8 * 2**16


def test_workers_are_those_asked_for(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    class Counted(Workers):
        def __init__(self, count: int, memory: int) -> None:
            counts.append(count)
            super().__init__(count, memory)

    monkeypatch.setattr(verify, "Workers", Counted)
    assert main(["verify", str(native), "--workers", "3"]) == 0
    assert main(["verify", str(native), "--full", "--workers", "2"]) == 0
    assert counts == [3, 2]
