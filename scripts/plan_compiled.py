"""The engine's steps compiled for pods that are not here: bytes, updates in place, collectives.

One process a case runs `python -m bailing_jax.plan --compile --json`; its decode step and its step
with a prompt's chunk go through libtpu's compiler. Results are kept a case at a time in
docs/benchmarks/plan_compiled.json, so that a case can be made again alone; plan_compiled.md is the
table. Nothing runs on a TPU.

    pip install -e '.[plan]'
    python scripts/plan_compiled.py --quick              # one group of layers, nothing written
    python scripts/plan_compiled.py                      # every case, whole models
    python scripts/plan_compiled.py --only 1t            # cases whose name holds this

Exits 1 when a limit is broken.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Case:
    """A model on a topology; the mesh keeps the groups of the norm on one device each."""

    model: str
    topology: str
    mesh: str
    weight_dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.model} {self.weight_dtype} {self.topology}"


CASES = (
    Case("ring-mini-linear-2.0", "v5e:2x2", "expert=1,tensor=4"),
    Case("ring-mini-linear-2.0", "v6e:2x2", "expert=1,tensor=4"),
    Case("ling-2.6-flash", "v6e:4x4", "expert=4,tensor=4"),
    Case("ling-2.6-1t", "v6e:8x8", "expert=8,tensor=8", FP8),
    Case("ling-2.6-1t", "v7x:2x2x4", "expert=4,tensor=8", FP8),
    Case("ling-2.6-1t", "v6e:16x16", "expert=32,tensor=8"),
)
LOAD = ("--max-num-seqs", "64", "--max-model-len", "8192")
# Layers that --quick leaves: a whole group, and the dense ones before it.
QUICK = {"ring-mini-linear-2.0": 5, "ling-2.6-flash": 8, "ling-2.6-1t": 8}
MOST_TEMPORARIES = 2**30
MOST_OF_FLOOR = 1.15
MOST_COLLECTIVES = 2.0
MOST_SECONDS = 300.0


def compile_case(case: Case, quick: bool, seconds: float) -> dict[str, Any]:
    """The plan of a case with its compiled steps, or why there is none."""
    command = [
        sys.executable, "-m", "bailing_jax.plan", "--compile", "--json", *LOAD,
        "--model", case.model, "--topology", case.topology, "--mesh", case.mesh,
        "--weight-dtype", case.weight_dtype,
    ]  # fmt: skip
    if quick:
        command += ["--hf-overrides", json.dumps({"num_hidden_layers": QUICK[case.model]})]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode != 0:
        return {"failed": " ".join(done.stderr.split())[-500:]}
    plan = json.loads(done.stdout)
    return {
        "mesh": plan["chosen"]["mesh"],
        "layers": QUICK[case.model] if quick else None,
        "load": plan["in_force"],
        "floor_bytes": plan["chosen"]["bytes_a_device"],
        "allowed_bytes": plan["chosen"]["allowed_bytes_a_device"],
        "hbm_bytes": plan["topology"]["hbm_bytes_a_device"],
        "steps": plan["compiled"],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def broken(name: str, found: dict[str, Any]) -> list[str]:
    """The limits that a case does not keep."""
    if "failed" in found:
        return [f"{name}: {found['failed']}"]
    floor = found["floor_bytes"]
    state = floor["recurrent_state"] + floor["pages"]
    limits = []
    for step in found["steps"]:
        total = step["argument_bytes"] + step["temporary_bytes"]
        least = state + floor["weights"]
        checks = {
            f"{step['argument_bytes'] / least:.3f} of the floor": (
                step["argument_bytes"] > MOST_OF_FLOOR * least
            ),
            "the state is not updated in place": step["alias_bytes"] < state,
            f"the state is copied at {step['state_copies']} places": step["state_copies"] > 0,
            f"{step['temporary_bytes'] / 2**30:.2f} GiB of temporaries": (
                step["temporary_bytes"] > MOST_TEMPORARIES
            ),
            f"{total / 2**30:.2f} GiB in all": total > found["hbm_bytes"],
            f"{step['beside_the_exchange']:.2f} collectives a layer": (
                step["beside_the_exchange"] > MOST_COLLECTIVES
            ),
            f"compiled in {step['compile_s']} s": step["compile_s"] > MOST_SECONDS,
        }
        limits += [f"{name}, {step['name']}: {what}" for what, is_so in checks.items() if is_so]
    return limits


def markdown(found: dict[str, Any]) -> str:
    """The report."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# Steps compiled for pods",
        "",
        "**Nothing here ran on a TPU, and no pod was used.** The compiler for TPUs compiled the "
        "engine's own steps on a CPU host for slices that are described, not there: decode with "
        "every sequence, and prefill, which takes in a chunk of 512 tokens a shard beside all "
        "decode rows. 64 sequences of 8192 tokens. Speed, overlap and the numbers of real devices "
        f"are not verified. {versions}.",
        "",
        "GiB are a device's (a v7x chip has two). *Floor*: weights, state and pages as the planner "
        "adds them up; *arguments*: as the compiler lays them out. *In place*: the whole state is "
        "updated where it lies, and no pool is laid out anew for it. *A layer*: collectives in a "
        "layer beside the exchange of the experts' rows. fp8: float8_e4m3fn matrices with a "
        "float32 scale an output channel, widened where they are used; such checkpoints can't be "
        "loaded yet. Seconds are of two cores that other programs used as well; the processor's "
        "own time stands beside them.",
        "",
        "| model | weights | slice | mesh | step | floor | arguments | temporaries | in place "
        "| a layer | collectives in all | compile, s (processor) |",
        "|" + " --- |" * 12,
    ]
    for name, case in found["cases"].items():
        model, dtype, topology = name.split()
        start = f"| {model} | {'fp8' if dtype == FP8 else 'bf16'} | {topology} |"
        if "failed" in case:
            lines.append(f"{start} {case['failed']} |" + " |" * 8)
            continue
        lines += [f"{start} {_step(case, step)}" for step in case["steps"]]
    lines += ["", "Limits that are not kept:", ""]
    lines += [f"- {line}" for line in found["broken"]] or ["- none"]
    lines += ["", "Again: `python scripts/plan_compiled.py`", ""]
    return "\n".join(lines)


def _step(case: dict[str, Any], step: dict[str, Any]) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in case["mesh"].items() if size > 1)
    floor = case["floor_bytes"]
    state = floor["recurrent_state"] + floor["pages"]
    kinds: dict[str, int] = {}
    for each in step["collectives"]:
        kinds[each["kind"]] = kinds.get(each["kind"], 0) + each["count"]
    collectives = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return (
        f"{mesh} | {step['name']}, {step['rows_a_shard']} rows "
        f"| {(floor['weights'] + state) / 2**30:.3f} | {step['argument_bytes'] / 2**30:.3f} "
        f"| {step['temporary_bytes'] / 2**30:.3f} "
        f"| {_place(step, state)} "
        f"| {step['beside_the_exchange']:.2f} | {collectives} "
        f"| {step['compile_s']:.0f} ({step['compile_cpu_s']:.0f}) |"
    )


def _place(step: dict[str, Any], state: int) -> str:
    if step["alias_bytes"] < state:
        return "NO"
    return f"copied at {step['state_copies']} places" if step["state_copies"] else "yes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few layers, nothing written")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=3600, help="most for one case")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    options = parser.parse_args()
    try:
        versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "libtpu")}
    except importlib.metadata.PackageNotFoundError:
        print("libtpu is not installed: pip install -e '.[plan]'", file=sys.stderr)
        return 2
    path = options.output / "plan_compiled.json"
    kept = json.loads(path.read_text())["cases"] if path.exists() and not options.quick else {}
    for case in CASES:
        if options.only not in case.name:
            continue
        kept[case.name] = compile_case(case, options.quick, options.seconds)
        print(json.dumps({case.name: kept[case.name]}), file=sys.stderr, flush=True)
        cases = {each.name: kept[each.name] for each in CASES if each.name in kept}
        limits = [line for name, found in cases.items() for line in broken(name, found)]
        found = {"versions": versions, "cases": cases, "broken": limits}
        if not options.quick:
            options.output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            (options.output / "plan_compiled.md").write_text(markdown(found))
    limits = [line for name, found in kept.items() for line in broken(name, found)]
    for line in limits:
        print(f"BROKEN {line}", file=sys.stderr)
    print(json.dumps({"cases": len(kept), "broken": limits}))
    return 1 if limits else 0


if __name__ == "__main__":
    sys.exit(main())
