"""generate --profile: a trace of what the device did, for xprof or Perfetto.

The folder is checked before the model loads: finding out after minutes that the trace can't be
written would be a pity. Profiling starts after loading, so that the trace is of the answers.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bailing_jax.errors import EXIT_USAGE, UserError


def check(directory: str | Path | None) -> None:
    """Create the folder; None asks for no profile and is always right.

    Raises:
        UserError: it can't be created or written.
    """
    if directory is None:
        return
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--profile {directory}: can't be written: {error.strerror or error}",
            "Give a folder; it is created.",
            EXIT_USAGE,
        ) from error


@contextlib.contextmanager
def profiling(directory: str | Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Profile what runs inside; None does nothing.

    The trace is written when the block ends, also by an error or by Ctrl-C.

    Args:
        directory: where the trace goes; `check` has created it.
        say: prints a line on stderr.

    Raises:
        UserError: the folder can't be written.
    """
    if directory is None:
        yield
        return
    check(directory)
    import jax

    jax.profiler.start_trace(directory)
    try:
        yield
    finally:
        say(_finish(Path(directory)))


def _finish(folder: Path) -> str:
    """Write the trace, and say where it lies and how to look at it."""
    import jax

    try:
        jax.profiler.stop_trace()
    except (OSError, RuntimeError) as error:
        # The answers are there; losing them for the sake of the trace would help nobody.
        return f"profile: could not be written to {folder}: {error}"
    # The profiler makes a folder of its own for every trace, named by the time.
    traces = sorted(path for path in folder.glob("plugins/profile/*") if path.is_dir())
    return (
        f"profile: {traces[-1] if traces else folder}\n"
        f"  to see it: pip install xprof, then xprof --logdir {folder}; or open the .trace.json.gz "
        "in https://ui.perfetto.dev"
    )
