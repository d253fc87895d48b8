"""The lightning kernels on one NVIDIA Hopper GPU: are they right, and how fast are they?

    python scripts/gpu_check.py --part 1     every test marked gpu of these kernels
    python scripts/gpu_check.py --part 2     the table: GPU times beside the floor and a peer
    python scripts/gpu_check.py --part 3     what the tuning parameters do

No part takes more than nine minutes. Parts 2 and 3 write `lightning_gpu.json` and `.md` (`_tuning`
for part 3) to --out, docs/benchmarks by default, part 2 a plot too. The floor of a shape is the
bytes it has to move over the copy bandwidth measured in the same run. The peer is
flash-linear-attention, run in a process of its own on the same GPU if `fla` is installed. `--dry`
walks through it all on a CPU with tiny shapes and interpreted kernels; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
# The peer needs room beside this process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import bailing_jax  # noqa: E402, F401  isort: skip  before jax: it sets a flag of XLA's

import gpu_check_plot  # noqa: E402
import gpu_check_times as times  # noqa: E402
import jax  # noqa: E402
from lightning_shapes import DECODES, PREFILLS, UNTUNED, Decode, Prefill  # noqa: E402

from pallas_kernels import compat  # noqa: E402

PEER_SECONDS = 330
# (shape, tuning) of part 3.
BY_NAME = {shape.name: shape for shape in (*PREFILLS, *UNTUNED, *DECODES)}
TUNINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("H16 T8192 x1", {"blocks": n}) for n in (66, 132, 264, 1)),
    ("H16 T8192 x1", {"groups": 1, "blocks": 132}),
    *(("H16 T32768 x1", {"blocks": n}) for n in (132, 264)),
    *(("H64 T8192 x1", {"blocks": n}) for n in (132, 264)),
    ("H64 T8192 x1", {"groups": 1, "blocks": 132}),
    ("H16 T8192 x16", {"groups": 1, "blocks": 132}),
    ("H16 T8192 x16", {"groups": 2, "blocks": 1}),
    ("H64 T8192 x16", {"groups": 1, "blocks": 132}),
    *(("H16 T2048 x1 float32", {"blocks": n}) for n in (1, 132, 264, 528, 1056)),
    *(("H16 B1", {"entries": n}) for n in (16, 32, 64)),
    *(("H16 B32", {"entries": n}) for n in (32, 64, 128)),
    *(("H16 B256", {"entries": n}) for n in (32, 64, 128)),
    *(("H16 B256, bfloat16 state", {"entries": n}) for n in (32, 64, 128)),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the lightning kernels on one Hopper GPU")
    add = parser.add_argument
    add("--part", type=int, choices=(1, 2, 3), required=True)
    add("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    add("--calls", type=int, default=30, help="measured calls of each shape")
    add("--only", default="", help="shapes whose name contains this")
    add("--no-peer", action="store_true", help="leave the peer out")
    add("--dry", action="store_true", help="tiny shapes, interpreted on a CPU: does it run?")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.part == 1:
        return run_tests(args.dry)
    if not args.dry and compat.why_no_mosaic_gpu():
        print(f"no kernels here: {compat.why_no_mosaic_gpu()}", file=sys.stderr)
        return 1
    machine = compat.interpret_mosaic_gpu() if args.dry else contextlib.nullcontext()
    with machine:
        report = make_report(args)
    write(report, args)
    if args.part == 2 and not args.no_peer:
        add_peer(report, args)
        write(report, args)
    if args.part == 2:
        gpu_check_plot.draw(report, args.out / "lightning_gpu.png")
    print(as_markdown(report))
    return 0


def write(report: dict[str, Any], args: argparse.Namespace) -> None:
    """The report as JSON and as a table."""
    name = "lightning_gpu" if args.part == 2 else "lightning_gpu_tuning"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{name}.md").write_text(as_markdown(report), encoding="utf-8")


def run_tests(dry: bool) -> int:
    """pytest on the kernels' test files; dry: only what would run."""
    files = sorted(str(p) for p in ROOT.glob("tests/*/test_lightning_gpu*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=8", *files]
    # A kernel that waits for ever must not cost the rest.
    command += ["--timeout=100", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist") and not dry:
        # Compilation takes most of the time, on one core of the host each.
        command += ["-n", "4"]
    return subprocess.run(
        command + ["--collect-only"] * dry, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ).returncode


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    report: dict[str, Any] = {"about": about(args.dry)}
    calls = 1 if args.dry else args.calls
    report["ceilings"] = times.ceilings(calls, dry=args.dry)
    report["rows"] = []
    if args.part == 2:
        work = [(shape.name, {}) for shape in (*PREFILLS, *UNTUNED, *DECODES)]
        # Where the kernel works token by token: is it worth having?
        wide = [s.name for s in UNTUNED if s.dtype == "float32"]
        work += [(name, {"implementation": "xla"}) for name in wide]
    else:
        work = list(TUNINGS)
    if args.dry:
        work = [work[0], work[-1]]
    for name, tuning in work:
        if args.only in name:
            row = measured(BY_NAME[name], tuning, calls, report["ceilings"], args.dry)
            report["rows"].append(row)
            write(report, args)
            print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), file=sys.stderr)
            sys.stderr.flush()
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def measured(
    shape: Prefill | Decode, tuning: dict[str, Any], calls: int, ceilings: dict, dry: bool
) -> dict[str, Any]:
    """One row: times, the floor, and how near they are."""
    if dry:
        tiny = {"lengths": (70, 9)} if isinstance(shape, Prefill) else {"batch": 2}
        shape = dataclasses.replace(shape, heads=1, **tiny)
        times.ROTATED_BYTES = 1_000_000
        times.DECODES_A_STEP = 2
    run = times.time_prefill if isinstance(shape, Prefill) else times.time_decode
    kind = "prefill" if isinstance(shape, Prefill) else "decode"
    row: dict[str, Any] = {"kind": kind, "shape": shape.name, **tuning}
    row |= {"must_us": shape.must, "aim_us": shape.aim}
    try:
        row |= run(shape, calls, **tuning)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:500]
        return row
    if not (isinstance(shape, Prefill) and shape.backward):
        row["floor_us"] = shape.bytes_moved() / ceilings["copy_tb_s"] / 1e6
        row["percent_of_floor"] = 100 * row["floor_us"] / times.best(row)
    return row


def add_peer(report: dict[str, Any], args: argparse.Namespace) -> None:
    """The peer's times to the rows, or why there are none."""
    if args.dry or importlib.util.find_spec("fla") is None:
        report["peer"] = "fla is not installed"
        return
    jax.clear_caches()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peer.json"
        command = [
            sys.executable,
            str(ROOT / "scripts/gpu_check_peer.py"),
            str(args.calls),
            str(path),
        ]
        try:
            subprocess.run(command, timeout=PEER_SECONDS, check=True)
        # What it has written so far counts. The errors' own texts hold this machine's paths.
        except subprocess.TimeoutExpired:
            report["peer_stopped"] = f"after {PEER_SECONDS} s"
        except subprocess.CalledProcessError as error:
            report["peer_stopped"] = f"exit code {error.returncode}"
        found = json.loads(path.read_text()) if path.exists() else {}
    report["peer"] = "flash-linear-attention" if found else "failed"
    for row in report["rows"]:
        row |= {f"peer_{k}": v for k, v in found.get(row["shape"], {}).items()}


def about(dry: bool) -> dict[str, Any]:
    """What was measured, on what."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "dry": dry,
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The table, with the run's ceilings above it."""
    about, ceilings = report["about"], report["ceilings"]
    lines = [
        f"{about['device']}, jax {about['jax']}, {about['date']}, commit {about['commit']}"
        + (", DRY: these times mean nothing" if about["dry"] else ""),
        "",
        f"Copy {ceilings['copy_tb_s']:.2f} TB/s, bf16 matmul {ceilings['matmul_tflop_s']:.0f} "
        f"TFLOP/s; peer: {report.get('peer', 'none')}. Times in us on the GPU.",
        "",
        "| shape | GPU | of floor | floor | peer | peer wall | wall | host | must | aim |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        extra = [
            f"{k}={row[k]}" for k in ("groups", "blocks", "entries", "implementation") if k in row
        ]
        name = " ".join([row["kind"], row["shape"], *extra])
        if "error" in row:
            lines.append(f"| {name} | {row['error'][:80]} |" + " |" * 8)
            continue
        percent = f"{row['percent_of_floor']:.0f} %" if "percent_of_floor" in row else ""
        numbers = [number(row.get(k)) for k in ("floor_us", "peer_gpu_us", "peer_wall_us")]
        rest = [number(row.get(k)) for k in ("wall_us", "host_us", "must_us", "aim_us")]
        cells = [name, number(row.get("gpu_us")), percent, *numbers, *rest]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
