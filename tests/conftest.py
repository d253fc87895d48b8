"""Shared by all tests. bailing_jax comes first: it sets XLA's CPU scheduler before jax starts."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

import bailing_jax  # noqa: F401  (imported for its effect, see above)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of the test's own, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
