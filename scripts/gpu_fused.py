"""Two fusions of the lightning kernels on one Hopper GPU, side by side with what they replace.

    python scripts/gpu_fused.py --out fused.json

Decode: from the projected row to the gated output, 16 blocks chained in one program as in a model's
step; a small product makes the next block's row. Mixed steps: decode and prefill launched one after
the other on rows already apart, against one launch. Times are in microseconds: `gpu` the sum of a
block's kernels (medians), `lightning` of them these kernels, `span` from a program's first start to
its last end over its blocks, `wall` on the host's clock (of decode alone with nothing compiling
beside it). `two` is prefill alone and decode alone, `least` the larger of the uncut prefill alone
and the floor, bytes over the copy bandwidth. Results are compared before anything is timed. `--dry`
walks through it on a CPU with tiny shapes and interpreted kernels; its times mean nothing.
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
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import bailing_jax  # noqa: E402, F401  isort: skip  before jax: it sets a flag of XLA's

import gpu_check_times as times  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from lightning_shapes import Decode, Prefill, even  # noqa: E402

from bailing_jax.config import Rope  # noqa: E402
from bailing_jax.layers.rope import inverse_frequencies, rotate_half_split  # noqa: E402
from pallas_kernels import compat  # noqa: E402
from pallas_kernels.lightning_attention import (  # noqa: E402
    gpu_decode,
    gpu_decode_fused,
    gpu_mixed,
    gpu_prefill,
)
from pallas_kernels.lightning_attention.gpu_prefill import Variant  # noqa: E402
from pallas_kernels.lightning_attention.gpu_work import Segments, cut  # noqa: E402

EPS, GROUPS = 1e-6, 4
# What ties blocks together: so wide a part of the output makes the next row.
TIE = 256
# Small, so that outputs as the next values do not grow.
SCALE = 1e-3
# Errors beyond these are wrong results: bfloat16 neighbours, and products of bfloat16.
MOST_ERROR = 2.5e-2
ALL = 1 << 20
MULTIPROCESSORS = 132


class Sizes(NamedTuple):
    """One measured shape: heads, their width, decode rows, prefill rows and their segments."""

    heads: int
    dim: int
    batch: int
    rows: int = 0
    segments: int = 0

    @property
    def name(self) -> str:
        prefill = [f"T{self.rows} x{self.segments}"] if self.rows else []
        decode = [f"B{self.batch}"] if self.batch else []
        return " ".join([*prefill, *decode, f"H{self.heads}"])


class Program(NamedTuple):
    """A row of the table: `step(state, slots, *arrays)` donates the state, and runs `per_call`."""

    kind: str
    form: str
    sizes: Sizes
    step: Callable[..., Any]
    arrays: tuple[jax.Array, ...]
    per_call: int


DECODES = [Sizes(16, 128, b) for b in (1, 8, 32, 128, 256)] + [Sizes(64, 128, 128)]
MIXED = [
    Sizes(16, 128, b, t, p)
    for t, p in ((1024, 4), (1024, 1), (1024, 32), (256, 4), (512, 1))
    for b in (128, 32, 256)
] + [Sizes(64, 128, 128, 1024, 4)]
# Other ways to share out the blocks, for 128 decode rows of 16 heads.
SHARINGS = {1: [{"turns": 1}], 4: [{"first": ALL}, {"turns": 8}], 32: [{"first": ALL}]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fused lightning kernels on one Hopper GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_fused.json"), help="JSON report")
    parser.add_argument("--calls", type=int, default=8, help="measured programs of each row")
    parser.add_argument("--seconds", type=float, default=140, help="start no row after these")
    parser.add_argument("--dry", action="store_true", help="tiny and interpreted on a CPU")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if not args.dry and compat.why_no_mosaic_gpu():
        print(f"no kernels here: {compat.why_no_mosaic_gpu()}", file=sys.stderr)
        return 1
    decodes, mixed = DECODES, MIXED
    if args.dry:
        args.calls, args.seconds, times.ROTATED_BYTES = 1, 1e9, 1_000_000
        decodes, mixed = [Sizes(4, 64, 2)], [Sizes(1, 64, 2, 72, 4)]
    with compat.interpret_mosaic_gpu() if args.dry else contextlib.nullcontext():
        report = measured(decodes, mixed, args)
    write(report, args.out)
    print(as_table(report))
    return 0 if all(worst <= MOST_ERROR for worst in report["errors"].values()) else 1


def measured(decodes: list[Sizes], mixed: list[Sizes], args: argparse.Namespace) -> dict[str, Any]:
    start, chain = time.perf_counter(), 1 if args.dry else 16
    device = jax.devices()[0].device_kind
    report: dict[str, Any] = {"device": device, "jax": jax.__version__, "dry": args.dry}
    report["errors"] = errors(args.dry)
    print(json.dumps(report), flush=True)
    report["copy_tb_s"] = times.ceilings(args.calls, dry=args.dry)["copy_tb_s"]
    report["rows"], report["left_out"] = [], []
    shorter = max(1, chain // 2)
    for wait, programs in (
        (True, [p for sizes in decodes for p in decode_programs(sizes, chain)]),
        (False, [
            *alone_programs(mixed, shorter),
            *(p for sizes in mixed for p in mixed_programs(sizes, shorter)),
        ]),
    ):  # fmt: skip
        for program, compiled in in_order(programs, wait, args.dry):
            name = f"{program.sizes.name} {program.kind} {program.form}"
            if time.perf_counter() - start > args.seconds:
                report["left_out"].append(name)
                continue
            row: dict[str, Any] = {
                "kind": program.kind, "form": program.form, "shape": program.sizes.name,
                "floor_us": bytes_moved(program.sizes) / report["copy_tb_s"] / 1e6,
            }  # fmt: skip
            try:
                row |= profile(program, compiled(), args.calls)
            except Exception as error:  # one row's failure must not cost the others
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            write(report, args.out)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def in_order(programs: list[Program], wait: bool, dry: bool):
    """(program, function that returns it compiled), compiled by threads ahead.

    `wait` for all of them, so that nothing else keeps the host busy while they are measured.
    """

    def compiled(program: Program):
        step = jax.jit(program.step, donate_argnums=0)
        return step.lower(*inputs(program, jax.ShapeDtypeStruct), *program.arrays).compile()

    if dry:
        yield from ((p, functools.partial(compiled, p)) for p in programs)
        return
    pool = concurrent.futures.ThreadPoolExecutor(8)
    try:
        futures = [pool.submit(compiled, program) for program in programs]
        if wait:
            concurrent.futures.wait(futures, timeout=60)
        yield from ((p, f.result) for p, f in zip(programs, futures, strict=True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def inputs(program: Program, of: Callable[..., Any]) -> tuple[Any, Any]:
    """The pool and the slots of every block: `of` is how an array is made of shape and dtype."""
    heads, dim, batch, _, segments = program.sizes
    state_bytes = heads * dim * dim * 4
    used = batch + segments
    num_slots = 1 + max(2 * used, -(-times.ROTATED_BYTES // state_bytes))
    pool = of((num_slots, heads, dim, dim), jnp.float32)
    return pool, of((program.per_call, used), jnp.int32)


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
        events = gpu_events(Path(folder))
    return found | summary(events, calls, per)


def gpu_events(folder: Path) -> list[tuple[float, float, str]]:
    """(start, end, name) of everything on the GPU's streams, in order; microseconds."""
    (path,) = folder.rglob("*.xplane.pb")
    return sorted(
        (event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3, event.name)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )


def summary(events: list[tuple[float, float, str]], calls: int, per_call: int) -> dict[str, Any]:
    """Sums by kernel, and spans of programs where their events can be told apart."""
    if not events:
        return {}
    by_name: dict[str, list[float]] = defaultdict(list)
    for start, end, name in events:
        by_name[name].append(end - start)
    kernels = {
        name: {"median_us": round(statistics.median(x), 2), "a_block": len(x) / calls / per_call}
        for name, x in by_name.items()
    }
    found: dict[str, Any] = {
        "gpu_us": sum(k["median_us"] * k["a_block"] for k in kernels.values()),
        "lightning_us": sum(
            k["median_us"] * k["a_block"] for name, k in kernels.items() if "lightning" in name
        ),
        "kernels_a_block": len(events) / calls / per_call,
        "kernels": kernels,
    }
    each, rest = divmod(len(events), calls)
    if not rest:
        programs = [events[i * each : (i + 1) * each] for i in range(calls)]
        spans = [max(end for _, end, _ in p) - p[0][0] for p in programs]
        found["span_us"] = statistics.median(spans) / per_call
    return found


def bytes_moved(sizes: Sizes) -> int:
    moved = Decode("", sizes.batch, sizes.heads, head_dim=sizes.dim).bytes_moved()
    if sizes.rows:
        lengths = even(sizes.rows, sizes.segments)
        moved += Prefill("", sizes.heads, lengths, head_dim=sizes.dim).bytes_moved()
    return moved


def log_decay(heads: int) -> jax.Array:
    return -jnp.asarray(np.geomspace(0.9, 0.001, heads), jnp.float32)


def decode_programs(sizes: Sizes, chain: int) -> list[Program]:
    """The layer from its projected row to its gated output: as it is, and fused."""
    heads, dim, batch, *_ = sizes
    width, tie = heads * dim, min(TIE, heads * dim)
    x, gate, weight, q_norm, k_norm, g_norm = times.random_arrays(
        1, (batch, tie), (batch, width), (tie, 3 * width), (dim,), (dim,), (width,)
    )
    positions = jnp.arange(batch, dtype=jnp.int32) * 97 % 30_000
    arrays = (x, gate, weight / tie**0.5, q_norm, k_norm, g_norm, positions)

    def step(block, state, slots, x, gate, weight, q_norm, k_norm, g_norm, positions):
        # Once a step, for all blocks.
        angles = cos_sin(positions, dim)
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
        Program("decode", form, sizes, functools.partial(step, block), arrays, chain)
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
    rope = Rope(theta=600_000.0, num_dims=qkv.shape[-1] // 2, yarn=None)
    q, k = (normed(x, weight) for x, weight in zip((q, k), norms, strict=True))
    q, k = (rotate_half_split(x, positions, rope, x.dtype) for x in (q, k))
    return _decode(q, k, v, log_decay(qkv.shape[2]), state, slots, scale)


def decode_fused(qkv, state, slots, norms, positions, angles, scale):
    del positions
    return _decode_fused(qkv, log_decay(qkv.shape[2]), state, slots, norms, angles, scale)


def cos_sin(positions: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    rope = Rope(theta=600_000.0, num_dims=dim // 2, yarn=None)
    radians = positions.astype(jnp.float32)[:, None] * inverse_frequencies(rope)
    return jnp.cos(radians), jnp.sin(radians)


def normed(x: jax.Array, weight: jax.Array, groups: int = 1) -> jax.Array:
    """As `bailing_jax.layers.norms`."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return weight * (wide * jax.lax.rsqrt(mean + EPS)).reshape(x.shape).astype(x.dtype)


def alone_programs(mixed: list[Sizes], chain: int) -> list[Program]:
    """What mixed steps consist of: each prefill, as it is and never cut, and each decode."""
    programs = []
    for heads, dim, rows, segments in dict.fromkeys((s[0], s[1], s[3], s[4]) for s in mixed):
        sizes = Sizes(heads, dim, 0, rows, segments)
        arrays = tuple(times.random_arrays(2, *[(rows, heads, dim)] * 3))
        blocks = {"prefill": MULTIPROCESSORS}
        if cut(rows, segments, heads * dim // 64, 128, MULTIPROCESSORS).span:
            blocks["prefill uncut"] = 1
        for form, number in blocks.items():
            step = functools.partial(prefill_chain, chain, number, segment_places(sizes))
            programs.append(Program("alone", form, sizes, step, arrays, chain))
    for heads, dim, batch in dict.fromkeys(s[:3] for s in mixed):
        arrays = tuple(times.random_arrays(3, *[(batch, heads, dim)] * 3))
        step = functools.partial(decode_chain, chain)
        programs.append(Program("alone", "decode", Sizes(heads, dim, batch), step, arrays, chain))
    return programs


def prefill_chain(chain: int, blocks: int, places: Places, state, slots, q, k, v):
    for i in range(chain):
        v, state = _prefill(q, k, v, state, slots[i], places, SCALE, blocks)
    return state, v


def decode_chain(chain: int, state, slots, q, k, v):
    for i in range(chain):
        v, state = _decode(q, k, v, log_decay(q.shape[1]), state, slots[i], SCALE)
    return state, v


def mixed_programs(sizes: Sizes, chain: int) -> list[Program]:
    """A mixed step's recurrence in one launch, and for some shapes in two."""
    heads, dim, batch, rows, segments = sizes
    q, k, v = times.random_arrays(2, *[(batch + rows, heads, dim)] * 3)
    places = segment_places(sizes)

    def two(state, slots, q_d, q_p, k_d, k_p, v_d, v_p):
        # Outputs as the next values tie the steps together without another kernel.
        for i in range(chain):
            v_d, v_p, state = two_launches(
                (q_d, k_d, v_d), (q_p, k_p, v_p), state, slots[i], places, SCALE
            )
        return state, (v_d, v_p)

    def one(sharing, state, slots, q, k, v):
        for i in range(chain):
            v, state = one_launch(q, k, v, state, slots[i], places, SCALE, **dict(sharing))
        return state, v

    others = SHARINGS[segments] if rows == 1024 and (batch, heads) == (128, 16) else []
    programs = []
    for sharing in ({}, *others):
        form = " ".join(["one", *(f"{k}={v}" for k, v in sharing.items())])
        step = functools.partial(one, tuple(sharing.items()))
        programs.append(Program("mixed", form, sizes, step, (q, k, v), chain))
    if others:
        apart = tuple(part for x in (q, k, v) for part in (x[:batch], x[batch:]))
        programs.append(Program("mixed", "two", sizes, two, apart, chain))
    return programs


class Places(NamedTuple):
    """Where segments lie and which start afresh; static tables."""

    cu_seqlens: jax.Array
    is_fresh: jax.Array


def segment_places(sizes: Sizes) -> Places:
    lengths = even(sizes.rows, sizes.segments)
    # Half go on from a state.
    return Places(
        jnp.asarray(np.cumsum([0, *lengths]), jnp.int32), jnp.arange(sizes.segments) % 2 == 1
    )


@functools.partial(jax.jit, static_argnames="scale")
def two_launches(decode, prefill, state, slots, places: Places, scale):
    batch, decay = decode[0].shape[0], log_decay(decode[0].shape[1])
    o_d, state = gpu_decode.lightning_decode(
        *decode, decay, state, slots=slots[:batch], scale=scale
    )
    o_p, state = gpu_prefill.run(
        *prefill, decay, state, Segments(slots[batch:], *places), Variant(scale)
    )
    return o_d, o_p, state


@functools.partial(jax.jit, static_argnames=("scale", "turns", "first"))
def one_launch(q, k, v, state, slots, places: Places, scale, **sharing):
    batch = slots.shape[0] - places.is_fresh.shape[0]
    return gpu_mixed.lightning_mixed(
        q, k, v, log_decay(q.shape[1]), state, decode_slots=slots[:batch], slots=slots[batch:],
        cu_seqlens=places.cu_seqlens, is_fresh=places.is_fresh, scale=scale, **sharing,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("scale", "blocks"))
def _prefill(q, k, v, state, slots, places: Places, scale, blocks):
    segments = Segments(slots, *places)
    decay = log_decay(q.shape[1])
    return gpu_prefill.run(q, k, v, decay, state, segments, Variant(scale, blocks=blocks))


def errors(dry: bool) -> dict[str, float]:
    """The worst error of fused outputs and states against those apart: of entry + rms."""
    sizes = Sizes(1, 64, 3, 72, 4) if dry else Sizes(16, 128, 37, 1024, 4)
    heads, dim, batch, rows, segments = sizes
    num_slots = batch + segments + 3
    slots = np.random.default_rng(1).permutation(num_slots - 1)[: batch + segments] + 1
    slots[1] = 0
    slots = jnp.asarray(slots, jnp.int32)
    (state,) = times.random_arrays(3, (num_slots, heads, dim, dim), dtype=jnp.float32)
    qkv, q_norm, k_norm = times.random_arrays(4, (batch, 3, heads, dim), (dim,), (dim,))
    positions = jnp.arange(batch, dtype=jnp.int32) * 97
    args = qkv, state, slots[:batch], (q_norm, k_norm), positions
    scale = dim**-0.5

    def both(block):
        return jax.jit(lambda *a: block(*a, cos_sin(a[4], dim), scale))(*args)

    found = {}
    for name, got, want in zip(
        ("decode o", "decode state"), both(decode_fused), both(decode_apart), strict=True
    ):
        found[name] = worst(got, want)
    q, k, v = times.random_arrays(5, *[(batch + rows, heads, dim)] * 3)
    places = segment_places(sizes)
    apart = [tuple(x[part] for x in (q, k, v)) for part in (slice(batch), slice(batch, None))]
    o_d, o_p, want = two_launches(*apart, state, slots, places, scale)
    for sharing in ({}, {"turns": 3, "first": 7}):
        o, after = one_launch(q, k, v, state, slots, places, scale, **sharing)
        name = " ".join(["mixed", *map(str, sharing.values())])
        found |= {
            f"{name} decode": worst(o[:batch], o_d), f"{name} prefill": worst(o[batch:], o_p),
            f"{name} state": worst(after, want),
        }  # fmt: skip
    return found


def worst(got: jax.Array, want: jax.Array) -> float:
    wide, other = (np.asarray(x).astype(np.float64) for x in (want, got))
    ratio = np.abs(other - wide) / (np.abs(wide) + np.sqrt(np.mean(wide**2)))
    return float(ratio.max()) if np.isfinite(ratio).all() else float("inf")


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def as_table(report: dict[str, Any]) -> str:
    """All rows; for mixed steps what two launches take, and what no form can be faster than."""
    alone = {(row["shape"], row["form"]): row.get("gpu_us", 0.0) for row in report["rows"]}
    columns = ("gpu_us", "lightning_us", "span_us", "wall_us", "kernels_a_block", "floor_us")
    lines = [
        f"{report['device']}, jax {report['jax']}, copy {report['copy_tb_s']:.2f} TB/s, errors "
        + json.dumps({k: float(f"{v:.2g}") for k, v in report["errors"].items()}),
        f"| shape | form | {' | '.join(columns)} | two_us | least_us |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for row in report["rows"]:
        cells = [f"{row[c]:.1f}" if c in row else "" for c in columns]
        if row["kind"] == "mixed":
            time_p, segments, batch, heads = row["shape"].split()
            prefill = f"{time_p} {segments} {heads}"
            cut_us = alone.get((prefill, "prefill"), 0.0)
            uncut_us = alone.get((prefill, "prefill uncut"), cut_us)
            two_us = cut_us + alone.get((f"{batch} {heads}", "decode"), 0.0)
            cells += [f"{two_us:.1f}", f"{max(row['floor_us'], uncut_us):.1f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {row['shape']} | {row['form']} | {' | '.join(cells)} |")
        lines[-1] += f" {row['error'][:80]}" if "error" in row else ""
    if report["left_out"]:
        lines.append(f"left out after the time was up: {', '.join(report['left_out'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
