"""What the converter's commands do, once their arguments are parsed.

stdout carries the result, stderr the rest. Every folder is checked whole before the first long
read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, Interrupted, UserError
from bailing_jax.params import Param, Source
from convert import inspect_checkpoint
from convert.inspect_checkpoint import Stored
from convert.native import MANIFEST_NAME, check_params, is_native, open_native
from convert.plan import match
from convert.progress import ProgressLine
from convert.reports import print_outcome, print_plan, print_verdict, say, size
from convert.safetensors_file import TensorInfo
from convert.source import CONFIG_NAME, open_source
from convert.to_hf import plan_hf
from convert.to_native import DTYPE_CHOICES, KEEP, plan_native
from convert.to_orbax import is_export_of, plan_orbax
from convert.verify import verify_checkpoint, verify_native
from convert.writer import (
    Conversion,
    Outcome,
    already_exists,
    check_apart,
    write,
)

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
    if args.format == "orbax":
        return _to_orbax(args)
    if is_native(source):
        raise UserError(
            f"{source}: is a native folder already",
            "For the way back: native-to-hf. To look at it: inspect, verify.",
            EXIT_USAGE,
        )
    with open_source(source) as opened:
        config, matched, conversion = plan_native(opened, args.dtype, args.decay_layer_offset)
        unused = {group: len(names) for group, names in matched.unused.items()}
        return _convert(args, config, conversion, unused)


def _to_orbax(args: argparse.Namespace) -> int:
    """From a native folder, or by way of one beside the output, which is removed afterwards."""
    source, output = Path(args.source), Path(os.path.abspath(args.output))
    if is_native(source):
        if args.dtype != KEEP or args.decay_layer_offset is not None:
            raise UserError(
                f"{source}: is native; --dtype and --decay-layer-offset were settled when it was "
                "made",
                "Leave them out, or start from the Hugging Face folder.",
                EXIT_USAGE,
            )
        with open_native(source) as native:
            return _convert(args, *plan_orbax(native), {})
    between = output.parent / f".{output.name}.native"
    with open_source(source) as opened:
        config, matched, conversion = plan_native(opened, args.dtype, args.decay_layer_offset)
        if args.dry_run:
            conversion.notes.append("orbax: twice these bytes of disk while it is being made")
            unused = {group: len(names) for group, names in matched.unused.items()}
            return _convert(args, config, conversion, unused)
        check_apart(source, output)
        if is_export_of(output, conversion.identity):
            print_outcome(args, output, conversion, Outcome(0, 0, already_complete=True), 0.0)
            return EXIT_OK
        if os.path.lexists(output):
            raise already_exists(output)
        say(args)(f"1 of 2: native, in {between}")
        progress = ProgressLine(args.quiet)
        try:
            write(conversion, between, _workers(args), progress)
        finally:
            progress.end()
    say(args)("2 of 2: Orbax, and reading it back")
    with open_native(between) as native:
        code = _convert(args, *plan_orbax(native), {})
    shutil.rmtree(between)
    return code


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
        print_plan(args, config, conversion, unused, workers)
        return EXIT_OK
    tell = say(args)
    decay = "" if config.lightning is None else f", decay layer offset {config.decay_layer_offset}"
    tell(
        f"{config.architecture}{decay}: {conversion.num_tensors} tensors, "
        f"{size(conversion.data_bytes)}"
    )
    for group, count in unused.items():
        tell(f"kept, not used: {count} tensors, {group}")
    progress = ProgressLine(args.quiet)
    try:
        outcome = write(conversion, output, workers, progress)
    except KeyboardInterrupt:
        progress.end()
        tell("what is finished is kept: run the same command to go on")
        raise Interrupted from None
    finally:
        progress.end()
    print_outcome(args, output, conversion, outcome, progress.seconds)
    return EXIT_OK


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
        infos = [(p, native.params[p.path].info) for p in check_params(native, config)]
        stored = [Stored(param, info.nbytes, str(info.dtype)) for param, info in infos]
        extra = [tensor.info.nbytes for tensor in native.extra.values()]
        unused = {"in extra.safetensors": (len(extra), sum(extra))} if extra else {}
        return inspect_checkpoint.report(config, "native", stored, unused)


def _inspect_checkpoint(folder: Path) -> dict[str, Any]:
    with open_source(folder) as source:
        config = ModelConfig.from_hf(source.config, where=str(folder / CONFIG_NAME))
        matched = match(config, source.tensors, str(folder))
        unused = {
            group: (len(names), sum(source.tensors[name].nbytes for name in names))
            for group, names in matched.unused.items()
        }
        stored = [_stored(param, pairs) for param, pairs in matched.params]
        return inspect_checkpoint.report(config, "Hugging Face", stored, unused)


def _stored(param: Param, pairs: Sequence[tuple[Source, TensorInfo | None]]) -> Stored:
    """A parameter's share of the tensors it is made of."""
    found = [(source, info) for source, info in pairs if info is not None]
    nbytes = 0
    for source, info in found:
        axis, start, stop = source.take or (0, 0, source.view[0])
        nbytes += info.nbytes // source.view[axis] * (stop - start)
    dtypes = {str(info.dtype) for _, info in found}
    return Stored(param, nbytes, dtypes.pop() if len(dtypes) == 1 else "mixed")


def _verify(args: argparse.Namespace) -> int:
    folder, workers = Path(args.source), _workers(args)
    original = None if args.original is None else Path(args.original)
    if args.quick and original is not None:
        raise UserError("--quick does not read a source", "Leave it out, or --quick.", EXIT_USAGE)
    progress = ProgressLine(args.quiet)
    try:
        if is_native(folder):
            if original is not None and is_native(original):
                raise UserError(
                    f"{original}: is a native folder itself",
                    "Give the Hugging Face folder that was converted.",
                    EXIT_USAGE,
                )
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
    print_verdict(args, verdict)
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


_COMMANDS = {
    "hf-to-native": _hf_to_native,
    "native-to-hf": _native_to_hf,
    "inspect": _inspect,
    "verify": _verify,
}
