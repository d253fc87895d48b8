"""A step of decode rows and prompts in which some prompts bring a single token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from driver import Driver, Request, Sizes
from goldens import GOLDEN, LINEAR, OVERRIDES, golden
from tolerances import TOLERANCES

pytestmark = pytest.mark.unoptimised

SIZES = Sizes(num_decode=2, num_prefill=24, num_segments=3, num_slots=7, page_size=8)


@pytest.fixture(scope="module", params=LINEAR[:2])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(GOLDEN / request.param, SIZES, overrides=OVERRIDES)


def make(length: int, place: int) -> Request:
    tokens = golden("v2_5-mla")["prompt_5"].tolist()[place : place + length]
    return Request(tokens, place, list(range(1 + 5 * (place - 1), 1 + 5 * place)))


def same_answer(got: Request, want: Request) -> None:
    bound = TOLERANCES["law_logits"]
    np.testing.assert_allclose(got.all_logits(), want.all_logits(), rtol=0, atol=bound)


def test_r011_one_token_prompts_anywhere_in_a_mixed_step(driver: Driver) -> None:
    """First, in the middle and last, fresh and continuing: each gets the answer it gets alone."""
    lengths = {1: 13, 2: 10, 3: 1, 4: 14, 5: 8}  # slots 1 and 2 decode, 3 is a prompt of one token
    wants = {}
    for place, length in lengths.items():
        driver.reset()
        wants[place] = driver.prefill(make(length, place))
    for order in itertools.permutations((3, 4, 5)):
        driver.reset()
        gots = {place: make(length, place) for place, length in lengths.items()}
        driver.step(segments=[(gots[1], 11), (gots[2], 8), (gots[5], 4)])
        # Slot 5 goes on with one token of a prompt that has three more.
        counts = {3: 1, 4: 14, 5: 1}
        driver.step([gots[1], gots[2]], [(gots[place], counts[place]) for place in order])
        # Once more, so that what the mixed step left in everybody's state is heard.
        driver.step([gots[1], gots[2]], [(gots[5], 3)])
        for place, want in wants.items():
            same_answer(gots[place], want)
            assert np.isfinite(gots[place].all_logits()).all()
