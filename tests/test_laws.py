"""The laws of the step: what may not depend on cuts, padding, slots, pages, company or history.

Runs that use the same program with the request in the same rows must agree bit for bit; where a
request moves to other rows or is cut differently, sums change order and the bound is the table's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from driver import Driver, Request, Sizes
from goldens import GOLDEN, OVERRIDES, golden
from tolerances import TOLERANCES

SIZES = Sizes(
    num_decode=3,
    num_prefill=128,
    num_segments=4,
    num_slots=7,
    num_pages=45,
    page_size=16,
    pages_a_sequence=9,
)
SETS = ("v2-gqa", "linear_v2-gqa", "v2_5-mla")


@pytest.fixture(scope="module", params=SETS)
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(GOLDEN / request.param, SIZES, overrides=OVERRIDES)


@pytest.fixture(autouse=True)
def _fresh(driver: Driver) -> None:
    driver.reset()


def prompt(length: int, seed: int = 0) -> list[int]:
    """A prompt of the golden sets, or the start of one."""
    arrays = golden("v2_5-mla")
    return arrays[("prompt_6", "prompt_5")[seed % 2]].tolist()[:length]


def make(length: int, place: int, seed: int = 0) -> Request:
    """A request in slot `place` with pages of its own."""
    first = 1 + (place - 1) * 7
    return Request(prompt(length, seed), place, list(range(first, first + 7)))


def alone(driver: Driver, length: int, seed: int = 0) -> Request:
    """The request by itself in whole steps: what every other run is held against."""
    driver.reset()
    request = driver.prefill(make(length, 1, seed))
    driver.reset()
    return request


def same_answer(got: Request, want: Request) -> None:
    """Logits within the table's bound, and so the same greedy tokens wherever they are clear."""
    a, b = got.all_logits(), want.all_logits()
    bound = TOLERANCES["law_logits"]
    np.testing.assert_allclose(a, b, rtol=0, atol=bound)
    best_two = np.sort(b, axis=1)[:, -2:]
    clear = best_two[:, 1] - best_two[:, 0] > 2 * bound
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(a.argmax(1)[clear], b.argmax(1)[clear])


def same_bits(got: Request, want: Request) -> None:
    a, b = got.all_logits(), want.all_logits()
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def same_state(driver: Driver, got: Request, want: dict[int, np.ndarray]) -> None:
    for layer, state in driver.recurrent_state(got).items():
        scale = np.abs(want[layer]).max()
        np.testing.assert_allclose(
            state, want[layer], rtol=0, atol=scale * TOLERANCES["law_state"]
        )


def test_r045_every_cut_of_a_prompt_gives_the_same_answer(driver: Driver) -> None:
    """One cut anywhere in 2 chunks and a bit: logits and the state left behind."""
    want = driver.prefill(make(112, 1))
    state = driver.recurrent_state(want)
    for cut in range(1, 112):
        driver.reset()
        got = driver.prefill(make(112, 1), cut)
        same_answer(got, want)
        same_state(driver, got, state)


def test_r051_several_cuts_and_two_prompts_cut_in_the_same_steps(
    driver: Driver, rng: np.random.Generator
) -> None:
    wants = [alone(driver, 112), alone(driver, 90, 1)]
    for _ in range(8):
        driver.reset()
        gots = [make(112, 2), make(90, 5, 1)]
        while unfinished(gots):
            room, segments = 128, []
            for request in gots:
                count = min(int(rng.integers(0, 40)), len(request.tokens) - request.done, room)
                segments.append((request, count))
                room -= count
            driver.step(segments=segments)
        for got, want in zip(gots, wants, strict=True):
            same_answer(got, want)


def test_r015_decoding_equals_prefill(driver: Driver) -> None:
    """The last 30 tokens one at a time through the decode rows."""
    want = alone(driver, 80)
    got = make(80, 3)
    driver.step(segments=[(got, 50)])
    while got.done < 80:
        driver.step([got])
    same_answer(got, want)


def test_r012_a_first_chunk_of_one_token_starts_afresh(driver: Driver) -> None:
    want = alone(driver, 40)
    driver.prefill(make(100, 2, 1))
    got = make(40, 2)  # the slot and pages of the request before it
    driver.step(segments=[(got, 1)])
    driver.step(segments=[(got, 39)])
    same_answer(got, want)


def test_r040_padding_tokens_change_nothing(driver: Driver, rng: np.random.Generator) -> None:
    want = driver.prefill(make(70, 1))
    state = driver.recurrent_state(want)
    for _ in range(3):
        driver.reset()
        got = make(70, 1)
        driver.step(segments=[(got, 70)], garbage=rng)
        same_bits(got, want)
        for layer, leaf in driver.recurrent_state(got).items():
            np.testing.assert_array_equal(leaf, state[layer])


def test_r023_any_slot_and_any_pages_give_the_same_bits(
    driver: Driver, rng: np.random.Generator
) -> None:
    want = driver.prefill(make(100, 1))
    for _ in range(4):
        driver.reset()
        pages = rng.permutation(np.arange(1, SIZES.num_pages))[:9].tolist()
        got = driver.prefill(Request(prompt(100), int(rng.integers(1, 7)), pages))
        same_bits(got, want)


def test_r020_a_freed_slot_full_of_nan_changes_nothing(driver: Driver) -> None:
    clean = make(60, 4)
    driver.step(segments=[(clean, 45)])
    for _ in range(15):
        driver.step([clean])
    driver.reset()
    driver.poison()
    got = make(60, 4)
    driver.step(segments=[(got, 45)])
    for _ in range(15):
        driver.step([got])
    same_bits(got, clean)


def test_r020_a_freed_slot_full_of_another_tenant_changes_nothing(driver: Driver) -> None:
    want = alone(driver, 60)
    for place in (1, 2, 3):
        driver.prefill(make(112, place, 1))
    same_bits(driver.prefill(make(60, 1)), want)


def test_r035_null_and_unowned_slots_stay_byte_identical(
    driver: Driver, rng: np.random.Generator
) -> None:
    """After steps with padding of every kind: rows, segments, empty segments, a step of nobody."""
    driver.poison()
    running, starting, empty = make(50, 2), make(40, 5, 1), make(10, 6)
    owners = [running, starting]
    before = driver.unowned(owners)
    driver.step(segments=[(running, 30)], garbage=rng)
    driver.step([running], [(empty, 0), (starting, 17)], garbage=rng)
    driver.step(garbage=rng)
    driver.step([running, starting], garbage=rng)
    for was, now in zip(before, driver.unowned(owners), strict=True):
        np.testing.assert_array_equal(now, was)


def test_r043_a_step_of_nobody_changes_no_byte(driver: Driver, rng: np.random.Generator) -> None:
    driver.prefill(make(50, 2))
    before = driver.unowned([])
    driver.step(garbage=rng)
    for was, now in zip(before, driver.unowned([]), strict=True):
        np.testing.assert_array_equal(now, was)


def test_r100_an_empty_segment_leaves_its_slot_alone(driver: Driver) -> None:
    """First, middle and last; fresh or not: nobody's state moves because nobody said anything."""
    a, b = driver.prefill(make(30, 1)), driver.prefill(make(20, 2, 1))
    before = driver.unowned([])
    driver.step(segments=[(a, 0), (make(9, 3), 0), (b, 0)])
    for was, now in zip(before, driver.unowned([]), strict=True):
        np.testing.assert_array_equal(now, was)


def unfinished(requests: list[Request]) -> list[Request]:
    return [request for request in requests if request.done < len(request.tokens)]


def company(driver: Driver, order: Callable[[list], list]) -> list[Request]:
    """Three decoding requests and two prefilling ones sharing every step."""
    running = [make(45 + 10 * i, 1 + i, i) for i in range(3)]
    for request in running:
        driver.step(segments=[(request, 40)])
    starting = [make(60, 4), make(75, 5, 1)]
    while left := unfinished(starting):
        segments = [(r, min(25, len(r.tokens) - r.done)) for r in left]
        driver.step(order(unfinished(running)), order(segments))
    while left := unfinished(running):
        driver.step(order(left))
    return [*running, *starting]


def test_r010_company_in_the_batch_changes_no_answer(driver: Driver) -> None:
    """The founding bug's step: decode rows and prefill segments together."""
    wants = [alone(driver, 45 + 10 * i, i) for i in range(3)]
    wants += [alone(driver, 60), alone(driver, 75, 1)]
    for got, want in zip(company(driver, list), wants, strict=True):
        same_answer(got, want)


def test_r010_order_within_a_step_changes_no_answer(driver: Driver) -> None:
    wants = company(driver, list)
    states = [driver.recurrent_state(request) for request in wants]
    driver.reset()
    for got, want, state in zip(
        company(driver, lambda rows: rows[::-1]), wants, states, strict=True
    ):
        same_answer(got, want)
        same_state(driver, got, state)
