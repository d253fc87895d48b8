"""The shipped model on a GPU with the kernels that `auto` takes, beside the same on the CPU.

    python scripts/gpu_model.py --num 200

Asks both the same word problems, 32 at once, through `python -m bailing_jax.evaluate`: in float32,
where every answer must be the CPU's token for token, and in the checkpoint's bfloat16 with the
kernels and with XLA alone (an accuracy beside another: bfloat16 rounds differently everywhere).
Prints which implementation each operator ran, and one JSON object. Exit code 1 if an answer
differs in float32, or if the GPU ran no kernel of its own there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONCURRENCY = 32
LIMIT_S = 500
# The command, with its choices of implementations told.
_COMMAND = (
    "import logging, sys; logging.basicConfig(format='%(message)s'); "
    "logging.getLogger('pallas_kernels').setLevel(logging.INFO); "
    "from bailing_jax.evaluate import main; sys.exit(main(sys.argv[1:]))"
)
_ABOUT = "import jax; d = jax.devices()[0]; print(d.device_kind); print(jax.__version__)"
_CHOICE = re.compile(r"^(\w+): (\w+) on \w+")
_NORMS = re.compile(r"^lightning_decode: norms and RoPE (.*)")
_KERNELS = ("lightning_prefill", "lightning_decode")


@dataclass(frozen=True)
class Run:
    """One evaluation: what it ran on and its numbers, or an error's last lines."""

    name: str
    platform: str
    dtype: str
    kernels: str = "auto"


RUNS = (
    Run("gpu float32", "cuda", "float32"),
    Run("cpu float32", "cpu", "float32"),
    Run("gpu bfloat16", "cuda", "bfloat16"),
    Run("gpu bfloat16, xla", "cuda", "bfloat16", "xla"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="the shipped model on a GPU beside the CPU")
    parser.add_argument("--num", type=int, default=200, help="word problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="float32 alone, or both")
    parser.add_argument("--gpu", default="cuda", help="jax's platform in place of cuda")
    parser.add_argument("--out", type=Path, help="folder for gpu_model.json")
    args = parser.parse_args()
    runs = [run for run in RUNS if run.dtype in args.dtypes.split(",")]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda run: evaluate(run, args, Path(folder)), runs))
    report = about(args) | {"runs": found}
    gpu, cpu = found[0], found[1]
    same = sum(a == b for a, b in zip(gpu["answers"], cpu["answers"], strict=False))
    report["float32_answers_same"] = same
    for one in found:
        del one["answers"]
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu_model.json").write_text(text + "\n", encoding="utf-8")
    own = all(gpu["implementations"].get(name) == "gpu" for name in _KERNELS)
    return 0 if same == args.num and own else 1


def evaluate(run: Run, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ask one of them all problems."""
    file = folder / f"{run.name.replace(' ', '_')}.jsonl"
    platform = args.gpu if run.platform == "cuda" else run.platform
    command = [
        sys.executable, "-c", _COMMAND, "word-problems", "--num", str(args.num),
        "--seed", str(args.seed), "--concurrency", str(CONCURRENCY), "--dtype", run.dtype,
        "--kernels", run.kernels, "--json", "--output", str(file),
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two of them share the GPU
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    found: dict[str, Any] = {"run": run.name, "answers": [], "implementations": {}}
    for line in done.stderr.splitlines():
        if choice := _CHOICE.match(line):
            found["implementations"][choice[1]] = choice[2]
        elif norms := _NORMS.match(line):
            found["implementations"]["norms and RoPE of decode"] = norms[1]
    if done.returncode:
        return found | {"error": done.stderr.strip()[-800:]}
    result = json.loads(done.stdout)
    keys = ("num", "correct", "accuracy", "seconds", "tokens_per_s", "dtype", "kernels")
    answers = sorted(map(json.loads, file.read_text().splitlines()), key=lambda a: a["index"])
    found["answers"] = [answer["tokens"] for answer in answers]
    print(f"{run.name}: {result['correct']} of {result['num']}", file=sys.stderr, flush=True)
    return found | {key: result[key] for key in keys}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What this was, and on what."""
    environment = {**os.environ, "JAX_PLATFORMS": args.gpu}
    done = subprocess.run(
        [sys.executable, "-c", _ABOUT], env=environment, text=True, capture_output=True, check=True
    )
    device, version = done.stdout.split("\n")[:2]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "jax": version,
        "seed": args.seed,
        "num": args.num,
        "concurrency": CONCURRENCY,
    }


if __name__ == "__main__":
    sys.exit(main())
