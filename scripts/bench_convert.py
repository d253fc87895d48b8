"""Compare the converter's speed with that of a plain copy: one checkpoint, one disk, one run.

`python scripts/bench_convert.py --record` makes a random bfloat16 checkpoint of a released model's
shapes, then lets five steps take turns: a copy of the folder's files, hf-to-native, native-to-hf,
verify --quick and verify --full. Each runs in a fresh process (bench_convert_worker.py) after a
sync and, where this user may, with an empty page cache. `--trillion` adds what can be said of a
trillion parameters on a small disk: how long planning takes, and how fast one layer of experts is
streamed within the memory bound (26 GB of disk). The record is printed; `--record` writes
`convert.json` and `convert.md` (bench_convert_report.py).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_convert_report import STEPS, TITLES, markdown, summarise
from bench_convert_worker import RESULT_MARK
from bench_cpu import BenchError, git, host, log
from bench_cpu_report import Record, Rounds
from make_sparse_checkpoint import (
    DEFAULT_PRESET,
    Tensor,
    random_fill,
    read_config,
    tensors_of,
    write_checkpoint,
)

REPOSITORY = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("bench_convert_worker.py")
RECORD_NAME = "convert"

PRESET = "ring-mini-linear-2.0"
# Embedding and head are 4 % of the released model; here they are a tenth.
VOCABULARY_SHARE = 0.1
GROUP = 5  # layers that alternate as the released model's do: four lightning, one softmax
SPARE_GB = 0.5  # of disk, beyond what is counted
STEP_TIMEOUT_S = 3600

# The folders that steps make.
TARGETS = {"copy": "copy", "hf-to-native": "native", "native-to-hf": "back"}


def parse_args() -> argparse.Namespace:
    """Read the command line; `--quick` fills what was left out with small numbers."""
    parser = argparse.ArgumentParser(description="the converter beside a plain copy")
    add = parser.add_argument
    add("--gb", type=float, help="size of the checkpoint (4; --quick: 0.1)")
    add("--rounds", "-r", type=int, help="rounds of every step (5; --quick: 1)")
    add("--folder", type=Path, help="where to work, on the disk to be measured (temporary folder)")
    add("--workers", type=int, help="threads of the converter (its default)")
    add("--trillion", action="store_true", help="also plan and stream a trillion parameters")
    add("--quick", action="store_true", help="small numbers, within a minute")
    add("--seed", type=int, default=0, help="seed of the weights")
    add("--record", action="store_true", help="write convert.json and convert.md")
    add("--output", type=Path, default=REPOSITORY / "docs" / "benchmarks", help="where to")
    args = parser.parse_args()
    for name, default in (("gb", 0.1 if args.quick else 4.0), ("rounds", 1 if args.quick else 5)):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.gb < 0.05 or args.rounds < 1:
        parser.error("--gb must be at least 0.05 and --rounds at least 1")
    return args


def config_of(gb: float) -> Record:
    """A config.json like the preset's, but for fewer layers, experts and words.

    Below 0.8 GB not even one group of layers would fit: everything is then a quarter as wide.
    """
    config = read_config(PRESET, None)
    if gb < 0.8:
        narrow = ("hidden_size", "intermediate_size", "moe_intermediate_size")
        narrow += ("moe_shared_expert_intermediate_size",)
        narrow += ("num_attention_heads", "num_key_value_heads")
        config |= {name: config[name] // 4 for name in narrow}
    words = int(VOCABULARY_SHARE * gb * 1e9 / (4 * config["hidden_size"]))
    words = min(words, config["vocab_size"])
    config |= {"vocab_size": words, "eos_token_id": words - 1, "pad_token_id": words - 1}
    most, groups = config["num_experts"], config["n_group"]
    for layers in range(GROUP, config["num_hidden_layers"] + 1, GROUP):
        config["num_hidden_layers"] = layers
        few, more = (
            sum(t.nbytes for t in tensors_of(config | {"num_experts": n * groups})) for n in (2, 3)
        )
        count = groups * max(2, round(2 + (gb * 1e9 - few) / (more - few)))
        config["num_experts"] = min(count, most)
        if count <= most:
            break
    return config


def run_step(arguments: list[str], limit: int | None = None) -> Record:
    """Run the worker in a process of its own; return its figures."""
    command = [sys.executable, str(WORKER)]
    command += [] if limit is None else ["--limit", str(limit)]
    # No step needs more threads of these; they would count as address space.
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        done = subprocess.run(
            command + arguments,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            env={**os.environ, **single},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{arguments[0]}: {error}") from error
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT_MARK)]
    if done.returncode or not results:
        raise BenchError(f"{shlex.join(arguments)} failed:\n{done.stdout}{done.stderr[-3000:]}")
    return json.loads(results[-1].removeprefix(RESULT_MARK))


def even_out() -> bool:
    """Write back what is dirty and empty the page cache; whether the latter is permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def run_rounds(folder: Path, args: argparse.Namespace) -> tuple[Rounds, bool]:
    """Let the steps take turns; their figures, and whether each began with an empty cache."""
    source = str(folder / "hf")
    copied, native, back = (str(folder / name) for name in TARGETS.values())
    options = ["--quiet", *([] if args.workers is None else ["--workers", str(args.workers)])]
    commands = {
        "copy": ["copy", source, copied],
        "hf-to-native": ["convert", "hf-to-native", source, native, *options],
        "native-to-hf": ["convert", "native-to-hf", native, back, *options],
        "verify --quick": ["convert", "verify", "--quick", native, *options],
        "verify --full": ["convert", "verify", "--full", native, source, *options],
    }
    rounds: Rounds = {name: [] for name in STEPS}
    emptied = True
    for index in range(args.rounds):
        for name in STEPS:
            emptied &= even_out()
            result = run_step(commands[name])
            if name in TARGETS:
                result["files"] = len(list((folder / TARGETS[name]).glob("*.safetensors")))
            rounds[name].append(result)
            log(f"round {index + 1} of {args.rounds}, {TITLES[name]}: {result['seconds']:.2f} s")
            if name in ("copy", "native-to-hf"):
                shutil.rmtree(folder / TARGETS[name])
        shutil.rmtree(native)
    return rounds, emptied


def bound(tensors: list[Tensor]) -> int:
    """The bytes a conversion of these tensors may take: row S16."""
    return 2 * max(tensor.nbytes for tensor in tensors) + 512 * 2**20


def streamed_part(config: Record, quick: bool) -> str:
    """The prefix of what is streamed of the trillion parameters: the first layer with experts."""
    layer = f"model.layers.{config['first_k_dense_replace']}."
    return f"{layer}attention.g_proj." if quick else layer


def run_trillion(folder: Path, args: argparse.Namespace) -> Record:
    """Plan a checkpoint of holes, and stream a part of it, both under a limit on memory."""
    config = read_config(DEFAULT_PRESET, None)
    source, target = folder / "trillion", folder / "part"
    tensors = write_checkpoint(source, config)
    prefix = streamed_part(config, args.quick)
    part = [tensor for tensor in tensors if tensor.name.startswith(prefix)]
    limits = {"plan": bound(tensors), "stream": bound(part)}
    found: Record = {
        "preset": DEFAULT_PRESET,
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "largest_tensor_bytes": max(tensor.nbytes for tensor in tensors),
        "streamed": prefix,
        "streamed_largest_tensor_bytes": max(tensor.nbytes for tensor in part),
        "limit_bytes": limits,
        "plan": [],
        "stream": [],
    }
    for index in range(min(args.rounds, 3)):
        even_out()
        plan = ["convert", "hf-to-native", str(source), str(target), "--dry-run", "--quiet"]
        found["plan"].append(run_step(plan, limits["plan"]))
        even_out()
        stream = ["stream", str(source), str(target), prefix]
        found["stream"].append(run_step(stream, limits["stream"]))
        shutil.rmtree(target)
        figures = found["stream"][-1]
        log(
            f"trillion, round {index + 1}: planned in {found['plan'][-1]['seconds']:.1f} s, "
            f"{figures['written_bytes'] / 1e9:.2f} GB streamed in {figures['write_seconds']:.1f} s"
        )
    return found


def check_free(folder: Path, args: argparse.Namespace) -> None:
    """Fail now rather than on a full disk."""
    needed = 3 * args.gb
    if args.trillion:
        config = read_config(DEFAULT_PRESET, None)
        prefix = streamed_part(config, args.quick)
        part = sum(t.nbytes for t in tensors_of(config) if t.name.startswith(prefix))
        needed = max(needed, part / 1e9)
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed + SPARE_GB:
        raise BenchError(f"{folder}: {needed + SPARE_GB:.1f} GB are needed, {free:.1f} are free")


def measure(args: argparse.Namespace) -> Record:
    """Make the checkpoint, run everything, and return the whole record."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.folder) as name:
        folder = Path(name)
        check_free(folder, args)
        config = config_of(args.gb)
        tensors = write_checkpoint(folder / "hf", config, fill=random_fill(args.seed))
        size = sum(tensor.nbytes for tensor in tensors)
        log(f"checkpoint: {len(tensors)} tensors, {size / 1e9:.2f} GB")
        rounds, emptied = run_rounds(folder, args)
        shutil.rmtree(folder / "hf")
        filesystem = filesystem_of(folder)
        trillion = run_trillion(folder, args) if args.trillion else None
    return {
        "benchmark": RECORD_NAME,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "host": host() | {"filesystem": filesystem, "load_before": load},
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("numpy", "ml_dtypes")},
            "openssl": ssl.OPENSSL_VERSION,
        },
        "page_cache_emptied": emptied,
        "checkpoint": {
            "like": PRESET,
            "bytes": size,
            "tensors": len(tensors),
            "largest_tensor_bytes": max(tensor.nbytes for tensor in tensors),
            "rounds": args.rounds,
            "seed": args.seed,
            "config": config,
        },
        "steps": summarise(rounds, size),
        "trillion": trillion,
    }


def filesystem_of(folder: Path) -> str:
    """The kind of file system the folder lies on, where /proc tells."""
    best = ("", "unknown")
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return best[1]
    for line in lines:
        mount, kind = line.split()[1:3]
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def command_line() -> str:
    """The command; of absolute paths only the last part, the rest is this machine's."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=")
        words.append(option + equals + (Path(value).name if value.startswith("/") else value))
    return shlex.join(["python", "scripts/bench_convert.py", *words])


def main() -> int:
    """Run the command."""
    args = parse_args()
    try:
        record = measure(args)
    except (BenchError, OSError) as error:
        log(f"error: {error}")
        return 1
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if args.record:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / RECORD_NAME
        path.with_suffix(".json").write_text(text)
        path.with_suffix(".md").write_text(markdown(record))
        log(f"wrote {path}.*")
    else:
        log(markdown(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
