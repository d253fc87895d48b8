"""Many requests that come and go: every place is free afterwards and nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import soak
from tiny_models import LINEAR, greedy, is_idle, linear_llm, tiny_llm

pytestmark = pytest.mark.unoptimised

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "soak.py"


def test_r024_ten_thousand_cancelled_requests_leave_every_place_free() -> None:
    """Cancelled while they wait, before their first step, within their prompt, while answering."""
    small = {**LINEAR, "num_hidden_layers": 2}
    llm = tiny_llm(small, max_num_seqs=16, prefill_chunk=64)
    want = llm.generate([5, 6, 7], greedy(9))
    traffic = soak.Traffic(llm, np.random.default_rng(24), cancelled_share=0.9, is_plain=True)
    while traffic.counts.cancelled < 10_000:
        traffic.turn()
    assert traffic.counts.finished > 100
    traffic.drain()
    assert is_idle(llm)
    assert traffic.counts.submitted == traffic.counts.cancelled + traffic.counts.finished
    assert llm.generate([5, 6, 7], greedy(9)) == want


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_r025_nothing_holds_a_request_that_is_over(steps: int) -> None:
    """Cancelled or finished, nobody but the caller knows it any more."""
    llm = linear_llm()
    left = [llm.prepare([i] * 30, greedy(9, ignore_eos=True)) for i in range(1, 6)]
    done = [llm.prepare([i], greedy(2, ignore_eos=True)) for i in range(1, 4)]
    for request in left + done:
        llm.submit(request)
    for _ in range(steps):
        llm.step()
    for request in left:
        llm.cancel(request)
    while any(llm.is_unfinished(request) for request in done):
        llm.step()
    assert is_idle(llm)
    watched = [weakref.ref(request) for request in left + done]
    del request, left, done
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
