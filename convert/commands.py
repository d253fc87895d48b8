"""What the converter's commands do, once their arguments are parsed.

stdout carries the result, stderr the rest. Every folder is checked whole before the first long
read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, UserError
from bailing_jax.params import Param
from convert import inspect_checkpoint
from convert.mapping import copy
from convert.native import MANIFEST_NAME, check_params, is_native, open_native
from convert.plan import match
from convert.progress import ProgressLine, peak_memory
from convert.source import CONFIG_NAME, open_source
from convert.to_hf import plan_hf
from convert.to_native import DTYPE_CHOICES, plan_native
from convert.values import check_values
from convert.verify import PROBLEMS_SHOWN, Verdict, verify_checkpoint, verify_native
from convert.writer import Conversion, OutFile, Outcome, check_apart, free_bytes, write

MAX_WORKERS = 64
FORMATS = ("native", "orbax")
_NOTES_SHOWN = 10


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: whatever is wrong with arguments, input or output.
    """
    return _COMMANDS[args.command](args)


def _hf_to_native(args: argparse.Namespace) -> int:
    _one_of("--dtype", args.dtype, DTYPE_CHOICES)
    _one_of("--format", args.format, FORMATS)
    if args.decay_layer_offset not in (None, 0, 1):
        _one_of("--decay-layer-offset", str(args.decay_layer_offset), ("0", "1"))
    source = Path(args.source)
    if is_native(source):
        raise UserError(
            f"{source}: is a native folder already",
            "For the way back: native-to-hf. To look at it: inspect, verify.",
            EXIT_USAGE,
        )
    if args.format == "orbax":
        from convert.orbax_command import hf_to_orbax

        return hf_to_orbax(args, _workers(args))
    with open_source(source) as opened:
        config, matched, conversion = plan_native(opened, args.dtype, args.decay_layer_offset)
        unused = {group: len(names) for group, names in matched.unused.items()}
        return _convert(args, config, conversion, unused)


def _native_to_hf(args: argparse.Namespace) -> int:
    with open_native(Path(args.source)) as native:
        config, conversion = plan_hf(native)
        return _convert(args, config, conversion, {})


def _convert(
    args: argparse.Namespace,
    config: ModelConfig,
    conversion: Conversion,
    unused: Mapping[str, int],
) -> int:
    output, workers = Path(args.output), _workers(args)
    check_apart(Path(args.source), output)
    if args.dry_run:
        _print_plan(args, config, conversion, unused, workers)
        return EXIT_OK
    say = _say(args)
    decay = "" if config.lightning is None else f", decay layer offset {config.decay_layer_offset}"
    say(
        f"{config.architecture}{decay}: {len(_tensors(conversion))} tensors, "
        f"{conversion.data_bytes / 1e9:.3f} GB in {len(conversion.files)} files"
    )
    for group, count in unused.items():
        say(f"kept, not used: {count} tensors, {group}")
    progress = ProgressLine(args.quiet)
    try:
        outcome = write(conversion, output, workers, progress)
    except KeyboardInterrupt:
        progress.end()
        say("what is finished is kept: run the same command to go on")
        raise
    finally:
        progress.end()
    _print_outcome(args, output, conversion, outcome, progress.seconds)
    return EXIT_OK


def _print_outcome(
    args: argparse.Namespace,
    output: Path,
    conversion: Conversion,
    outcome: Outcome,
    seconds: float,
) -> None:
    notes = sorted(set(conversion.notes))
    for note in notes[:_NOTES_SHOWN]:
        _say(args)(f"note: {note}")
    if len(notes) > _NOTES_SHOWN:
        _say(args)(f"note: and {len(notes) - _NOTES_SHOWN} more (--json lists all)")
    rate = outcome.written / max(seconds, 1e-9)
    result = {
        "command": args.command,
        "output": str(output),
        "tensors": len(_tensors(conversion)),
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
            f"{output}: {result['tensors']} tensors, {conversion.data_bytes / 1e9:.3f} GB, "
            f"{seconds:.1f} s, {rate / 1e9:.2f} GB/s, peak memory {peak_memory() / 1e9:.2f} GB"
        )


def _print_plan(
    args: argparse.Namespace,
    config: ModelConfig,
    conversion: Conversion,
    unused: Mapping[str, int],
    workers: int,
) -> None:
    output = Path(os.path.abspath(args.output))
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder", "Create it first.", EXIT_USAGE)
    groups = [_group(list(files)) for _, files in groupby(conversion.files, key=_likeness)]
    needed, free = conversion.total_bytes, free_bytes(output)
    rate = _rate() * workers
    plan = {
        "command": args.command,
        "architecture": config.architecture,
        "decay_layer_offset": None if config.lightning is None else config.decay_layer_offset,
        "groups": groups,
        "not_used": dict(unused),
        "small_files": {name: len(content) for name, content in conversion.small.items()},
        "tensor_bytes": conversion.data_bytes,
        "needed_bytes": needed,
        "free_bytes": free,
        "fits": needed <= free,
        "peak_memory_bytes": conversion.peak_memory(workers),
        "workers": workers,
        "estimated_seconds": round(conversion.data_bytes / rate, 1),
        "notes": conversion.notes,
    }
    if args.json:
        print(json.dumps(plan, ensure_ascii=False))
        return
    print(f"{config.architecture}, decay layer offset {plan['decay_layer_offset']}")
    for group in groups:
        files = group["first_file"]
        if group["files"] > 1:
            files += f" ... {group['last_file']}"
        dtypes = ", ".join(group["dtypes"])
        print(
            f"  {files:<46} {group['files']:>4} x {group['tensors']:>5} tensors "
            f"{group['bytes'] / 1e9:>10.3f} GB  {dtypes}"
        )
    for name, count in unused.items():
        print(f"  kept, not used: {count} tensors, {name}")
    print(f"  other files: {', '.join(conversion.small)}")
    for note in conversion.notes:
        print(f"  {note}")
    print(f"disk: {needed / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free")
    print(f"memory: at most {plan['peak_memory_bytes'] / 1e9:.2f} GB with {workers} workers")
    print(
        f"time: about {plan['estimated_seconds']:.0f} s, if the disk reads and writes "
        f"{rate / 1e9:.2f} GB/s (measured just now, in memory)"
    )


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
    import hashlib

    values = np.ones((4096, 2048), np.float32)
    start = time.perf_counter()
    check_values(values, Path(), "")
    out = np.empty((2048, 4096), np.float32)
    copy(values.T, out)
    hashlib.sha256(out.view(np.uint8).data).digest()
    return values.nbytes / (time.perf_counter() - start)


def _inspect(args: argparse.Namespace) -> int:
    folder = Path(args.source)
    report = _inspect_native(folder) if is_native(folder) else _inspect_checkpoint(folder)
    if args.json:
        print(json.dumps({"folder": str(folder), **report}, ensure_ascii=False))
    else:
        print(folder)
        print(inspect_checkpoint.text(report))
    return EXIT_OK


def _inspect_native(folder: Path) -> dict[str, Any]:
    with open_native(folder) as native:
        config = native.model_config()
        infos = {p: [native.params[p.path].info] for p in check_params(native, config)}
        extra = [tensor.info.nbytes for tensor in native.extra.values()]
        unused = {"in extra.safetensors": (len(extra), sum(extra))} if extra else {}
        return inspect_checkpoint.report(config, "native", _stored(infos), unused)


def _inspect_checkpoint(folder: Path) -> dict[str, Any]:
    with open_source(folder) as source:
        config = ModelConfig.from_hf(source.config, where=str(folder / CONFIG_NAME))
        matched = match(config, source.tensors, str(folder))
        counted: set[str] = set()
        infos = {}
        for param, pairs in matched.params:
            # Where two parameters share a tensor, its bytes are counted with the first.
            infos[param] = [i for _, i in pairs if i is not None and i.name not in counted]
            counted |= {info.name for info in infos[param]}
        unused = {
            group: (len(names), sum(source.tensors[name].nbytes for name in names))
            for group, names in matched.unused.items()
        }
        return inspect_checkpoint.report(config, "Hugging Face", _stored(infos), unused)


def _stored(infos: Mapping[Param, Sequence[Any]]) -> list[inspect_checkpoint.Stored]:
    stored = []
    for param, found in infos.items():
        dtypes = {str(info.dtype) for info in found}
        dtype = dtypes.pop() if len(dtypes) == 1 else "mixed"
        stored.append(inspect_checkpoint.Stored(param, sum(i.nbytes for i in found), dtype))
    return stored


def _verify(args: argparse.Namespace) -> int:
    folder, workers = Path(args.source), _workers(args)
    original = None if args.original is None else Path(args.original)
    if args.quick and original is not None:
        raise UserError("--quick does not read a source", "Leave it out, or --quick.", EXIT_USAGE)
    progress = ProgressLine(args.quiet)
    try:
        if is_native(folder):
            full = args.full or original is not None
            source = (original or _recorded_source(folder)) if full else None
            verdict = verify_native(folder, source, workers, progress)
        elif args.full or original is not None:
            raise UserError(
                f"{folder}: has no {MANIFEST_NAME}; only a native folder is compared with a source",
                "Give the native folder first: verify NATIVE SOURCE.",
                EXIT_USAGE,
            )
        else:
            verdict = verify_checkpoint(folder, workers, progress)
    finally:
        progress.end()
    _print_verdict(args, verdict)
    return EXIT_FAILURE if verdict.problems else EXIT_OK


def _recorded_source(folder: Path) -> Path:
    with open_native(folder) as native:
        source = native.manifest.get("source")
        recorded = source.get("folder") if isinstance(source, dict) else None
    if not isinstance(recorded, str) or not Path(recorded).is_dir():
        raise UserError(
            f"{folder}: was converted from {recorded}, which is not here",
            "Say where it is: verify NATIVE SOURCE.",
            EXIT_USAGE,
        )
    return Path(recorded)


def _print_verdict(args: argparse.Namespace, verdict: Verdict) -> None:
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
    for problem in problems[:PROBLEMS_SHOWN]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > PROBLEMS_SHOWN:
        print(f"error: and {len(problems) - PROBLEMS_SHOWN} more", file=sys.stderr)
    compared = f", {verdict.compared} equal to the source bit for bit" if verdict.compared else ""
    checked = "names, shapes, dtypes, values" + ", hashes" * (verdict.kind == "native")
    what = f"{args.source}: {verdict.kind}, {verdict.tensors} tensors"
    if problems:
        print(f"{what}: NOT sound, {len(problems)} problems")
    else:
        print(f"{what}: sound ({checked}{compared})")


def _workers(args: argparse.Namespace) -> int:
    if args.workers is None:
        return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    if not 1 <= args.workers <= MAX_WORKERS:
        raise UserError(
            f"--workers {args.workers}: must be 1 to {MAX_WORKERS}", exit_code=EXIT_USAGE
        )
    return args.workers


def _one_of(flag: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{flag} {value}: must be {', '.join(allowed)}", "", EXIT_USAGE)


def _tensors(conversion: Conversion) -> list[str]:
    return [tensor.name for file in conversion.files for tensor in file.tensors]


def _say(args: argparse.Namespace) -> Any:
    return (lambda _line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))


_COMMANDS = {
    "hf-to-native": _hf_to_native,
    "native-to-hf": _native_to_hf,
    "inspect": _inspect,
    "verify": _verify,
}
