"""The compile cache: a second process is spared the work, and nothing the directory holds or
lacks can break a run or change what it computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from bailing_jax import compile_cache
from bailing_jax.compile_cache import default_base, find_directory, prune, size_of
from bailing_jax.errors import EXIT_USAGE, UserError

pytestmark = pytest.mark.compiles

PROGRAM = """
import json, sys, warnings
warnings.showwarning = lambda message, *_args, **_kwargs: said.append(f"warning: {message}")
said = []
from bailing_jax import compile_cache
assert "jax" not in sys.modules
choice, = sys.argv[1:] or [None]
cache = compile_cache.enable(choice, said.append)
import jax, jax.numpy as jnp
start = cache.counts()
first = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(16.0).reshape(4, 4))
middle = cache.counts()
second = jax.jit(lambda x: jnp.sort(x, axis=0).cumsum())(first)
cache.close()
print(json.dumps({
    "result": second.tolist(),
    "hits": cache.counts().hits,
    "misses": cache.counts().misses,
    "summary": cache.summary(),
    "second": cache.summary(since=middle),
    "start": [start.hits, start.misses],
    "directory": cache.directory and str(cache.directory),
    "said": said,
}))
"""


def start(home: Path, *args: object, **variables: str) -> subprocess.Popen[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    environment = {**keep, "HOME": str(home), "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, args)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def run(home: Path, *args: object, **variables: str) -> dict[str, Any]:
    return end(start(home, *args, **variables))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A home whose cache one process has filled, and what that process said."""
    home = tmp_path_factory.mktemp("home")
    return home, run(home)


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*-cache"))


def test_a_second_process_hits_and_is_told_so(filled: tuple[Path, dict[str, Any]]) -> None:
    home, first = filled
    directory = Path(first["directory"])
    assert directory.is_relative_to(home)
    assert first["hits"] == 0
    assert first["misses"] == len(entries(directory)) >= 2
    assert first["summary"] == f"cache: 0 hits, {first['misses']} misses"
    assert (first["start"], first["said"]) == ([0, 0], [])
    again = run(home)
    assert (again["hits"], again["misses"]) == (first["misses"], 0)
    assert again["summary"] == f"cache: {first['misses']} hits, 0 misses"
    assert again["second"] == "cache: 1 hit, 0 misses"
    assert (again["result"], again["said"]) == (first["result"], [])
    assert directory.stat().st_mode & 0o077 == 0


def test_off_writes_nothing(tmp_path: Path, filled: tuple[Path, dict[str, Any]]) -> None:
    """Whatever the environment says."""
    home = tmp_path / "home"
    home.mkdir()
    named = str(tmp_path / "named")
    off = run(home, "off", JAX_COMPILATION_CACHE_DIR=named)
    assert (off["directory"], off["summary"], off["said"]) == (None, "cache: off", [])
    assert off["result"] == filled[1]["result"]
    assert (list(home.iterdir()), Path(named).exists()) == ([], False)


def test_a_directory_that_cannot_be_used_is_one_line(
    tmp_path: Path, filled: tuple[Path, dict[str, Any]]
) -> None:
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run(tmp_path, directory)
        (line,) = done["said"]
        assert line.startswith(f"compile cache: {directory} can't be used: ")
        assert (done["directory"], done["summary"]) == (None, "cache: off")
        assert done["result"] == filled[1]["result"]
    assert (tmp_path / "file").read_text() == "x"


def test_two_processes_at_once_agree_and_leave_a_sound_cache(
    tmp_path: Path, filled: tuple[Path, dict[str, Any]]
) -> None:
    both = [start(tmp_path, tmp_path / "shared") for _ in range(2)]
    for done in map(end, both):
        assert (done["result"], done["said"]) == (filled[1]["result"], [])
        assert done["hits"] + done["misses"] == filled[1]["misses"]
    assert run(tmp_path, tmp_path / "shared")["misses"] == 0


def damage_in_three_ways(directory: Path) -> None:
    """Cut short, empty, and garbled in the middle."""
    for number, path in enumerate(entries(directory)):
        data = path.read_bytes()
        middle = len(data) // 2
        garbled = data[:middle] + bytes(255 - b for b in data[middle : middle + 9])
        path.write_bytes((data[:middle], b"", garbled + data[middle + 9 :])[number % 3])


def test_damaged_entries_change_nothing_and_are_gone_after_one_run(
    tmp_path: Path, filled: tuple[Path, dict[str, Any]]
) -> None:
    wanted = filled[1]
    count = wanted["misses"]
    run(tmp_path, tmp_path / "cache")
    damage_in_three_ways(tmp_path / "cache")
    done = run(tmp_path, tmp_path / "cache")
    assert (done["result"], done["hits"], done["misses"]) == (wanted["result"], 0, count)
    (line,) = done["said"]
    assert f"{count} programs could not be read from or written to" in line
    assert f"{count} damaged files removed" in line
    assert entries(tmp_path / "cache") == []
    refilled = run(tmp_path, tmp_path / "cache")
    assert (refilled["result"], refilled["said"]) == (wanted["result"], [])
    assert len(entries(tmp_path / "cache")) == count


def test_an_entry_that_unpacks_to_nonsense_is_compiled_again(
    tmp_path: Path, filled: tuple[Path, dict[str, Any]]
) -> None:
    run(tmp_path, tmp_path / "cache")
    for path in entries(tmp_path / "cache"):
        path.write_bytes(zlib.compress(b"no program at all" * 50))
    done = run(tmp_path, tmp_path / "cache")
    assert (done["result"], done["hits"]) == (filled[1]["result"], 0)
    (line,) = done["said"]
    assert line.endswith("0 damaged files removed; should that come again, remove the directory")


# Which directory.


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    return monkeypatch


def test_the_flag_wins_then_the_variable_then_the_users_cache(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert default_base() == tmp_path / ".cache/bailing_jax/xla"
    default = find_directory(None)
    assert default is not None
    assert default.parent == default_base()
    environment.setenv("XDG_CACHE_HOME", "relative")
    assert find_directory(None) == default
    environment.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert find_directory(None) == Path("/elsewhere/bailing_jax/xla", default.name)
    environment.setenv("JAX_COMPILATION_CACHE_DIR", "/named")
    assert find_directory(None) == Path("/named")
    assert find_directory("~/given") == tmp_path / "given"
    assert find_directory("given") == Path.cwd() / "given"
    assert find_directory("off") is None


def test_a_mac_has_its_own_place(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setattr(sys, "platform", "darwin")
    assert default_base() == tmp_path / "Library/Caches/bailing_jax/xla"


def test_another_cpu_or_jaxlib_has_another_directory(environment: pytest.MonkeyPatch) -> None:
    """XLA compiles for the features it finds; with others the program may crash."""
    here = find_directory(None)
    facts = compile_cache.cpu_facts()
    assert find_directory(None) == here
    assert len(facts) >= 2
    environment.setattr(compile_cache, "cpu_facts", lambda: {**facts, "flags": "sse2"})
    less = find_directory(None)
    environment.setattr(compile_cache, "cpu_facts", lambda: facts)
    environment.setattr("jaxlib.version.__version__", "9.9.9")
    newer = find_directory(None)
    assert len({here, less, newer}) == 3
    assert newer is not None
    assert newer.name.startswith("jaxlib-9.9.9-")


# Its size.


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    """Directories of jaxlibs that are gone count too."""
    now = time.time()
    files = {}
    for age, name in enumerate(("new/a-cache", "old/b-cache", "new/c-cache", "old/d-cache")):
        files[name] = tmp_path / name
        files[name].parent.mkdir(exist_ok=True)
        files[name].write_bytes(b"x" * 100)
        os.utime(files[name], (now - age, now - 1000))
    # All written at one time: what counts is when they were read.
    assert size_of(tmp_path) == 400
    assert prune(tmp_path, 400) == 0
    assert prune(tmp_path, 250) == 2
    assert [name for name, path in files.items() if path.exists()] == ["new/a-cache", "old/b-cache"]
    assert size_of(tmp_path) == 200
    assert (prune(tmp_path / "nowhere", 0), size_of(tmp_path / "nowhere")) == (0, 0)


def test_only_the_default_directory_is_bounded(tmp_path: Path) -> None:
    """A sparse file stands for two gigabytes; in a directory that somebody named it stays."""
    base = tmp_path / ".cache/bailing_jax/xla"
    for directory in (base / "jaxlib-0.0.1-abc", tmp_path / "named"):
        directory.mkdir(parents=True)
        with (directory / "huge-cache").open("wb") as file:
            file.truncate(compile_cache.MAX_BYTES + 1)
    run(tmp_path)
    run(tmp_path, tmp_path / "named")
    assert not (base / "jaxlib-0.0.1-abc/huge-cache").exists()
    assert (tmp_path / "named/huge-cache").exists()
    assert len(entries(tmp_path / "named")) > 1


# Object storage.

STORED = """
import fsspec
from fsspec.implementations.memory import MemoryFileSystem

class Store(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store = {}
    pseudo_dirs = [""]

fsspec.register_implementation("gs", Store, clobber=True)
fsspec.register_implementation("gcs", Store, clobber=True)
""" + PROGRAM + """
import json, jax
kept = sorted(Store.store)
jax.clear_caches()
from jax.experimental.compilation_cache.compilation_cache import reset_cache
reset_cache()
again = compile_cache.enable(choice, said.append)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(16.0).reshape(4, 4))
print(json.dumps({"kept": kept, "again": again.counts().hits, "said": said}))
"""


def stored(tmp_path: Path, address: str, program: str = STORED) -> list[dict[str, Any]]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", program, address], cwd=tmp_path, text=True, capture_output=True,
        env={**keep, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_programs_are_kept_in_object_storage(tmp_path: Path) -> None:
    """A store in memory stands for the bucket; what is between is jax's and fsspec's own."""
    first, second = stored(tmp_path, "gs://bucket/programs/")
    assert first["directory"] == "gs://bucket/programs"
    assert first["misses"] > 0
    assert second["said"] == []
    assert second["again"] > 0
    assert len(second["kept"]) >= 2
    assert all("bucket/programs/" in name for name in second["kept"])
    assert not any("probe" in name for name in second["kept"])
    assert [*tmp_path.iterdir()] == []  # nothing of the kind gs:/bucket


def test_a_bucket_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    """Here for want of the bucket's own package, which nothing installs."""
    without = "import sys\nsys.modules['gcsfs'] = None\n" + PROGRAM
    (first,) = stored(tmp_path, "gs://bucket/programs", without)
    assert first["directory"] is None
    (line,) = first["said"]
    assert line.startswith("compile cache: gs://bucket/programs can't be used: ")
    assert "gcsfs" in line
    assert "going on without a cache" in line


def test_an_address_jax_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        find_directory("memory://programs")
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.message.startswith("--compile-cache = memory://programs; allowed: ")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "http://host/programs")
    with pytest.raises(UserError, match="JAX_COMPILATION_CACHE_DIR = http://host/programs"):
        find_directory(None)


def test_a_file_address_is_a_folder(tmp_path: Path) -> None:
    assert find_directory(f"file://{tmp_path}/programs") == tmp_path / "programs"
