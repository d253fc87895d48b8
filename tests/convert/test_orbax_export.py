"""The Orbax export: what goes in comes out, for Orbax's own readers too, in bounded memory.

Expected hashes are of the bytes written before any array exists. Whatever concerns a whole process
(imports, memory, stderr, a full disk, another program's restore) runs in a fresh one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging

from bailing_jax.errors import EXIT_FAILURE, UserError
from convert import orbax_export
from convert.orbax_export import export, tensor_hashes

ROOT = Path(__file__).resolve().parents[2]
# By name: a prefix of another name, one that sorts as no number does, and one without dots.
PARAMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "model.layers.3.mlp.experts.gate_proj.weight": (ml_dtypes.bfloat16, (5, 17, 31)),
    "model.layers.3.mlp.experts.gate_proj.weight_scale": (ml_dtypes.float8_e8m0fnu, (5, 3)),
    "model.layers.10.attention.query_key_value.weight": (ml_dtypes.float8_e4m3fn, (29, 13)),
    "model.layers.2.attention.dense.weight": (ml_dtypes.float8_e5m2, (13, 23)),
    "model.layers.2.mlp.gate.weight": (np.float32, (19, 7)),
    "model.norm": (np.float16, (37,)),
    "model.norm.weight": (np.float64, (1, 11)),
    "lm_head": (np.int8, (3, 1, 2, 9)),
}
PLAIN_USER = """
import hashlib, json, sys
import jax, numpy as np
import orbax.checkpoint as ocp

folder, told = sys.argv[1], {}
for reader in ("StandardCheckpointer", "PyTreeCheckpointer"):
    told[reader] = {
        n: [type(a).__name__, a.dtype.name, [*a.shape], hashlib.sha256(a.tobytes()).hexdigest()]
        for n, a in getattr(ocp, reader)().restore(folder).items()
    }
where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
arrays = ocp.StandardCheckpointer().restore(folder)
del arrays["model.norm.weight"]  # float64, which jax holds only where told to
target = {
    name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for name, a in arrays.items()
}
placed = ocp.PyTreeCheckpointer().restore(
    folder, item=target, partial_restore=True,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
)
told["placed"] = [
    name for name, a in placed.items()
    if isinstance(a, jax.Array) and np.asarray(a).tobytes() == arrays[name].tobytes()
]
print(json.dumps(told))
"""
PEAK_MEMORY = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
from convert import orbax_export

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
orbax_export._BATCH_BYTES, count, shape = json.loads(sys.argv[3])
peak = 0

def anonymous():  # bytes that are this process's own: mapped files can be dropped, these cannot
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("RssAnon")).split()[1])

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

def measure(work, arrays, name):
    global peak
    before = peak = anonymous()
    work(arrays, name)
    return peak - before

tiny = {"w": np.ones((3, 5), np.float32)}
work = (
    lambda arrays, name: orbax_export.export(arrays, folder / name),
    lambda arrays, name: orbax_export.tensor_hashes(folder / name, arrays),
)
for step in work:  # what Orbax and jax themselves need
    step(tiny, "tiny")
threading.Thread(target=watch, daemon=True).start()
arrays = {f"w.{i}": np.memmap(source, np.uint8, "r", shape=tuple(shape)) for i in range(count)}
print(json.dumps([measure(step, arrays, "measured") for step in work]))
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def in_fresh_process(code: str, *arguments: object, **environment: str) -> str:
    """What a Python process without this one's imports and settings prints; its stderr is empty."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=inherited | environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def source(
    tmp_path: Path, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Memory maps of random bytes (NaNs of every kind among them), and the bytes' hashes."""
    arrays, hashes = {}, {}
    for i, (name, (dtype, shape)) in enumerate(PARAMS.items()):
        data = rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        (tmp_path / f"{i}.bin").write_bytes(data)
        arrays[name] = np.memmap(tmp_path / f"{i}.bin", dtype, "r", shape=shape)
        hashes[name] = sha256(data)
    return arrays, hashes


@pytest.fixture
def arrays(source: tuple[dict[str, np.ndarray], dict[str, str]]) -> dict[str, np.ndarray]:
    return source[0]


@pytest.fixture
def hashes(source: tuple[dict[str, np.ndarray], dict[str, str]]) -> dict[str, str]:
    return source[1]


@pytest.fixture
def exported(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    export(arrays, tmp_path / "orbax")
    return tmp_path / "orbax"


def test_hashes_are_those_of_the_original_bytes(
    exported: Path, arrays: dict[str, np.ndarray], hashes: dict[str, str]
) -> None:
    assert tensor_hashes(exported, arrays) == hashes


@pytest.mark.parametrize(
    # 5 experts of 17 x 31 x 2 bytes: cut between them before they are cut themselves. A matrix of
    # 13 x 23 bytes: cut where it is longest.
    ("limit", "expert_chunk", "matrix_chunk"),
    [(64, (1, 17, 1), (13, 1)), (1100, (1, 17, 31), (13, 23)), (6000, (5, 17, 31), (13, 23))],
)
def test_any_batching_and_chunking_gives_the_same_bytes(
    limit: int,
    expert_chunk: tuple[int, ...],
    matrix_chunk: tuple[int, ...],
    tmp_path: Path,
    arrays: dict[str, np.ndarray],
    hashes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orbax_export, "_BATCH_BYTES", limit)
    batches = written_batches(monkeypatch)
    export(arrays, tmp_path / "orbax")
    assert Counter(chain(*batches)) == Counter(array.nbytes for array in arrays.values())
    assert all(len(batch) == 1 or sum(batch) <= limit for batch in batches)
    assert tensor_hashes(tmp_path / "orbax", arrays) == hashes
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored: Any = checkpointer.metadata(tmp_path / "orbax").item_metadata
    chunks = {name: leaf.storage.chunk_shape for name, leaf in stored.tree.items()}
    assert chunks["model.layers.3.mlp.experts.gate_proj.weight"] == expert_chunk
    assert chunks["model.layers.2.attention.dense.weight"] == matrix_chunk
    for name, array in arrays.items():
        assert np.prod(chunks[name]) * array.itemsize <= limit


def written_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A list that gets the arrays' sizes of every batch that Orbax is given to write."""
    seen: list[list[int]] = []
    serialize = ocp.type_handlers.NumpyHandler.serialize

    async def noted(self: Any, values: Any, infos: Any, args: Any = None) -> Any:
        seen.append([value.nbytes for value in values])
        return await serialize(self, values, infos, args)

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "serialize", noted)
    return seen


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10], [[10]]),
        ([4, 6, 1], [[4, 6], [1]]),
        ([11, 1, 9, 30, 30, 2], [[11], [1, 9], [30], [30], [2]]),
        ([3, 0, 7, 0], [[3, 0, 7, 0]]),
    ],
)
def test_batches_fill_up_to_the_limit(
    sizes: list[int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax_export, "_BATCH_BYTES", 10)
    assert [sizes[batch] for batch in orbax_export._batches(sizes)] == expected


def test_plain_orbax_user_restores_names_dtypes_shapes_and_bytes(
    exported: Path, arrays: dict[str, np.ndarray], hashes: dict[str, str]
) -> None:
    told = json.loads(in_fresh_process(PLAIN_USER, exported, JAX_PLATFORMS="cpu"))
    expected = {n: ["ndarray", a.dtype.name, [*a.shape], hashes[n]] for n, a in arrays.items()}
    assert told["StandardCheckpointer"] == expected
    assert told["PyTreeCheckpointer"] == expected
    assert set(told["placed"]) == set(arrays) - {"model.norm.weight"}


def test_flipped_bit_of_an_array_changes_its_hash(
    exported: Path, arrays: dict[str, np.ndarray], hashes: dict[str, str]
) -> None:
    name = "model.layers.3.mlp.experts.gate_proj.weight"
    stored = arrays[name].tobytes()
    path = next(p for p in exported.rglob("*") if p.is_file() and stored in p.read_bytes())
    flip_a_bit(path, path.read_bytes().index(stored) + 1234)
    found = tensor_hashes(exported, arrays)
    assert {n for n in hashes if found[n] != hashes[n]} == {name}


@pytest.mark.parametrize("part", [5, 2])
@pytest.mark.parametrize("pattern", ["d/*", "manifest.ocdbt"])
def test_flipped_bit_of_the_index_is_refused(
    pattern: str, part: int, exported: Path, arrays: dict[str, np.ndarray]
) -> None:
    (path,) = exported.glob(pattern)
    flip_a_bit(path, path.stat().st_size // part)
    with pytest.raises(UserError, match="Error decoding") as caught:
        tensor_hashes(exported, arrays)
    assert caught.value.message.startswith(f"{exported}: ")
    assert "tensorstore_spec" not in caught.value.message
    assert caught.value.exit_code == EXIT_FAILURE


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def more(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.more"] = arrays["model.norm"]


def fewer(arrays: dict[str, np.ndarray]) -> None:
    del arrays["model.norm"]


def another_shape(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.norm"] = arrays["model.norm"].reshape(1, 37)


def another_dtype(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.norm"] = arrays["model.norm"].view(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (more, "does not hold model.more as float16"),
        (fewer, "holds 1 other tensors, e.g. model.norm$"),
        (another_shape, r"does not hold model.norm as float16\[1, 37]"),
        (another_dtype, r"does not hold model.norm as bfloat16\[37]"),
    ],
)
def test_other_names_shapes_or_dtypes_are_refused(
    exported: Path,
    arrays: dict[str, np.ndarray],
    change: Callable[[dict[str, np.ndarray]], None],
    problem: str,
) -> None:
    change(arrays)
    with pytest.raises(UserError) as caught:
        tensor_hashes(exported, arrays)
    assert re.search(problem, caught.value.message)


@pytest.mark.parametrize("made", [None, Path.mkdir])
def test_folder_without_checkpoint_is_refused(
    made: Callable[[Path], None] | None, tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    if made:
        made(tmp_path / "orbax")
    with pytest.raises(UserError, match="not found") as caught:
        tensor_hashes(tmp_path / "orbax", arrays)
    assert str(tmp_path / "orbax") in caught.value.message
    assert caught.value.exit_code == EXIT_FAILURE


def make_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("made", [Path.mkdir, Path.touch, make_link])
def test_existing_folder_is_refused(
    made: Callable[[Path], None], tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    made(tmp_path / "orbax")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="already exists") as caught:
        export(arrays, tmp_path / "orbax")
    assert str(tmp_path / "orbax") in caught.value.message
    assert caught.value.exit_code == EXIT_FAILURE
    assert sorted(tmp_path.rglob("*")) == before


def test_log_level_is_left_as_it_was(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        export(arrays, tmp_path / "orbax")
        assert logging.get_verbosity() == logging.INFO
        with pytest.raises(UserError):
            tensor_hashes(tmp_path / "nothing", arrays)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)


def test_importing_the_module_imports_neither_orbax_nor_jax() -> None:
    code = "import sys, convert.orbax_export; print(*sys.modules)"
    modules = set(in_fresh_process(code).split())
    assert "convert.orbax_export" in modules
    assert modules & {"orbax", "orbax.checkpoint", "jax", "jaxlib", "absl", "tensorstore"} == set()


def test_a_wish_for_an_accelerator_is_overruled_and_nothing_is_logged(tmp_path: Path) -> None:
    code = (
        "import sys, numpy\n"
        "from pathlib import Path\n"
        "from convert.orbax_export import export, tensor_hashes\n"
        "folder, arrays = Path(sys.argv[1]), {'a.b': numpy.ones((3, 5))}\n"
        "export(arrays, folder)\n"
        "print(tensor_hashes(folder, arrays)['a.b'])\n"
        "import jax\n"
        "print({device.platform for device in jax.devices()})\n"
    )
    told = in_fresh_process(code, tmp_path / "orbax", JAX_PLATFORMS="cuda,tpu")
    assert told.splitlines() == [sha256(np.ones((3, 5)).tobytes()), "{'cpu'}"]


def test_full_disk_is_a_user_error_and_the_next_export_succeeds(tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy\n"
        "from pathlib import Path\n"
        "from bailing_jax.errors import UserError\n"
        "from convert.orbax_export import export, tensor_hashes\n"
        "folder = Path(sys.argv[1])\n"
        "arrays = {f'a.{i}': numpy.ones((300, 500 + i)) for i in range(20)}\n"
        "_, most = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))\n"
        "try:\n"
        "    export(arrays, folder)\n"
        "except UserError as error:\n"
        "    print(error.exit_code, folder.exists(), error.message.startswith(f'{folder}: '))\n"
        "    print(error.hint)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
        "export(arrays, folder)\n"
        "print(tensor_hashes(folder, arrays)['a.7'])\n"
    )
    lines = in_fresh_process(code, tmp_path / "orbax").splitlines()
    assert lines[0] == f"{EXIT_FAILURE} False True"
    assert "disk" in lines[1]
    assert lines[2:] == [sha256(np.ones((300, 507)).tobytes())]


def test_no_export_writes_where_another_did_and_nothing_stays(tmp_path: Path) -> None:
    """Of a failed export some writes may still be under way when the next one begins."""
    folder = tmp_path / "orbax"
    with orbax_export._beside(folder) as first, orbax_export._beside(folder) as second:
        assert first != second
        assert {first.parent, second.parent} == {tmp_path}
        (first / "d").mkdir()
        (first / "d/1").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_one_array_not_by_the_checkpoint(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    count, shape = 12, (3, 2500, 3500)
    nbytes = int(np.prod(shape))
    # All 300 MB are maps of one file; random, so that nothing shrinks on its way.
    (tmp_path / "source.bin").write_bytes(rng.bytes(nbytes))
    told = in_fresh_process(
        PEAK_MEMORY, tmp_path / "source.bin", tmp_path, json.dumps([2**25, count, shape]),
        MALLOC_MMAP_THRESHOLD_="1000000",  # freed memory is given back, and so not counted
    )  # fmt: skip
    writing, reading = json.loads(told)
    # A map that fits a batch is written without a copy. A reader has an array, and the piece of
    # the file it is made from.
    assert writing <= nbytes / 2
    assert reading <= 2.5 * nbytes


def test_failed_writes_that_come_late_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    late, other = (SimpleNamespace(exc_value=kind()) for kind in (RuntimeError, KeyError))
    before = sys.unraisablehook
    with orbax_export._orbax(tmp_path, "problem", "hint"):
        pass
    assert sys.unraisablehook is before
    with pytest.raises(UserError), orbax_export._orbax(tmp_path, "problem", "hint"):
        raise OSError
    sys.unraisablehook(cast(Any, late))
    sys.unraisablehook(cast(Any, other))
    assert shown == [other]


def test_failed_writes_nobody_waited_for_are_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio logs them where their futures are collected, a page for each array."""
    folder = tmp_path / "orbax"

    def forgotten(error: Exception) -> None:
        loop = asyncio.new_event_loop()
        loop.create_future().set_exception(error)
        loop.close()

    with pytest.raises(UserError), orbax_export._orbax(folder, "problem", "hint"):
        raise OSError
    forgotten(ValueError(f"OUT_OF_RANGE: Error writing to {folder}.orbax-checkpoint-tmp/d/1"))
    assert not caplog.records
    forgotten(ValueError("another's"))
    with orbax_export._orbax(tmp_path / "later", "problem", "hint"):
        pass
    forgotten(ValueError(f"{tmp_path / 'later'}: not of an export"))
    assert [record.name for record in caplog.records] == ["asyncio", "asyncio"]
