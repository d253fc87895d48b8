"""Shared by all tests. bailing_jax comes first: it sets XLA's CPU scheduler before jax starts."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest

import bailing_jax  # noqa: F401  (imported for its effect, see above)
from pallas_kernels import compat


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this jax can't run at all: deselected, as by `-m`, not skipped."""
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
