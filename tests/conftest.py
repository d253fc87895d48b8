"""Shared by all tests. bailing_jax comes first: it sets XLA's CPU scheduler before jax starts."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import bailing_jax  # noqa: F401  (imported for its effect, see above)

# isort: split
import compiling
import jax
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels import compat

# Where compiled programs are kept, how long one must have taken, and whether LLVM optimises none;
# jax's own names.
_COMPILING = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_disable_most_optimizations",
)


# These take longest. Of two processes that take a file each, one must not begin such a file when
# the other is about to be done.
_LONGEST = (
    "test_on_eight_devices.py", "test_lightning_gpu_prefill.py", "test_exact.py", "test_run.py",
    "test_processes.py",
    "test_against_reference.py", "test_goldens.py", "test_generate.py", "test_gradients.py",
    "test_step.py", "test_trained_decay.py", "test_dry_run.py", "test_schedules.py",
    "test_precision.py", "test_faults.py", "test_llm_regressions.py", "test_laws.py",
    "test_lightning_gpu_gradients.py", "test_soak.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist hand out files in the order of collection, where it is there."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    if compat.has_mosaic_gpu():
        # Threads of XLA's CPU client, read when it starts. The interpreter's wait for each other in
        # calls back to Python: of as many as there are cores, all may wait, and nobody goes on.
        os.environ.setdefault("NPROC", "8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; what this jax can't run at all is deselected, as by `-m`."""
    place = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if compat.has_mosaic_gpu():
        return
    without = [item for item in items if item.get_closest_marker("mosaic_interpreter")]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of the test's own, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither this process nor those it starts touch the user's compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        # Every engine of every test, and of every process a test starts, checks its invariants.
        patch.setenv("BAILING_DEBUG", "1")
        yield


@pytest.fixture(scope="session")
def programs_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This process's own folder: of two that shared one, each might read what the other has half
    written."""
    folder = tmp_path_factory.mktemp("programs")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _programs_compile_once(
    request: pytest.FixtureRequest, programs_of_the_run: Path
) -> Iterator[None]:
    """A program that some test of this run compiled already is found again.

    By what it computes, the compiler's version and its flags: changed code is another program, so
    nothing stale can be found. Files marked `compiles` are about compiling, and do it themselves.
    """
    before = [cast(Any, jax.config).values[name] for name in _COMPILING]
    afresh = request.node.get_closest_marker("compiles") is not None
    unoptimised = request.node.get_closest_marker("unoptimised") is not None
    with pytest.MonkeyPatch.context() as patch:
        if unoptimised:
            compiling.leave_out_fusion_emitters(patch)
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in commands too
        _compile_so(None if afresh else str(programs_of_the_run), 0.1, unoptimised or before[2])
        yield
        _compile_so(*before)


def _compile_so(*values: Any) -> None:
    for name, value in zip(_COMPILING, values, strict=True):
        cast(Any, jax.config).update(name, value)
    compilation_cache.reset_cache()  # jax looks for the folder once, at the first program
