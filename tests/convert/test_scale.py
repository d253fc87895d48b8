"""Row S16: a conversion's memory is bounded, at any size; and a trillion parameters are planned.

Every conversion here runs in a process whose address space is limited to twice the largest source
tensor and 512 MiB, which bounds its memory more strictly than a limit on memory could. Trillion
parameters fit on no test machine's disk, so their checkpoint has holes for data
(scripts/make_sparse_checkpoint.py); its shapes are compared with `random_checkpoints`, which does
not know the package's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from random_checkpoints import tensor_shapes

from bailing_jax.presets import PRESETS
from convert.safetensors_file import SafetensorsHeader, read_header
from convert.source import INDEX_NAME

ROOT = Path(__file__).resolve().parents[2]
MAKE = ROOT / "scripts" / "make_sparse_checkpoint.py"
TRILLION = PRESETS["ling-2.6-1t"].hf_config
EMBEDDING = "model.word_embeddings.weight"

# Two workers wherever this runs: what is measured should not depend on the machine.
LIMITED = """
import os, resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
"""
COMMAND = LIMITED + "from convert.__main__ import main\nsys.exit(main())"
# Some tensors of a conversion, by `write` itself. The last argument is the number of tensors' worth
# of memory that blocks take beyond what they say.
STREAM = LIMITED + """
import dataclasses, json
from pathlib import Path
import numpy as np
from convert.progress import ProgressLine
from convert.source import open_source
from convert.to_native import plan_native
from convert.writer import write

source, output, prefix, more = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def greedy(tensor):
    def blocks():
        held = [np.empty(tensor.memory, np.uint8) for _ in range(more)]
        yield from tensor.blocks()
        del held
    return dataclasses.replace(tensor, blocks=blocks)

with open_source(source) as opened:
    _, _, conversion = plan_native(opened)
    parts = [
        dataclasses.replace(
            file, tensors=tuple(greedy(t) for t in file.tensors if t.name.startswith(prefix))
        )
        for file in conversion.files
    ]
    part = dataclasses.replace(
        conversion,
        files=tuple(file for file in parts if file.tensors),
        last=lambda records: {"records.json": json.dumps(records).encode()},
    )
    workers = min(8, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 4
    write(part, output, workers, ProgressLine(quiet=True))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux only")


def run_limited(program: str, limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python program under a limit on its address space, its libraries on one thread each."""
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.run(
        [sys.executable, "-c", program, str(limit), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **single, "PYTHONPATH": str(ROOT)},
    )


def convert(limit: int, *arguments: object) -> dict[str, Any]:
    """A command of the converter, which has to succeed; its JSON."""
    done = run_limited(COMMAND, limit, *arguments, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def bound(largest: int) -> int:
    """The promise of row S16."""
    return 2 * largest + 512 * 2**20


def item_bytes(name: str) -> int:
    return 4 if name.endswith("expert_bias") else 2


def make(folder: Path, *arguments: object) -> Path:
    subprocess.run(
        [sys.executable, MAKE, "--out", folder, *map(str, arguments)], check=True, cwd=ROOT
    )
    return folder


def headers(folder: Path) -> list[SafetensorsHeader]:
    return [read_header(path) for path in sorted(folder.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def trillion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("trillion") / "hf")


@pytest.fixture(scope="module")
def trillion_shapes() -> dict[str, tuple[int, ...]]:
    return tensor_shapes(TRILLION)


LARGEST = math.prod((TRILLION["vocab_size"], TRILLION["hidden_size"], 2))  # type: ignore[arg-type]


def test_a_checkpoint_of_holes_is_as_a_release_would_be(
    trillion: Path, trillion_shapes: Mapping[str, tuple[int, ...]]
) -> None:
    found = {name: info for header in headers(trillion) for name, info in header.tensors.items()}
    assert {name: info.shape for name, info in found.items()} == trillion_shapes
    assert all(
        str(info.dtype) == ("float32" if item_bytes(name) == 4 else "bfloat16")
        for name, info in found.items()
    )
    assert max(info.nbytes for info in found.values()) == LARGEST
    index = json.loads((trillion / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: info.file.name for name, info in found.items()}
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in found.values())
    assert all(header.file_size < 5.1e9 for header in headers(trillion))
    on_disk = sum(path.stat().st_blocks * 512 for path in trillion.iterdir())
    assert on_disk < 50e6


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, MAKE, "--out", tmp_path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: ")
    assert not list(tmp_path.iterdir())


def test_s16_a_trillion_parameters_are_planned_within_the_bound(
    trillion: Path, trillion_shapes: Mapping[str, tuple[int, ...]]
) -> None:
    plan = convert(
        bound(LARGEST), "hf-to-native", trillion, trillion.parent / "native", "--dry-run"
    )
    layers = TRILLION["num_hidden_layers"]
    mtp = [name for name in trillion_shapes if name.startswith(f"model.layers.{layers}.")]
    used = [name for name in trillion_shapes if name not in mtp]
    assert sum(plan["not_used"].values()) == len(mtp) > 0
    # Experts are stacked, kv_b_proj is cut in two, the router becomes float32; nothing else.
    paths = {re.sub(r"experts\.\d+", "experts", name) for name in used}
    halves = sum(path.endswith("kv_b_proj.weight") for path in paths)
    tensors = sum(group["files"] * group["tensors"] for group in plan["groups"])
    assert tensors == len(paths) + halves + len(mtp)
    source = sum(item_bytes(n) * math.prod(shape) for n, shape in trillion_shapes.items())
    routers = sum(2 * math.prod(trillion_shapes[n]) for n in used if n.endswith("mlp.gate.weight"))
    assert plan["tensor_bytes"] == source + routers > 2e12
    assert sum(group["bytes"] for group in plan["groups"]) == plan["tensor_bytes"]
    assert LARGEST < plan["peak_memory_bytes"] <= bound(LARGEST)
    assert plan["needed_bytes"] > plan["tensor_bytes"]
    assert not plan["fits"]
    assert sorted(path.name for path in trillion.parent.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.0.attention.",  # 0.7 GB, transposed
        # 2.6 GB are read and written, and as much again takes their place in the page cache.
        pytest.param(EMBEDDING, marks=pytest.mark.slow),
    ],
)
def test_s16_a_part_of_a_trillion_parameters_is_streamed_within_its_bound(
    prefix: str, trillion: Path, trillion_shapes: Mapping[str, tuple[int, ...]], tmp_path: Path
) -> None:
    sizes = {n: 2 * math.prod(s) for n, s in trillion_shapes.items() if n.startswith(prefix)}
    output = tmp_path / "native"
    try:
        done = run_limited(STREAM, bound(max(sizes.values())), trillion, output, prefix, 0)
        assert done.returncode == 0, done.stderr
        (header,) = headers(output)
        assert {name: info.nbytes for name, info in header.tensors.items()} == sizes
        (record,) = json.loads((output / "records.json").read_text()).values()
        assert record["tensors"] == {name: sha256_of_zeros(sizes[name]) for name in sizes}
        assert record["bytes"] == header.file_size == header.path.stat().st_size
        assert holds_only_zeros(header.path, header.file_size - sum(sizes.values()))
    finally:
        shutil.rmtree(output, ignore_errors=True)


def holds_only_zeros(path: Path, start: int) -> bool:
    with open(path, "rb") as file:
        file.seek(start)
        return not any(np.frombuffer(piece, np.uint8).any() for piece in pieces(file))


def pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(2**22):
        yield piece


def test_the_limit_refuses_two_tensors_more(trillion: Path, tmp_path: Path) -> None:
    """The control: the same conversion, but that it holds more than it says."""
    done = run_limited(STREAM, bound(LARGEST), trillion, tmp_path / "native", EMBEDDING, 2)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr
    assert not list(tmp_path.iterdir())


def sha256_of_zeros(size: int) -> str:
    digest, piece = hashlib.sha256(), bytes(2**22)
    for left in range(size, 0, -len(piece)):
        digest.update(memoryview(piece)[: min(left, len(piece))])
    return digest.hexdigest()


# 97,657 x 512 bfloat16 are 100 MB; embedding, head and layers have as much each.
MEDIUM = {
    **PRESETS["ring-mini-linear-2.0"].hf_config,
    "vocab_size": 97657,
    "eos_token_id": 97656,
    "pad_token_id": 97656,
    "hidden_size": 512,
    "intermediate_size": 1280,
    "moe_intermediate_size": 200,
    "moe_shared_expert_intermediate_size": 200,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 32,
}
MEDIUM_LARGEST = 97657 * 512 * 2


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medium")
    (folder / "config.json").write_text(json.dumps(MEDIUM))
    arguments = ("--config", folder / "config.json", "--seed", 3, "--shard-gb", 0.12)
    return make(folder / "hf", *arguments)


def test_s16_there_and_back_within_the_bound(medium: Path, tmp_path: Path) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    source = {name: info for header in headers(medium) for name, info in header.tensors.items()}
    assert max(info.nbytes for info in source.values()) == MEDIUM_LARGEST
    limit = bound(MEDIUM_LARGEST)
    try:
        there = convert(limit, "hf-to-native", medium, native)
        assert there["peak_memory_bytes"] <= limit
        verdict = convert(limit, "verify", "--full", native)
        assert (verdict["sound"], verdict["compared"]) == (True, len(source))
        assert convert(limit, "native-to-hf", native, back)["peak_memory_bytes"] <= limit
        assert convert(limit, "verify", back)["sound"]
        assert tensor_hashes(back) == tensor_hashes(medium)
    finally:
        shutil.rmtree(native, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)


def test_the_limit_refuses_less_than_the_largest_tensor(medium: Path, tmp_path: Path) -> None:
    """The control: planning passes, and the first large tensor does not."""
    limit = MEDIUM_LARGEST + 80 * 2**20
    convert(limit, "hf-to-native", medium, tmp_path / "native", "--dry-run")
    done = run_limited(COMMAND, limit, "hf-to-native", medium, tmp_path / "native", "--quiet")
    assert done.returncode != 0
    assert not list(tmp_path.iterdir())


def tensor_hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for header in headers(folder):
        with open(header.path, "rb") as file:
            for name, info in header.tensors.items():
                file.seek(info.start)
                hashes[name] = hashlib.sha256(file.read(info.nbytes)).hexdigest()
    return hashes
