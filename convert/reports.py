"""What the converter's commands print: text for people, or one JSON object."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from convert.mapping import copy
from convert.progress import peak_memory
from convert.values import check_values
from convert.verify import Verdict
from convert.writer import Conversion, Outcome, OutFile, free_bytes

_NOTES_SHOWN = 10
_PROBLEMS_SHOWN = 20


def say(args: argparse.Namespace) -> Callable[[str], None]:
    """A function that prints a line on stderr, or nothing if the user wants quiet."""
    return (lambda _line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))


def size(num_bytes: int) -> str:
    """Bytes as a person reads them, in powers of ten as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def print_outcome(
    args: argparse.Namespace,
    output: Path,
    conversion: Conversion,
    outcome: Outcome,
    seconds: float,
) -> None:
    """What was written and how fast."""
    notes = sorted(set(conversion.notes))
    for note in notes[:_NOTES_SHOWN]:
        say(args)(f"note: {note}")
    if len(notes) > _NOTES_SHOWN:
        say(args)(f"note: and {len(notes) - _NOTES_SHOWN} more (--json lists all)")
    rate = outcome.written / max(seconds, 1e-9)
    result = {
        "command": args.command,
        "output": str(output),
        "tensors": conversion.num_tensors,
        "tensor_bytes": conversion.data_bytes,
        "written_bytes": outcome.written,
        "resumed_bytes": outcome.resumed,
        "already_complete": outcome.already_complete,
        "seconds": round(seconds, 3),
        "gb_per_s": round(rate / 1e9, 3),
        "peak_memory_bytes": peak_memory(),
        "notes": notes,
    }
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    elif outcome.already_complete:
        print(f"{output}: already complete, made of the same files; nothing was written")
    else:
        print(
            f"{output}: {conversion.num_tensors} tensors, {size(conversion.data_bytes)}, "
            f"{seconds:.1f} s, {rate / 1e9:.2f} GB/s, peak memory {size(peak_memory())}"
        )


def print_plan(
    args: argparse.Namespace,
    config: ModelConfig,
    conversion: Conversion,
    unused: Mapping[str, int],
    workers: int,
) -> None:
    """What would be written, what it needs and what there is (--dry-run).

    Raises:
        UserError: the output has nowhere to be.
    """
    output = Path(os.path.abspath(args.output))
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder", "Create it first.", EXIT_USAGE)
    needed, free = conversion.total_bytes, free_bytes(output)
    rate = _rate() * workers
    plan = {
        "command": args.command,
        "architecture": config.architecture,
        "decay_layer_offset": None if config.lightning is None else config.decay_layer_offset,
        "groups": [_group(list(files)) for _, files in groupby(conversion.files, key=_likeness)],
        "not_used": dict(unused),
        "small_files": {name: len(content) for name, content in conversion.small.items()},
        "tensors": conversion.num_tensors,
        "tensor_bytes": conversion.data_bytes,
        "needed_bytes": needed,
        "free_bytes": free,
        "fits": needed <= free,
        "output_exists": os.path.lexists(output),
        "peak_memory_bytes": conversion.peak_memory(workers),
        "workers": workers,
        "gb_per_s": round(rate / 1e9, 3),
        "estimated_seconds": round(conversion.data_bytes / rate, 1),
        "notes": conversion.notes,
    }
    print(json.dumps(plan, ensure_ascii=False) if args.json else "\n".join(_plan_lines(plan)))


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    offset = plan["decay_layer_offset"]
    decay = "" if offset is None else f", decay layer offset {offset}"
    lines = [f"{plan['architecture']}{decay}: {plan['tensors']} tensors"]
    for group in plan["groups"]:
        first, last = group["first_file"], group["last_file"]
        files = first if first == last else f"{Path(first).stem} ... {last}"
        lines.append(
            f"  {files:<38} {group['files']:>3} x {group['tensors']:>5} tensors "
            f"{size(group['bytes']):>10}  {', '.join(group['dtypes'])}"
        )
    lines += [f"  kept, not used: {count} tensors, {g}" for g, count in plan["not_used"].items()]
    lines.append(f"  other files: {', '.join(plan['small_files'])}")
    lines += [f"  {note}" for note in plan["notes"]]
    fits = "" if plan["fits"] else ": NOT enough"
    if plan["output_exists"]:
        lines.append("the output exists: a run refuses it, unless it is empty or this very result")
    return [
        *lines,
        f"disk: {size(plan['needed_bytes'])} needed, {size(plan['free_bytes'])} free{fits}",
        f"memory: at most {size(plan['peak_memory_bytes'])} with {plan['workers']} workers",
        f"time: about {plan['estimated_seconds']:.0f} s, if the disk keeps up with "
        f"{plan['gb_per_s']:.2f} GB/s (measured just now, in memory)",
    ]


def _likeness(file: OutFile) -> tuple[str, int, int]:
    """Neighbours that differ in number only, such as layers of one kind."""
    return file.name.partition("-")[0], len(file.tensors), file.data_bytes


def _group(files: Sequence[OutFile]) -> dict[str, Any]:
    return {
        "first_file": files[0].name,
        "last_file": files[-1].name,
        "files": len(files),
        "tensors": len(files[0].tensors),
        "bytes": sum(file.data_bytes for file in files),
        "dtypes": sorted({str(t.dtype) for file in files for t in file.tensors}),
    }


def _rate() -> float:
    """Bytes a second one worker transposes, checks and hashes on this machine, in memory."""
    values = np.ones((4096, 2048), np.float32)
    start = time.perf_counter()
    check_values(values, Path(), "")
    out = np.empty((2048, 4096), np.float32)
    copy(values.T, out)
    hashlib.sha256(out.view(np.uint8).data).digest()
    return values.nbytes / (time.perf_counter() - start)


def print_verdict(args: argparse.Namespace, verdict: Verdict) -> None:
    """Whether a folder is sound; problems go to stderr."""
    problems = sorted(set(verdict.problems))
    if args.json:
        print(
            json.dumps(
                {
                    "folder": args.source,
                    "kind": verdict.kind,
                    "sound": not problems,
                    "tensors": verdict.tensors,
                    "compared": verdict.compared,
                    "problems": problems,
                },
                ensure_ascii=False,
            )
        )
        return
    for problem in problems[:_PROBLEMS_SHOWN]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > _PROBLEMS_SHOWN:
        print(f"error: and {len(problems) - _PROBLEMS_SHOWN} more", file=sys.stderr)
    compared = f", {verdict.compared} equal to the source bit for bit" if verdict.compared else ""
    checked = "names, shapes, dtypes, values" + ", hashes" * (verdict.kind == "native")
    what = f"{args.source}: {verdict.kind}, {verdict.tensors} tensors"
    if problems:
        print(f"{what}: NOT sound, {len(problems)} problems")
    else:
        print(f"{what}: sound ({checked}{compared})")
