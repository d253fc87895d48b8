"""Decode layers on one Hopper GPU: norms and RoPE in the decode kernel beside norms and RoPE apart.

    python scripts/gpu_fused.py --out fused.json

From the projected row to the gated output, 16 blocks chained in one program as in a model's step; a
small product makes the next block's row. `apart` is the layer's own text and `gpu_decode`, `fused`
is `gpu_decode_fused`. Times are in microseconds a block: `gpu` all its kernels (medians),
`lightning` of them the decode kernel, `wall` on the host's clock; the floor is the bytes decode
moves over the copy bandwidth. Results are compared before anything is timed; errors beyond those
of bfloat16 end the run with 1. `--dry` walks through it on a CPU with tiny shapes and interpreted
kernels; its times mean nothing. Writes FILE and, beside it, the table with the suffix .md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import bailing_jax  # noqa: E402, F401  isort: skip  before jax: it sets a flag of XLA's

import gpu_check  # noqa: E402
import gpu_check_times as times  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from lightning_shapes import Decode  # noqa: E402

from bailing_jax.config import Rope  # noqa: E402
from bailing_jax.layers.rope import half_split_angles, rotate_half_split  # noqa: E402
from pallas_kernels import compat  # noqa: E402
from pallas_kernels.lightning_attention import gpu_decode, gpu_decode_fused  # noqa: E402

EPS, GROUPS = 1e-6, 4
# What ties blocks together: so wide a part of the output makes the next row.
TIE = 256
# Small, so that outputs as the next values do not grow.
SCALE = 1e-3
# Errors beyond this are wrong results: bfloat16 neighbours.
MOST_ERROR = 1.2e-2


class Sizes(NamedTuple):
    """One measured shape: heads, their width, decode rows."""

    heads: int
    dim: int
    batch: int

    @property
    def name(self) -> str:
        return f"B{self.batch} H{self.heads}"


class Program(NamedTuple):
    """A row of the table: `step(state, slots, *arrays)` donates the state, and runs `per_call`."""

    form: str
    sizes: Sizes
    step: Callable[..., Any]
    arrays: tuple[jax.Array, ...]
    per_call: int


SHAPES = [Sizes(16, 128, b) for b in (1, 8, 32, 128, 256)] + [Sizes(64, 128, 128)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="norms and RoPE in the decode kernel, measured")
    parser.add_argument("--out", type=Path, default=Path("gpu_fused.json"), help="JSON report")
    parser.add_argument("--calls", type=int, default=8, help="measured programs of each row")
    parser.add_argument("--dry", action="store_true", help="tiny and interpreted on a CPU")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if not args.dry and compat.why_no_mosaic_gpu():
        print(f"no kernels here: {compat.why_no_mosaic_gpu()}", file=sys.stderr)
        return 1
    shapes, chain = SHAPES, 16
    if args.dry:
        shapes, chain = [Sizes(4, 64, 2)], 1
        args.calls, times.ROTATED_BYTES = 1, 1_000_000
    with compat.interpret_mosaic_gpu() if args.dry else contextlib.nullcontext():
        report = measured(shapes, chain, args)
    print(as_markdown(report))
    return 0 if all(worst <= MOST_ERROR for worst in report["errors"].values()) else 1


def measured(shapes: list[Sizes], chain: int, args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"about": gpu_check.about(args.dry), "errors": errors(args.dry)}
    report["copy_tb_s"] = times.ceilings(args.calls, dry=args.dry)["copy_tb_s"]
    report["rows"] = []
    programs = [program for sizes in shapes for program in forms(sizes, chain)]
    for program, compiled in in_order(programs, args.dry):
        heads, dim, batch = program.sizes
        moved = Decode("", batch, heads, head_dim=dim).bytes_moved()
        row: dict[str, Any] = {"form": program.form, "shape": program.sizes.name}
        row |= {"floor_us": moved / report["copy_tb_s"] / 1e6}
        row |= profile(program, compiled(), args.calls)
        report["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        write(report, args.out)
    return report


def in_order(
    programs: list[Program], dry: bool
) -> Iterator[tuple[Program, Callable[[], Callable[..., Any]]]]:
    """(program, function that returns it compiled), all compiled by threads before the first.

    Nothing else keeps the host busy while they are measured.
    """

    def compiled(program: Program) -> Callable[..., Any]:
        step = jax.jit(program.step, donate_argnums=0)
        return step.lower(*inputs(program, jax.ShapeDtypeStruct), *program.arrays).compile()

    if dry:
        yield from ((p, functools.partial(compiled, p)) for p in programs)
        return
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(compiled, program) for program in programs]
        concurrent.futures.wait(futures)
        yield from ((p, f.result) for p, f in zip(programs, futures, strict=True))


def inputs(program: Program, of: Callable[..., Any]) -> tuple[Any, Any]:
    """The pool and the slots of every block: `of` is how an array is made of shape and dtype."""
    heads, dim, batch = program.sizes
    num_slots = 1 + max(2 * batch, -(-times.ROTATED_BYTES // (heads * dim * dim * 4)))
    pool = of((num_slots, heads, dim, dim), jnp.float32)
    return pool, of((program.per_call, batch), jnp.int32)


def profile(program: Program, compiled: Callable[..., Any], calls: int) -> dict[str, Any]:
    """Times of a block."""
    state, slots = inputs(program, jnp.zeros)
    used, num_slots, rng = slots.shape[1], state.shape[0], np.random.default_rng(0)
    # A program's blocks go through the slots without coming back before the pool is through.
    orders = [1 + rng.permutation(num_slots - 1) for _ in range(3)]
    tables = [
        jnp.asarray([np.roll(o, -i * used)[:used] for i in range(program.per_call)], jnp.int32)
        for o in orders
    ]

    def run(number: int) -> None:
        nonlocal state
        for i in range(number):
            state, _ = compiled(state, tables[i % len(tables)], *program.arrays)
        jax.block_until_ready(state)

    run(min(3, calls))
    start = time.perf_counter()
    run(calls)
    per = program.per_call
    found: dict[str, Any] = {"wall_us": 1e6 * (time.perf_counter() - start) / calls / per}
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run(calls)
        by_name = times.kernel_times(Path(folder))
    kernels = {
        name: {"median_us": round(statistics.median(x), 2), "a_block": len(x) / calls / per}
        for name, x in by_name.items()
    }
    sums = {name: kernel["median_us"] * kernel["a_block"] for name, kernel in kernels.items()}
    if sums:
        found["gpu_us"] = sum(sums.values())
        found["lightning_us"] = sum(us for name, us in sums.items() if "lightning" in name)
        found["kernels_a_block"] = sum(kernel["a_block"] for kernel in kernels.values())
    return found | {"kernels": kernels}


def log_decay(heads: int) -> jax.Array:
    return -jnp.asarray(np.geomspace(0.9, 0.001, heads), jnp.float32)


def forms(sizes: Sizes, chain: int) -> list[Program]:
    """The layer from its projected row to its gated output: as it is, and fused."""
    heads, dim, batch = sizes
    width, tie = heads * dim, min(TIE, heads * dim)
    x, gate, weight, q_norm, k_norm, g_norm = times.random_arrays(
        1, (batch, tie), (batch, width), (tie, 3 * width), (dim,), (dim,), (width,)
    )
    positions = jnp.arange(batch, dtype=jnp.int32) * 97 % 30_000
    arrays = (x, gate, weight / tie**0.5, q_norm, k_norm, g_norm, positions)

    def step(block, state, slots, x, gate, weight, q_norm, k_norm, g_norm, positions):
        # Once a step, for all blocks.
        angles = half_split_angles(positions, half_rope(dim))
        gated = x
        for i in range(chain):
            qkv = compat.einsum("td,dw->tw", gated[:, :tie], weight).astype(x.dtype)
            o, state = block(
                qkv.reshape(batch, 3, heads, dim), state, slots[i], (q_norm, k_norm), positions,
                angles, SCALE,
            )  # fmt: skip
            o = normed(o.reshape(batch, width), g_norm, GROUPS)
            gated = o * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x.dtype)
        return state, gated

    return [
        Program(form, sizes, functools.partial(step, block), arrays, chain)
        for form, block in (("apart", decode_apart), ("fused", decode_fused))
    ]


@functools.partial(jax.jit, static_argnames="scale")
def _decode(q, k, v, decay, state, slots, scale):
    return gpu_decode.lightning_decode(q, k, v, decay, state, slots=slots, scale=scale)


@functools.partial(jax.jit, static_argnames="scale")
def _decode_fused(qkv, decay, state, slots, norms, angles, scale):
    return gpu_decode_fused.lightning_decode_fused(
        qkv, decay, state, slots=slots, scale=scale, norms=norms, eps=EPS, angles=angles
    )


def decode_apart(qkv, state, slots, norms, positions, angles, scale):
    """As `bailing_jax.layers.lightning_attention`."""
    del angles
    q, k, v = (qkv[:, i] for i in range(3))
    rope = half_rope(qkv.shape[-1])
    q, k = (normed(x, weight) for x, weight in zip((q, k), norms, strict=True))
    q, k = (rotate_half_split(x, positions, rope, x.dtype) for x in (q, k))
    return _decode(q, k, v, log_decay(qkv.shape[2]), state, slots, scale)


def decode_fused(qkv, state, slots, norms, positions, angles, scale):
    del positions
    return _decode_fused(qkv, log_decay(qkv.shape[2]), state, slots, norms, angles, scale)


def half_rope(dim: int) -> Rope:
    return Rope(theta=600_000.0, num_dims=dim // 2, yarn=None)


def normed(x: jax.Array, weight: jax.Array, groups: int = 1) -> jax.Array:
    """As `bailing_jax.layers.norms`."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return weight * (wide * jax.lax.rsqrt(mean + EPS)).reshape(x.shape).astype(x.dtype)


def errors(dry: bool) -> dict[str, float]:
    """The worst error of fused outputs and states against those apart: of entry + rms."""
    heads, dim, batch = Sizes(1, 64, 3) if dry else Sizes(16, 128, 37)
    slots = np.random.default_rng(1).permutation(batch + 3)[:batch] + 1
    slots[1] = 0
    (state,) = times.random_arrays(3, (batch + 4, heads, dim, dim), dtype=jnp.float32)
    qkv, q_norm, k_norm = times.random_arrays(4, (batch, 3, heads, dim), (dim,), (dim,))
    positions = jnp.arange(batch, dtype=jnp.int32) * 97
    args = qkv, state, jnp.asarray(slots, jnp.int32), (q_norm, k_norm), positions

    def both(block):
        run = lambda *a: block(*a, half_split_angles(a[4], half_rope(dim)), dim**-0.5)  # noqa: E731
        return jax.jit(run)(*args)

    names = ("decode o", "decode state")
    found = zip(names, both(decode_fused), both(decode_apart), strict=True)
    return {name: worst(got, want) for name, got, want in found}


def worst(got: jax.Array, want: jax.Array) -> float:
    wide, other = (np.asarray(x).astype(np.float64) for x in (want, got))
    ratio = np.abs(other - wide) / (np.abs(wide) + np.sqrt(np.mean(wide**2)))
    return float(ratio.max()) if np.isfinite(ratio).all() else float("inf")


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")


def as_markdown(report: dict[str, Any]) -> str:
    """All rows, with what they were measured on."""
    about = report["about"]
    columns = ("gpu_us", "lightning_us", "wall_us", "kernels_a_block", "floor_us")
    errors = ", ".join(f"{name} {value:.1e}" for name, value in report["errors"].items())
    lines = [
        f"{about['device']}, jax {about['jax']}, {about['date']}, commit {about['commit']}"
        + (", DRY: these times mean nothing" if about["dry"] else ""),
        "",
        f"Copy {report['copy_tb_s']:.2f} TB/s; worst differences of fused and apart: {errors}. "
        "Head size 128, bfloat16 rows, float32 state.",
        "",
        f"| shape | form | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in report["rows"]:
        cells = [f"{row[c]:.1f}" if c in row else "" for c in columns]
        lines.append(f"| {row['shape']} | {row['form']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
