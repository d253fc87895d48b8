"""The TPU kernels through the compiler for TPUs, on a host without one.

libtpu holds the whole compiler and compiles for slices that are described, not there. For each
generation and shape: time to compile, code size, temporaries, whether the pool stays in place,
bytes moved against the fewest possible; with `--bundles` (slow) the kernel's instruction bundles.
Nothing runs on a TPU: bytes inside the kernels are counted in the interpreter (`tpu_traffic.py`),
and there are no times.

    pip install -e '.[tpu]'
    python scripts/tpu_check.py --quick        # a few shapes, half a minute
    python scripts/tpu_check.py --bundles      # everything, to docs/benchmarks/tpu_lightning.*

Exits 1 when a limit is broken.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

# Before jax: compile only, never look for a TPU; two processes may load libtpu at once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bailing_jax  # noqa: F401  (before jax: sets the CPU scheduler)

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import tpu_model
import tpu_report
import tpu_traffic
import tpu_widths
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bailing_jax.planning import hlo
from pallas_kernels import testing
from pallas_kernels.lightning_attention import tpu_blocks, tpu_decode, tpu_prefill
from pallas_kernels.testing import LightningShape

ROOT = Path(__file__).resolve().parent.parent
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
MODEL_STEPS = {
    "decode": {"lightning_decode"},
    "mixed": {"lightning_decode", "lightning_prefill"},
}
MODEL_CHIPS = ("v5e", "v6e")
QUICK = {"decode": ("H16 B32", "H64 B256"), "prefill": ("H16 T8192 x16",)}
SHAPES = {"decode": testing.DECODE, "prefill": testing.PREFILL}
# Dumping what the compiler made takes many times as long as making it.
WITH_BUNDLES = ("H16 B1", "H16 B128", "H64 B256", "H16 T8192 x1", "H64 T8192 x16")
SLOTS = 257
# What a compiled call must keep to.
MOST_BYTES = {"decode": 1.05, "prefill": 1.15}
MOST_TEMPORARIES = 20 << 20
MOST_SECONDS = 5.0


def arrays(operator: str, shape: LightningShape) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of a call's arguments: slots (and lengths), q, k, v, log decay, pool."""
    rows, heads = shape.rows, shape.heads
    number = len(shape.lengths) or rows
    where = [((number,), "int32")]
    if operator == "prefill":
        where += [((number + 1,), "int32"), ((number,), "bool")]
    widths = (shape.key_dim, shape.key_dim, shape.value_dim)
    pool = (max(SLOTS, number + 1), heads, shape.key_dim, shape.value_dim)
    return [
        *where,
        *[((rows, heads, width), shape.dtype) for width in widths],
        ((heads,), "float32"),
        (pool, shape.state_dtype),
    ]


def call(operator: str) -> Callable:
    """The kernel as a function of those arguments."""

    def decode(slots, *arrays):
        return tpu_decode.lightning_decode(*arrays, slots=slots, scale=0.1)

    def prefill(slots, cu_seqlens, is_fresh, *arrays):
        return tpu_prefill.lightning_prefill(
            *arrays, slots=slots, cu_seqlens=cu_seqlens, is_fresh=is_fresh, scale=0.1, chunk_size=64
        )

    return {"decode": decode, "prefill": prefill}[operator]


def one_chip(chip: str) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    return Mesh(np.array(devices[:1]), ("x",))


def compile_call(chip: str, operator: str, shape: LightningShape) -> dict[str, Any]:
    """Compile one call and say what the compiler made of it."""
    mesh = one_chip(chip)
    place = NamedSharding(mesh, PartitionSpec())
    given = [
        jax.ShapeDtypeStruct(s, jnp.dtype(d), sharding=place) for s, d in arrays(operator, shape)
    ]
    pool = len(given) - 1
    begun = time.perf_counter()
    # Without an estimate XLA counts nothing for the kernel, so what it counts is around it.
    with (
        jax.set_mesh(mesh),
        mock.patch.object(tpu_decode, "cost", return_value=None),
        mock.patch.object(tpu_prefill, "cost", return_value=None),
    ):
        lowered = jax.jit(call(operator), donate_argnums=pool).lower(*given)
    lowered_at = time.perf_counter()
    seconds = []
    while not seconds or (min(seconds) > MOST_SECONDS and len(seconds) < 3):
        # Once more where other programs may have held it up.
        begun_compiling = time.perf_counter()
        compiled = lowered.compile()
        seconds.append(time.perf_counter() - begun_compiling)
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    pool_bytes = given[pool].size * given[pool].dtype.itemsize
    return {
        "lower_s": round(lowered_at - begun, 2),
        "compile_s": round(min(seconds), 2),
        "code_bytes": memory.generated_code_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "pool_in_place": memory.alias_size_in_bytes >= pool_bytes,
        "bytes_around": int(cost.get("bytes accessed", 0)),
        "copies": len(re.findall(r" (?:copy|transpose|gather|scatter|pad)\(", compiled.as_text())),
    }


def traffic(operator: str, shape: LightningShape) -> int:
    """Bytes the kernel moves, counted over every copy it makes, for one block of heads times their
    number: the blocks are the same program."""
    one_block = replace(shape, heads=tpu_blocks.head_block(shape.heads))
    number = len(shape.lengths) or shape.rows
    rng = np.random.default_rng(0)
    given = []
    for size, dtype in arrays(operator, one_block):
        if dtype == "int32" and len(size) == 1 and size[0] == number:
            given.append(1 + rng.permutation(number).astype(np.int32))
        elif dtype == "int32":
            given.append(np.cumsum([0, *shape.lengths], dtype=np.int32))
        else:
            given.append(np.zeros(size, dtype))
    with (
        tpu_traffic.counted() as found,
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(skip_floating_point_ops=True)),
    ):
        jax.block_until_ready(jax.jit(call(operator))(*given))
    return found.total * shape.heads // one_block.heads


def promised(operator: str, shape: LightningShape) -> int:
    """The kernel's own estimate of its bytes."""
    structs = [jax.ShapeDtypeStruct(s, jnp.dtype(d)) for s, d in arrays(operator, shape)]
    q, _, v, _, state = structs[-5:]
    if operator == "decode":
        return tpu_decode.cost(q, v, state).bytes_accessed
    blocks = tpu_blocks.prefill_blocks(q, v, state)
    return tpu_prefill.cost(q, v, state, len(shape.lengths), blocks).bytes_accessed


def vmem(operator: str, shape: LightningShape) -> int:
    structs = [jax.ShapeDtypeStruct(s, jnp.dtype(d)) for s, d in arrays(operator, shape)]
    q, _, v, _, state = structs[-5:]
    blocks = tpu_blocks.decode_blocks if operator == "decode" else tpu_blocks.prefill_blocks
    return blocks(q, v, state).vmem


def broken(row: dict[str, Any]) -> list[str]:
    """The limits that a row does not keep."""
    most = MOST_BYTES[row["operator"]]
    found = {
        f"compiled in {row['compile_s']} s": row["compile_s"] > MOST_SECONDS,
        f"{row['temporary_bytes']} bytes of temporaries": row["temporary_bytes"] > MOST_TEMPORARIES,
        "the pool is copied": not row["pool_in_place"],
        f"{row['bytes_ratio']} of the fewest bytes": row["bytes_ratio"] > most,
        "the estimate differs from the count": row["bytes_estimated"] != row["bytes_kernel"],
    }
    return [f"{row['chip']} {row['operator']} {row['shape']}: {x}" for x in found if found[x]]


def uneven(rows: list[dict[str, Any]]) -> list[str]:
    """Kernels whose code grows with the rows: within a tenth it is the same program."""
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        heads = row["shape"].split()[0]
        sizes.setdefault((row["chip"], row["operator"], heads), []).append(row["code_bytes"])
    return [
        f"{' '.join(key)}: code from {min(found)} to {max(found)} bytes"
        for key, found in sizes.items()
        if max(found) > 1.1 * min(found)
    ]


def steps(chip: str, names: Collection[str]) -> dict[str, Any]:
    """The small model's steps of those names, compiled whole."""
    mesh = one_chip(chip)
    place = NamedSharding(mesh, PartitionSpec())
    found = {}
    with jax.set_mesh(mesh):
        traced = tpu_model.traced_steps(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        )
        for name in names:
            begun = time.perf_counter()
            compiled = traced[name].lower().compile()
            text = compiled.as_text()
            calls = re.findall(r"%(lightning_\w+?)(?:\.\d+)* = .*custom-call", text)
            found[name] = {
                "compile_s": round(time.perf_counter() - begun, 1),
                "kernels": {kernel: calls.count(kernel) for kernel in sorted(set(calls))},
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "state_copies": hlo.state_copies(text),
            }
    return found


def widths(chip: str) -> list[dict[str, Any]]:
    """Other head sizes, through the public functions."""
    mesh = one_chip(chip)
    with jax.set_mesh(mesh):
        rows = tpu_widths.compiled(NamedSharding(mesh, PartitionSpec()))
        return [{"chip": chip, **row} for row in rows]


def bundles(chip: str, operator: str, name: str) -> dict[str, int]:
    """Final instruction bundles of a kernel and the slots its units take, from a process of its
    own: the dump is switched on when libtpu is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, __file__, "--dump-one", chip, operator, name],
            env={**os.environ, "LIBTPU_INIT_ARGS": flags}, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        pattern = f"*lightning_{operator}*final_hlo-static-per-bundle-utilization.txt"
        (found,) = glob.glob(os.path.join(glob.escape(folder), pattern))
        lines = Path(found).read_text().splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    counts = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    totals = dict(zip(units, (sum(column) for column in zip(*counts, strict=True)), strict=True))
    return {
        "bundles": len(counts), "MXU": totals["MXU"], "VALU": totals["VALU"], "XLU": totals["XLU"],
        "spills": totals["VSTORE:SPILL"],
    }  # fmt: skip


def check(quick: bool, with_bundles: bool) -> dict[str, Any]:
    rows = []
    for operator, shapes in SHAPES.items():
        for name, shape in shapes.items():
            if quick and name not in QUICK[operator]:
                continue
            estimated = promised(operator, shape)
            counted = estimated if quick else traffic(operator, shape)
            for chip in CHIPS:
                row = {"operator": operator, "shape": name, "chip": chip}
                row |= compile_call(chip, operator, shape)
                row["vmem_bytes"] = vmem(operator, shape)
                row["bytes_least"] = shape.least_bytes
                row["bytes_estimated"], row["bytes_kernel"] = estimated, counted
                moved = counted + row["bytes_around"]
                row["bytes_ratio"] = round(moved / shape.least_bytes, 4)
                if with_bundles and name in WITH_BUNDLES:
                    row |= bundles(chip, operator, name)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    # Of the steps the mixed one holds both kernels.
    chips, names = (MODEL_CHIPS[-1:], ["mixed"]) if quick else (MODEL_CHIPS, list(MODEL_STEPS))
    model = {chip: steps(chip, names) for chip in chips}
    print(json.dumps(model), file=sys.stderr, flush=True)
    other = [row for chip in chips for row in widths(chip)]
    print(json.dumps(other), file=sys.stderr, flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    limits = [line for row in rows for line in broken(row)]
    limits += [
        f"{chip}: the small model's {name} step holds {sorted(step['kernels'])}"
        for chip, found in model.items()
        for name, step in found.items()
        if set(step["kernels"]) != MODEL_STEPS[name]
    ]
    limits += [
        f"{chip}: the small model's {name} step copies a pool at {step['state_copies']} places"
        for chip, found in model.items()
        for name, step in found.items()
        if step["state_copies"]
    ]
    limits += [
        f"{row['chip']}: {row['operator']} of {row['heads']} heads of {row['K']} by {row['V']}, "
        f"{row['state_dtype']}, copies its pool"
        for row in other
        if row["state_copies"] or not row["pool_in_place"]
    ]
    limits += uneven(rows)
    return {
        "versions": versions, "calls": rows, "widths": other, "small_model": model,
        "broken": limits,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes, nothing written")
    parser.add_argument("--bundles", action="store_true", help="count instruction bundles (slow)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--dump-one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        print("libtpu is not installed: pip install -e '.[tpu]'", file=sys.stderr)
        return 2
    if options.dump_one:
        chip, operator, name = options.dump_one
        compile_call(chip, operator, SHAPES[operator][name])
        return 0
    found = check(options.quick, options.bundles)
    if not options.quick:
        options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        (options.output / "tpu_lightning.json").write_text(text)
        (options.output / "tpu_lightning.md").write_text(tpu_report.markdown(found))
    for line in found["broken"]:
        print(f"BROKEN {line}", file=sys.stderr)
    print(json.dumps({"calls": len(found["calls"]), "broken": found["broken"]}))
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
