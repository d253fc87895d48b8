"""Every released model on every kind of chip: the smallest slice with room, and its bounds.

No weights, no accelerator, no compiler: a few seconds. Writes docs/benchmarks/plan.md and .json.

    python scripts/plan_table.py                    # writes the table
    python scripts/plan_table.py --check            # says whether the files are up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bailing_jax.errors import UserError
from bailing_jax.planning import model, ranking, report
from bailing_jax.planning.chips import CHIPS
from bailing_jax.planning.topology import slices
from bailing_jax.planning.workload import FP8, workload
from bailing_jax.presets import preset_names

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("bfloat16", FP8)


def row(name: str, dtype: str, chip: str) -> dict[str, Any]:
    """A model in a dtype on a kind of chip."""
    found: dict[str, Any] = {"model": name, "weight_dtype": dtype, "chip": chip}
    try:
        planned = model.read(name)
    except UserError as error:
        return found | {"refused": error.hint or error.message}
    load = workload(planned.config, weight_dtype=dtype)
    best = ranking.smallest_slice(planned, slices(CHIPS[chip])[0], load)
    if best is None:
        return found | {"refused": f"no {chip} slice has room"}
    return found | {"parameters": planned.num_parameters} | report.candidate_object(best)


def table() -> list[dict[str, Any]]:
    """All rows."""
    return [row(name, dtype, chip) for name in preset_names() for dtype in DTYPES for chip in CHIPS]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The report."""
    lines = [
        "# What every released model needs",
        "",
        "**Nothing here was run or measured.** For each model and kind of chip: the smallest slice "
        "(GPUs: number in one or more hosts of 8) whose devices have room for 32 sequences of 8192 "
        "tokens with nine tenths of their memory, the best mesh on it, and bounds worked out from "
        "published peak rates, which no program reaches. *Decode* is all 32 sequences together "
        "with 1024 tokens behind each; *in turns*: where messages and products do not overlap. "
        "*First token*: one prompt of 1024 tokens alone. Sizes are of one device; a v7x chip has "
        "two. fp8 weights can be planned and compiled for, not loaded yet. How it is worked out: "
        "[plan](../plan.md).",
        "",
        "| model | weights | chip | smallest slice | chips | mesh | GiB a device: weights + state "
        "+ pages + temporaries | decode, tokens/s, at most | in turns, at most | first token, ms, "
        "at least | binds decode |",
        "|" + " --- |" * 11,
    ]
    refused: dict[str, str] = {}
    for found in rows:
        if "refused" in found and "mesh" not in found and "parameters" not in found:
            refused[found["model"]] = found["refused"]
            if found["refused"][:3] != "no ":
                continue
        lines.append(_line(found))
    lines += ["", "Not planned:", ""]
    lines += [f"- {name}: {why}" for name, why in refused.items() if not why.startswith("no ")]
    lines += ["", "Again: `python scripts/plan_table.py`", ""]
    return "\n".join(lines)


def _line(found: dict[str, Any]) -> str:
    dtype = "fp8" if found["weight_dtype"] == FP8 else "bf16"
    start = f"| {found['model']} | {dtype} | {found['chip']} |"
    if "refused" in found:
        return f"{start} {found['refused']} |" + " |" * 7
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    sizes = " + ".join(f"{size / 2**30:.2f}" for size in found["bytes_a_device"].values())
    return (
        f"{start} {found['topology']} | {found['chips']} | {mesh or 'one device'} | {sizes} "
        f"| {found['decode']['tokens_per_s_bound']:,.0f} "
        f"| {found['decode']['tokens_per_s_in_turns_bound']:,.0f} "
        f"| {found['first_token']['seconds_bound'] * 1e3:,.1f} | {found['decode']['binds']} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    options = parser.parse_args()
    rows = table()
    texts = {"plan.json": json.dumps(rows, indent=1) + "\n", "plan.md": markdown(rows)}
    stale = []
    for name, text in texts.items():
        path = options.output / name
        if options.check:
            stale += [name] * (not path.exists() or path.read_text() != text)
        else:
            options.output.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(json.dumps({"rows": len(rows), "stale": stale}))
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
