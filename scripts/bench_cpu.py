"""Compare this engine with mlx-lm on the CPU: one random checkpoint, one run, turn by turn.

`python scripts/bench_cpu.py` makes a LinearV2 checkpoint (make_random_checkpoint.py), runs it
through each engine in fresh processes (bench_cpu_worker.py), ours and the peer alternating, and
writes `cpu_linear_v2.json`, `.md` and `.png` (bench_cpu_report.py). The record is also printed.

The peer's Linux wheel brings the reference BLAS: one thread and no tuned kernels. `--peer-blas LIB`
adds a second peer with LIB preloaded in its place (Debian: libopenblas0-pthread), so that the
comparison also shows the peer at its best.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bench_cpu_report import Record, Rounds, markdown, spread, summarise, write_plot
from bench_cpu_worker import RESULT_MARK
from make_random_checkpoint import (
    Config,
    merged_config,
    parameter_counts,
    parse_overrides,
    write_checkpoint,
)

REPOSITORY = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("bench_cpu_worker.py")
DEFAULT_OUTPUT = REPOSITORY / "docs" / "benchmarks"
RECORD_NAME = "cpu_linear_v2"

# A kernel choice made for other programs on this machine would slow a preloaded OpenBLAS; without
# them it picks the best kernels it has.
DROPPED_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

COPY_BYTES = 256 * 2**20
COPY_REPEATS = 9
ROUND_TIMEOUT_S = 1800


class BenchError(Exception):
    """Something outside this program stops the benchmark; the message says what to do."""


def parse_args() -> argparse.Namespace:
    """Read the command line; `--quick` fills what was left out with small numbers."""
    parser = argparse.ArgumentParser(description="bailing-jax and mlx-lm on the CPU, side by side")
    add = parser.add_argument
    add("--prompt-tokens", "-p", type=int, help="prompt length (512; --quick: 64)")
    add("--decode-tokens", "-n", type=int, help="tokens to decode (64; --quick: 16)")
    add("--rounds", "-r", type=int, help="rounds of every engine (3; --quick: 1)")
    add("--agreement-prompt", type=int, default=24, help="prompt length of the token comparison")
    add("--agreement-tokens", type=int, default=32, help="tokens compared")
    add("--config", default="{}", help="config.json fields to override: JSON, or a JSON file")
    add("--seed", type=int, default=0, help="seed of the weights")
    add("--quick", action="store_true", help="small numbers; prints, writes no files by itself")
    add("--no-peer", action="store_true", help="run this project only")
    add("--no-ours", action="store_true", help="run the peer only")
    add("--peer-python", default=sys.executable, help="Python of the environment with mlx-lm")
    add("--peer-blas", type=Path, help="BLAS library to preload into a second peer (Linux)")
    add("--output", type=Path, help="folder for .json, .md, .png (docs/benchmarks)")
    add("--no-plot", action="store_true", help="leave the .png out; needs no matplotlib")
    args = parser.parse_args()
    defaults = (64, 16, 1) if args.quick else (512, 64, 3)
    names = ("prompt_tokens", "decode_tokens", "rounds")
    for name, default, least in zip(names, defaults, (1, 2, 1), strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if min(args.agreement_prompt, args.agreement_tokens) < 1:
        parser.error("--agreement-prompt and --agreement-tokens must be at least 1")
    if args.no_peer and (args.no_ours or args.peer_blas):
        parser.error("--no-peer excludes --no-ours and --peer-blas")
    if args.output is None and not args.quick:
        args.output = DEFAULT_OUTPUT
    return args


def check_args(args: argparse.Namespace) -> None:
    """Fail now rather than after minutes of measuring."""
    plots = args.output is not None and not args.no_plot
    if plots and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("the plot needs matplotlib: pip install matplotlib, or pass --no-plot")
    if args.peer_blas is None:
        return
    if not args.peer_blas.is_file():
        raise BenchError(f"--peer-blas {args.peer_blas}: no such file")
    if sys.platform != "linux":
        raise BenchError("--peer-blas preloads a library, which works on Linux only")


def engines_to_run(args: argparse.Namespace) -> list[str]:
    """Name the engines in the order they take turns."""
    names = [] if args.no_ours else ["ours"]
    if not args.no_peer:
        names.append("mlx")
    if args.peer_blas:
        names.append("mlx-blas")
    return names


def run_worker(name: str, folder: Path, args: argparse.Namespace) -> Record:
    """Run one round of engine `name` in a process of its own; return its figures."""
    environment = {k: v for k, v in os.environ.items() if k not in DROPPED_VARIABLES}
    if name == "ours":
        paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        # The comparison is of CPUs, also on a machine with an accelerator.
        environment["JAX_PLATFORMS"] = "cpu"
    if name == "mlx-blas":
        environment["LD_PRELOAD"] = str(args.peer_blas.resolve())
    command = [sys.executable if name == "ours" else args.peer_python, str(WORKER)]
    command += ["--worker", "ours" if name == "ours" else "mlx", "--checkpoint", str(folder)]
    for option in ("prompt_tokens", "decode_tokens", "agreement_prompt", "agreement_tokens"):
        command += ["--" + option.replace("_", "-"), str(getattr(args, option))]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=ROUND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{name}: {error}") from error
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT_MARK)]
    if done.returncode or not results:
        hint = "" if name == "ours" else "\n(peer: pip install mlx-lm 'mlx[cpu]'; --peer-python)"
        raise BenchError(f"{name} failed ({done.returncode}):\n{done.stderr[-3000:]}{hint}")
    result = json.loads(results[-1].removeprefix(RESULT_MARK))
    # The loader only warns about a library it cannot preload; the figures would then be of another.
    if name == "mlx-blas" and args.peer_blas.resolve().name not in result["blas"]:
        raise BenchError(f"{args.peer_blas} was not preloaded:\n{done.stderr[-3000:]}")
    return result


def run_rounds(folder: Path, args: argparse.Namespace) -> Rounds:
    """Run every engine `args.rounds` times, taking turns so that drift hits all alike."""
    names = engines_to_run(args)
    rounds: Rounds = {name: [] for name in names}
    for index in range(args.rounds):
        for name in names:
            result = run_worker(name, folder, args)
            rounds[name].append(result)
            log(
                f"round {index + 1} of {args.rounds}, {name}: prefill "
                f"{result['prefill_tokens_per_s']:.1f}, decode "
                f"{result['decode_tokens_per_s']:.1f} tokens/s "
                f"(load {result['load_s']:.1f} s, warm-up {result['warmup_s']:.1f} s)"
            )
    return rounds


def copy_bandwidth(threads: int) -> list[float]:
    """Measure numpy copies on `threads` threads, in GB/s of bytes read plus bytes written."""
    source = np.ones(COPY_BYTES // 8)
    target = np.zeros_like(source)
    pairs = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    speeds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPY_REPEATS):
            start = time.perf_counter()
            # numpy lets go of the interpreter lock while it copies.
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            speeds.append(2 * COPY_BYTES / (time.perf_counter() - start) / 1e9)
    return speeds


def usable_cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host() -> Record:
    """Describe the machine."""
    cpu, memory = platform.processor() or platform.machine(), None
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "device": "cpu",
        "cpu": cpu,
        "cores": usable_cores(),
        "memory_gib": memory,
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def git(*arguments: str) -> str:
    """Ask git about this repository; empty where there is none."""
    command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command_line() -> str:
    """Return the command; of absolute paths only the last part, the rest is this machine's."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=")
        words.append(option + equals + (Path(value).name if value.startswith("/") else value))
    return shlex.join(["python", "scripts/bench_cpu.py", *words])


def measure(args: argparse.Namespace, config: Config) -> Record:
    """Make the checkpoint, run all rounds, and return the whole record."""
    counts = parameter_counts(config)
    with tempfile.TemporaryDirectory(prefix="bench-cpu-") as name:
        folder = Path(name)
        weight_bytes = write_checkpoint(folder, config, args.seed)
        log(
            f"checkpoint: {counts['total'] / 1e6:.1f} M parameters, "
            f"{counts['active'] / 1e6:.1f} M active, {weight_bytes / 1e6:.0f} MB"
        )
        bandwidth = copy_bandwidth(usable_cores())
        rounds = run_rounds(folder, args)
    bandwidth += copy_bandwidth(usable_cores())  # and after, lest another program ran before
    bytes_per_token = counts["active"] * np.dtype(np.float32).itemsize
    copy = spread(bandwidth)
    ceiling = copy["median"] * 1e9 / bytes_per_token
    record: dict[str, Any] = {
        "benchmark": RECORD_NAME,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "host": host(),
        "dropped_variables": {k: os.environ[k] for k in DROPPED_VARIABLES if k in os.environ},
        "shapes": {
            "batch": 1,
            "dtype": "float32",
            "prompt_tokens": args.prompt_tokens,
            "decode_tokens": args.decode_tokens,
            "rounds": args.rounds,
            "seed": args.seed,
            "parameters": counts,
            "weight_bytes": weight_bytes,
            "config": config,
        },
        "roofline": {
            "bytes_per_token": bytes_per_token,
            "copy_bandwidth_gb_per_s": copy,
            "decode_ceiling_tokens_per_s": ceiling,
        },
    }
    return record | summarise(rounds, ceiling)


def log(text: str) -> None:
    """Tell the person who waits; standard output is for the record."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Run the command."""
    args = parse_args()
    try:
        check_args(args)
        config = merged_config(parse_overrides(args.config))
        record = measure(args, config)
    except (BenchError, ValueError, OSError) as error:
        log(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if args.output is None:
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / RECORD_NAME
    path.with_suffix(".json").write_text(text)
    path.with_suffix(".md").write_text(markdown(record))
    if not args.no_plot:
        write_plot(record, path.with_suffix(".png"))
    log(f"wrote {path}.*")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
