"""Random schedules in the suite: a few that pass, and wrongs that they notice.

`scripts/fuzz_schedules.py` runs thousands.
"""

from __future__ import annotations

import random
from typing import Any

import jax
import numpy as np
import pytest
from schedules import CONFIGS, Bench, Wrong, make_schedule
from slow import slow_but
from test_founding_swap import swapped_places

from bailing_jax.engine.engine import Engine
from bailing_jax.engine.scheduler import Scheduler


def run(bench: Bench, count: int) -> None:
    for number in range(count):
        rng = random.Random(f"suite {number}")
        bench.run(make_schedule(rng, len(bench.pool), 30))


# The quick run of the script has all architectures.
@pytest.mark.parametrize("name", slow_but(["linear_v2"], CONFIGS))
def test_r033_r082_whatever_happens_each_request_is_what_it_is_alone(name: str) -> None:
    """Exact mode, to the bit; normal mode is the script's."""
    bench = Bench(name, exact=True)
    run(bench, 12)
    assert bench.counts["states compared"] > 50
    assert bench.counts["answers compared"] > 20


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Its runs alone are made before anything is broken."""
    made = Bench("linear_v2", exact=True)
    for index in range(len(made.pool)):
        made.alone(index)
    return made


@pytest.mark.parametrize("shards", [2, 3])
def test_r033_r097_on_several_shards_each_request_is_what_one_device_answers(
    bench: Bench, shards: int
) -> None:
    """Exact mode, to the bit: state, tokens and log probabilities of the right shard."""
    several = bench.on_shards(shards)
    run(several, 9)
    assert several.counts["states compared"] > 50
    assert several.counts["answers compared"] > 10
    assert several.counts["calls of several shards"] > 10
    assert several.counts["calls with an idle shard"] > 10


def forgets_to_reset(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    """Who gave way goes on as if it had its state still."""
    preempt = Scheduler._preempt

    def keeping(self: Scheduler, sequence: Any) -> None:
        computed = sequence.num_computed
        preempt(self, sequence)
        sequence.num_computed = min(computed, sequence.num_prompt - 1)

    patch.setattr(Scheduler, "_preempt", keeping)


def writes_a_neighbours_state(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    """The first two slots change places after a step."""
    call = Engine._call

    def swapping(self: Engine, plan: Any) -> Any:
        made = call(self, plan)
        leaf = self._state.layers[0]
        swapped = leaf.at[np.array([1, 2])].set(leaf[np.array([2, 1])])
        object.__setattr__(self._state, "layers", (swapped, *self._state.layers[1:]))
        return made

    patch.setattr(Engine, "_call", swapping)


def loses_a_page(patch: pytest.MonkeyPatch, bench: Bench) -> None:
    """One page of a request that ends never comes back."""
    pages = type(bench.engine._scheduler.pages)
    free = pages.free

    def leaking(self: Any, handle: Any) -> None:
        free(self, handle)
        self._free.pop()

    patch.setattr(pages, "free", leaking)


@pytest.mark.parametrize("spoil", [forgets_to_reset, writes_a_neighbours_state, loses_a_page])
def test_schedules_notice_what_is_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    monkeypatch.setenv("BAILING_DEBUG", "0")
    bench.engine._start_afresh()
    spoil(monkeypatch, bench)
    with pytest.raises((Wrong, ValueError)):
        run(bench, 40)


@pytest.mark.slow
def test_r010_schedules_notice_the_founding_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """In normal mode, whose steps mix decode rows and segments."""
    monkeypatch.setenv("BAILING_DEBUG", "0")
    honest = Bench("linear_v2", exact=False)
    alone = {index: honest.alone(index) for index in range(len(honest.pool))}
    jax.clear_caches()  # layers are traced once a process
    swapped_places(monkeypatch)
    spoiled = Bench("linear_v2", exact=False)
    spoiled._alone = alone
    try:
        with pytest.raises(Wrong):
            run(spoiled, 40)
    finally:
        jax.clear_caches()
