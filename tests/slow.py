"""Which cases of a test run by default, where all of them take minutes; the others are `slow`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(kept: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrised test: all but the `kept` ones marked `slow`."""
    return [
        case if case in kept else pytest.param(*_values(case), marks=pytest.mark.slow)
        for case in cases
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
