"""Seeds that nobody named: never the same twice, and the same in every process of a job."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bailing_jax.engine.seeds import FreshSeeds


def test_no_seed_comes_twice_and_no_run_is_like_another() -> None:
    one, other = FreshSeeds(), FreshSeeds()
    found = [seeds.next() for _ in range(200) for seeds in (one, other)]
    assert len(set(found)) == 400
    assert all(0 <= seed < 2**64 for seed in found)
    assert max(found) > 2**62


def test_all_processes_take_what_process_0_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for once, whatever the number of requests."""
    sent: list[Any] = []

    def broadcast(own: Any) -> Any:
        sent.append(own)
        return sent[0]

    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", broadcast)
    processes = [FreshSeeds() for _ in range(3)]
    found = [[seeds.next() for _ in range(5)] for seeds in processes]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 5
    assert len(sent) == 3
    # Each of them had made up something of its own.
    assert not any(np.array_equal(sent[0], other) for other in sent[1:])
