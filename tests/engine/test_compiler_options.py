"""What XLA is told for a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from bailing_jax.engine.spread import Spread
from bailing_jax.layers.parallel import ONE


def options(monkeypatch: pytest.MonkeyPatch, platform: str, rows: int) -> dict[str, Any] | None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform)])
    model: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=8192), parallel=ONE)
    return Spread(model, (), None).compiler_options(rows)


def test_small_steps_on_a_tpu_take_less_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"xla_tpu_scoped_vmem_limit_kib": "8192"}
    assert options(monkeypatch, "tpu", 64) == small
    # More rows than fit it several times over stay with the compiler's own limit.
    assert options(monkeypatch, "tpu", 65) is None
    # Other compilers refuse what they do not know.
    assert options(monkeypatch, "cpu", 1) is None
    assert options(monkeypatch, "gpu", 1) is None
