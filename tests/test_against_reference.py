"""The model against an independent float64 one, on random configs and a random schedule.

Every row of every step is compared: decode rows and segments, prompts cut anywhere, several
requests in a step. What is drawn covers YaRN, low-rank queries, incomplete last groups, odd
head counts, tied heads, negative biases, missing norms and experts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver import Driver, Request
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_checkpoints import ARCHITECTURES, draw_config, random_tensors, write_checkpoint
from reference_numpy import reference_forward
from slow import slow_but
from tolerances import TOLERANCES

# Its tolerances leave room for either form; scripts/fuzz_reference.py runs the optimised one.
pytestmark = pytest.mark.unoptimised

# A kept and a dropped expert closer than this may swap places by rounding alone.
_NEAR_TIE = 2e-4


def check(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Run three requests in company and compare every row with the reference."""
    tensors = random_tensors(config, seed)
    write_checkpoint(folder, config, tensors, shards=1 + seed % 2)
    rng = np.random.default_rng(seed)
    driver = Driver(folder)
    slots = rng.permutation(np.arange(1, 7))[:3]
    pages = rng.permutation(np.arange(1, 40)).reshape(3, 13)[:, :12]
    requests = [
        Request(rng.integers(0, config["vocab_size"], n).tolist(), int(slot), row.tolist())
        for n, slot, row in zip((29, 17, 6), slots, pages, strict=True)
    ]
    driver.poison()
    a, b, c = requests
    driver.step(segments=[(a, 11), (b, 5)])
    driver.step(segments=[(c, 1), (b, 0), (a, 7)])
    driver.step(segments=[(b, 9), (a, 1)])
    while any(r.done < len(r.tokens) for r in requests):
        # a and c decode token by token, b's rest comes as segments beside them.
        decodes = [r for r in (c, a) if r.done < len(r.tokens)]
        segments = [(b, 1)] if b.done < len(b.tokens) else []
        driver.step(decodes, segments, garbage=rng)
    for request in requests:
        _compare(driver, request, config, tensors)


def _compare(
    driver: Driver, request: Request, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    want = reference_forward(config, tensors, request.tokens)
    if want.router_margin < _NEAR_TIE:
        return
    logits, hidden = request.all_logits(), request.all_hidden()
    np.testing.assert_allclose(logits, want.logits, rtol=0, atol=TOLERANCES["reference_logits"])
    np.testing.assert_allclose(hidden, want.hidden, rtol=0, atol=TOLERANCES["reference_hidden"])
    states = driver.recurrent_state(request)
    assert states.keys() == want.states.keys()
    for layer, state in states.items():
        scale = max(1.0, float(np.abs(want.states[layer]).max()))
        np.testing.assert_allclose(
            state, want.states[layer], rtol=0, atol=scale * TOLERANCES["reference_state"]
        )


# The quick run of `scripts/fuzz_reference.py` has all of them.
@pytest.mark.parametrize("architecture", slow_but(["BailingMoeV2_5ForCausalLM"], ARCHITECTURES))
def test_random_configs_agree_with_the_reference(
    architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(config=draw_config(architectures=(architecture,)), seed=st.integers(0, 2**31 - 1))
    def run(config: dict[str, Any], seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(tmp_path_factory.mktemp("random"), config, seed)

    run()
