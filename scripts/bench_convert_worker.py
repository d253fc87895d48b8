"""One step of the converter's benchmark, in a process of its own: run, time, print one JSON line.

`bench_convert.py` starts this file for every step, so that none inherits another's threads or
memory. The time is that of the command itself; starting Python and importing the converter (a
constant that matters to gigabytes and not to terabytes) is left out for all steps alike.

    copy SRC DST               files one by one with shutil.copyfile, then fsync of each
    convert ARGUMENTS...       a command of the converter, with --json
    stream SRC DST PREFIX      hf-to-native of the parameters whose names begin with PREFIX only
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The last line of standard output starts so.
RESULT_MARK = "bench-result: "

PRINTED = ("tensors", "tensor_bytes", "written_bytes", "workers", "compared")


def copy(source: str, target: str) -> dict[str, Any]:
    """Copy a folder of files, and wait until the disk has them."""
    folder = Path(target)
    folder.mkdir()
    for path in sorted(Path(source).iterdir()):
        shutil.copyfile(path, folder / path.name)
    for path in [*sorted(folder.iterdir()), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return {}


def convert(*arguments: str) -> dict[str, Any]:
    """Run a command of the converter; some of what it printed."""
    from convert.__main__ import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main([*arguments, "--json"])
    if code:
        sys.stderr.write(output.getvalue())
        raise SystemExit(code)
    printed = json.loads(output.getvalue())
    return {key: printed[key] for key in PRINTED if key in printed}


def stream(source: str, target: str, prefix: str) -> dict[str, Any]:
    """Convert a part of a checkpoint, the way a whole one is."""
    from convert.progress import ProgressLine
    from convert.source import open_source
    from convert.to_native import plan_native
    from convert.writer import write

    with open_source(Path(source)) as opened:
        _, _, whole = plan_native(opened)
        files = [
            dataclasses.replace(
                file, tensors=tuple(t for t in file.tensors if t.name.startswith(prefix))
            )
            for file in whole.files
        ]
        part = dataclasses.replace(
            whole, files=tuple(file for file in files if file.tensors), last=lambda _records: {}
        )
        progress = ProgressLine(quiet=True)
        outcome = write(part, Path(target), 1, progress)
    return {
        "written_bytes": outcome.written,
        "tensors": sum(len(file.tensors) for file in part.files),
        "write_seconds": progress.seconds,
    }


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "copy": copy,
    "convert": convert,
    "stream": stream,
}


def main() -> int:
    """Run the step."""
    parser = argparse.ArgumentParser(description="one step of bench_convert.py")
    parser.add_argument("--limit", type=int, help="bytes of address space this process may have")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (args.limit, args.limit))
    if args.step != "copy":
        import convert.commands  # noqa: F401  (before the clock starts)
    from convert.progress import peak_memory

    start = time.perf_counter()
    found = STEPS[args.step](*args.arguments)
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "peak_memory_bytes": peak_memory()} | found
    print(RESULT_MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
