"""Compile the lightning kernels for an H100 on a machine without a GPU, and say what came out.

    pip install 'jax[cuda13]' nvidia-cuda-nvcc
    JAX_PLATFORMS=cpu python scripts/gpu_compile.py [--out FILE.md]

For every kernel: registers a thread, spilled bytes, what the assembler warns of (C7510 to C7514:
products of the matrix units wait for each other; C7517, a wait it put in itself, is harmless),
temporaries beside the pool, whether the pool is updated in place, operations of XLA's around the
kernels, compile time. The assembler's figures stand in the order of a program's kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read by the compiler's Mosaic GPU part: print what the assembler says.
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from pallas_kernels.lightning_attention import (  # noqa: E402
    gpu_decode,
    gpu_decode_fused,
    gpu_grad,
    gpu_prefill,
    gpu_scan,
)
from pallas_kernels.lightning_attention.gpu_prefill import Variant  # noqa: E402
from pallas_kernels.lightning_attention.gpu_work import Segments  # noqa: E402

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def h100() -> jax.sharding.Sharding:
    """Arrays on a GPU that is not there."""
    data = Path(jax.__file__).parents[1] / "nvidia" / "cu13"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={data}"
    import jax_plugins.xla_cuda13  # noqa: F401  (the compiler; it need not find a GPU)

    found = topologies.get_topology_desc("one", "cuda", target_config=H100, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(found.devices[0])


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """What is printed within, by native code too."""
    text: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            yield text
        finally:
            for fd, old in zip((1, 2), saved, strict=True):
                os.dup2(old, fd)
                os.close(old)
        file.seek(0)
        text.append(file.read())


def compiled(run: Callable[..., Any], arrays: tuple[Any, ...], pool: int) -> dict[str, Any]:
    """One program's figures; `pool` is the donated argument."""
    start = time.perf_counter()
    with captured() as said:
        program = jax.jit(run, donate_argnums=pool).trace(*arrays)
        program = program.lower(lowering_platforms=("cuda",)).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    entry = (program.as_text() or "").partition("ENTRY")[2].splitlines()
    found = (re.search(r" ([a-z][\w-]*)\(", line) for line in entry if " = " in line)
    operations = [match[1] for match in found if match]
    quiet = ("parameter", "tuple", "get-tuple-element", "custom-call", "bitcast", "constant")
    state = arrays[pool]
    return {
        "registers": " ".join(re.findall(r"Used (\d+) registers", said[0])),
        "spilled": " ".join(re.findall(r"frame, (\d+) bytes spill", said[0])) or "0",
        "warnings": " ".join(sorted(set(re.findall(r"\((C75\d\d)\)", said[0])))),
        "kernels": operations.count("custom-call"),
        "other": " ".join(sorted({x for x in operations if x not in quiet})),
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "in_place": memory.alias_size_in_bytes == state.size * state.dtype.itemsize,
        "seconds": seconds,
    }


def programs(sharding: Any) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], int]]:
    """(name, function, shapes, which is the pool)."""

    def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def rows(num: int, heads: int, key_dim: int, value_dim: int, dtype: Any) -> tuple[Any, ...]:
        q, v = ((num, heads, width) for width in (key_dim, value_dim))
        return spec(q, dtype), spec(q, dtype), spec(v, dtype), spec((heads,), F32)

    def pool(slots: int, *sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return spec((slots, *sizes), dtype)

    for batch, sizes, dtype in (
        (1, (16, 128, 128), F32), (32, (16, 128, 128), F32), (32, (16, 128, 128), BF16),
        (32, (6, 64, 64), F32), (32, (3, 256, 256), F32), (32, (3, 48, 80), BF16),
        # Slots beyond 2^31 elements.
        (4, (1, 128, 128), BF16),
    ):  # fmt: skip
        slots = 140_000 if sizes[0] == 1 else batch + 1
        arrays = (
            *rows(batch, *sizes, BF16),
            pool(slots, *sizes, dtype=dtype),
            spec((batch,), "int32"),
        )
        yield (
            f"decode B{batch} {'x'.join(map(str, sizes))} {dtype.name}",
            lambda *a: gpu_decode.lightning_decode(*a[:5], slots=a[5], scale=1.0),
            arrays,
            4,
        )

    def places(num: int) -> tuple[Any, ...]:
        return spec((num,), "int32"), spec((num + 1,), "int32"), spec((num,), bool)

    def matrix(variant: Variant):
        return lambda *a: gpu_prefill.run(*a[:5], Segments(*a[5:]), variant)

    for num, segments, sizes, dtype, variant in (
        (8192, 1, (64, 128, 128), F32, Variant(1.0)),
        (8192, 1, (64, 128, 128), F32, Variant(1.0, groups=1)),
        (8192, 1, (64, 128, 128), F32, Variant(1.0, reverse=True, value_scale=0.5)),
        (8192, 16, (16, 128, 128), F32, Variant(1.0)),
        (8192, 16, (16, 128, 128), BF16, Variant(1.0)),
        (8192, 16, (16, 128, 128), F32, Variant(1.0, reverse=True)),
        (8192, 1, (32, 64, 64), F32, Variant(1.0)),
        (8192, 1, (32, 64, 256), F32, Variant(1.0)),
        (8192, 1, (32, 192, 64), F32, Variant(1.0)),
        (8192, 1, (32, 256, 64), F32, Variant(1.0)),
    ):
        arrays = *rows(num, *sizes, BF16), pool(40, *sizes, dtype=dtype), *places(segments)
        how = {k: v for k, v in variant._asdict().items() if v != Variant(1.0)._asdict()[k]}
        name = f"prefill T{num} x{segments} {'x'.join(map(str, sizes))} {dtype.name} {how or ''}"
        yield name, matrix(variant), arrays, 4

    for sizes, dtype in (((16, 128, 128), F32), ((3, 96, 48), BF16)):
        arrays = *rows(2048, *sizes, F32), pool(40, *sizes, dtype=dtype), *places(4)
        yield (
            f"token by token T2048 x4 {'x'.join(map(str, sizes))} {dtype.name}",
            lambda *a: gpu_scan.run(*a[:5], Segments(*a[5:]), 1.0),
            arrays,
            4,
        )

    for batch, dtype in ((1, F32), (32, F32), (32, BF16)):
        sizes = (16, 128, 128)
        head, angles = spec((128,), BF16), spec((batch, 32), F32)
        arrays = spec((batch, 3, *sizes[:2]), BF16), spec((16,), F32), pool(40, *sizes, dtype=dtype)
        arrays = *arrays, spec((batch,), "int32"), head, head, angles, angles
        yield (
            f"decode from the projected row B{batch} 16x128 {dtype.name}",
            lambda *a: gpu_decode_fused.lightning_decode_fused(
                *a[:3], slots=a[3], scale=1.0, norms=a[4:6], eps=1e-6, angles=a[6:]
            ),
            arrays,
            2,
        )

    def gradients(q, k, v, log_decay, state, slots, cu_seqlens, is_fresh, weight):
        def outputs(q, k, v, state):
            return gpu_grad.lightning_prefill(
                q, k, v, log_decay, state, slots=slots, cu_seqlens=cu_seqlens,
                is_fresh=is_fresh, scale=1.0,
            )  # fmt: skip

        (o, after), pull = jax.vjp(outputs, q, k, v, state)
        return o, after, *pull((weight, jnp.zeros_like(after)))[:3]

    sizes = (64, 128, 128)
    arrays = *rows(16384, *sizes, BF16), pool(5, *sizes, dtype=F32), *places(4)
    arrays = *arrays, arrays[2]
    yield "forward and backward 4x4096 64x128x128", gradients, arrays, 4


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the lightning kernels for an H100")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    args = parser.parse_args()
    columns = ("registers", "spilled", "warnings", "kernels", "other")
    columns += ("temporary_mb", "in_place", "seconds")
    lines = [f"| program (jax {jax.__version__}) | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    print("\n".join(lines), flush=True)
    for name, run, arrays, pool in programs(h100()):
        if args.only in name:
            found = compiled(run, arrays, pool)
            found["temporary_mb"] = f"{found['temporary_mb']:.2f}"
            found["seconds"] = f"{found['seconds']:.1f}"
            lines.append(f"| {name} | {' | '.join(str(found[c]) for c in columns)} |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
