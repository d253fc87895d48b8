"""The persistent compile cache: a program compiled once is read from disk the next time.

jax does the caching; this module chooses the directory, bounds it, clears away what was damaged
and counts. The default directory carries jaxlib's version and the CPU's features in its name:
XLA compiles for the very CPU it runs on, and a program from another machine's cache may crash.
A cache may also lie in object storage, which jax reads and writes through etils and fsspec; there
is nothing to bound and to clear away there. Of several processes only process 0 writes. jax is
imported only when the cache is switched on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bailing_jax.errors import EXIT_USAGE, UserError

OFF = "off"
# Of the default directory, checked at each start. jax's own limit (jax_compilation_cache_max_size)
# is left to those who set it: it needs `filelock`, which nothing here installs, takes a lock for
# every read, and fails where two of jax 0.10's processes meet.
MAX_BYTES = 2 * 2**30

# The object stores etils knows, and the package with which fsspec reaches each.
_STORES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}

_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
_EVENTS = "/jax/compilation_cache/"
# A request is a program asked for; jax counts a "miss" only when it sets out to write one.
_REQUESTS, _HITS, _WRITES = "compile_requests_use_cache", "cache_hits", "cache_misses"
_events = dict.fromkeys((_REQUESTS, _HITS, _WRITES), 0)
# jax's defaults keep only what took a second; answers of a small model wait for many short ones.
_KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
# Lines of /proc/cpuinfo that say what code the CPU can run (x86 and Arm).
_CPU_LINES = (
    "vendor_id", "cpu family", "model", "model name", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
)  # fmt: skip

Report = Callable[[str], None]


@dataclass(frozen=True)
class Counts:
    """Programs found in the cache, and programs compiled because they were not."""

    hits: int
    misses: int


class CompileCache:
    """The cache of this process; `enable` makes one.

    Attributes:
        directory: where programs are kept, an address in object storage as a string; None when
            there is no cache.
    """

    def __init__(self, directory: Path | str | None, report: Report) -> None:
        self.directory = directory
        self._report = report
        self._start = dict(_events)
        self._entries = _num_entries(directory) if isinstance(directory, Path) else 0

    def counts(self) -> Counts:
        """Hits and misses since the cache was switched on."""
        requests, hits, _ = self._events()
        return Counts(hits, requests - hits)

    def summary(self, since: Counts = Counts(0, 0)) -> str:
        """As in "compiled in 3.8 s (cache: 2 hits, 5 misses)": what is in the parentheses."""
        if self.directory is None:
            return "cache: off"
        now = self.counts()
        hits, misses = now.hits - since.hits, now.misses - since.misses
        return f"cache: {hits} hit{_s(hits)}, {misses} miss{'es' * (misses != 1)}"

    def close(self) -> None:
        """Clear away damaged entries, if any were met; harmless to call twice or never.

        jax compiles what it can't read from the cache, but never replaces it: without this, an
        entry that a killed process left half written would be compiled again in every run.
        """
        if not isinstance(self.directory, Path):
            return
        lost = self._events()[2] - (_num_entries(self.directory) - self._entries)
        if lost <= 0:
            return
        removed = _remove_damaged(self.directory)
        self._entries -= removed + lost
        again = "" if removed else "; should that come again, remove the directory"
        self._report(
            f"compile cache: {lost} program{_s(lost)} could not be read from or written to "
            f"{self.directory}; {removed} damaged file{_s(removed)} removed{again}"
        )

    def _events(self) -> tuple[int, int, int]:
        found = [_events[name] - self._start[name] for name in (_REQUESTS, _HITS, _WRITES)]
        return found[0], found[1], found[2]


def enable(choice: str | None, report: Report) -> CompileCache:
    """Switch the cache on, before anything is compiled.

    Args:
        choice: a directory, "off", or None for the default: see `find_directory`.
        report: called with a line when the directory can't be used; then there is no cache.

    Raises:
        UserError: an address in a kind of storage that jax can't use.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    config: Any = jax.config
    # Only the environment switches that off (JAX_ENABLE_COMPILATION_CACHE).
    directory = find_directory(choice) if config.jax_enable_compilation_cache else None
    if directory is not None and (reason := _why_not(directory)):
        report(f"compile cache: {directory} can't be used: {reason}; going on without a cache")
        directory = None
    if isinstance(directory, Path) and directory.parent == default_base():
        prune(directory.parent, MAX_BYTES)
    reset_cache()  # jax looks for the directory once, at the first program
    config.update("jax_compilation_cache_dir", None if directory is None else str(directory))
    for option, value in _KEEP_ALL.items():
        if option.upper() not in os.environ:
            config.update(option, value)
    # One line in `close` says it for all of them.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    _listen()
    return CompileCache(directory, report)


def find_directory(choice: str | None) -> Path | str | None:
    """Where the cache is: `choice`, else JAX_COMPILATION_CACHE_DIR, else the user's own cache.

    None when `choice` is "off". A directory that somebody named is used as it is; gs://bucket/path
    and the like stay a string.

    Raises:
        UserError: an address in a kind of storage that jax can't use.
    """
    if choice == OFF:
        return None
    named = choice or os.environ.get(_DIRECTORY)
    if named and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", named)):
        if scheme[1] == "file":
            return Path(named[scheme.end() :]).absolute()
        if scheme[1] not in _STORES:
            stores = ", ".join(f"{store}://" for store in _STORES)
            raise UserError(
                f"{'--compile-cache' if choice else _DIRECTORY} = {named}; allowed: a folder, or "
                f"an address that begins with {stores}",
                exit_code=EXIT_USAGE,
            )
        return named.rstrip("/")
    if named:
        return Path(named).expanduser().absolute()
    from jaxlib.version import __version__ as jaxlib_version

    facts = repr(sorted(cpu_facts().items())).encode()
    key = f"jaxlib-{jaxlib_version}-{hashlib.sha256(facts).hexdigest()[:12]}"
    return default_base() / key


def default_base() -> Path:
    """The folder of the default directories: one for each jaxlib and kind of CPU."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the specification has others ignored
        base = Path(cache)
    else:
        home = Path(os.path.expanduser("~"))
        base = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "bailing_jax" / "xla"


def cpu_facts() -> dict[str, str]:
    """What is known about the CPU's model and features; flags in alphabetical order."""
    facts = {"machine": platform.machine()}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {**facts, "model name": _brand() or platform.processor()}
    for line in text.partition("\n\n")[0].splitlines():  # the first core's
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in _CPU_LINES:
            facts[name] = (
                " ".join(sorted(value.split())) if name in ("flags", "Features") else value
            )
    return facts


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory; 0 when there is none."""
    return sum(size for _, size, _ in _files(directory))


def prune(base: Path, max_bytes: int) -> int:
    """Remove the files below `base` that were not used for longest, until the rest is no larger.

    Returns:
        The number of files removed.
    """
    files = sorted(_files(base))
    excess = sum(size for _, size, _ in files) - max_bytes
    removed = 0
    for _, size, path in files:
        if excess <= 0:
            break
        excess -= size
        removed += _remove(path)
    return removed


def _files(directory: Path) -> Iterator[tuple[float, int, str]]:
    """(last use, bytes, path) of every file below a directory. Files may go away meanwhile."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except OSError:
                continue
            yield max(status.st_atime, status.st_mtime), status.st_size, path


def _remove(path: str | Path) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _why_not(directory: Path | str) -> str:
    """Why nothing can be written there; empty if something can."""
    try:
        if isinstance(directory, Path):
            _check_writable(directory)
        else:
            _check_store(directory)
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # whatever a store's own library raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _check_store(address: str) -> None:
    """Write an object as jax will, and remove it."""
    package = _STORES[address.partition("://")[0]]
    try:
        from etils import epath

        probe = epath.Path(address) / f"probe-{os.getpid()}"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except ImportError as error:
        raise OSError(f"package {error.name} is missing (pip install {package})") from error


def _check_writable(directory: Path) -> None:
    """Create a directory, if need be for this user alone, and a file in it for a moment."""
    # Who can write here can make this user run anything.
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _num_entries(directory: Path) -> int:
    try:
        return sum(name.endswith("-cache") for name in os.listdir(directory))
    except OSError:
        return 0


def _remove_damaged(directory: Path) -> int:
    """Remove the entries that can't be unpacked."""
    entries = [path for path in directory.glob("*-cache") if not _is_whole(path)]
    return sum(_remove(path) for path in entries)


def _is_whole(path: Path) -> bool:
    """Whether an entry can be unpacked; True where that can't be told.

    jax packs with zlib unless zstandard is there; both carry their own end and checksum.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return True
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return True
    try:
        zlib.decompress(data)
    except zlib.error:
        return False
    return True


def _listen() -> None:
    """Count jax's events from now on, once however often this is called."""
    import jax

    global _is_listening
    if not _is_listening:
        jax.monitoring.register_event_listener(_count)
        _is_listening = True


_is_listening = False


def _count(event: str, **_details: object) -> None:
    name = event.removeprefix(_EVENTS)
    if name in _events:
        _events[name] += 1


def _brand() -> str:
    """A Mac's CPU by name, or nothing."""
    try:
        return subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True, text=True, timeout=5, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""


def _s(count: int) -> str:
    return "" if count == 1 else "s"
