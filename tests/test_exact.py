"""Exact mode's law: alone or in any company, on any slot and pages, a request leaves the same bits.

The model's step is driven as exact mode schedules it (two calls of fixed sizes, prompts cut on
the grid). Nothing here has a tolerance. The models keep sizes that no vector width divides.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from driver import Sizes
from exact_driver import SIZES, ExactDriver, Run, assert_same_run
from goldens import GOLDEN, OVERRIDES
from tiny_models import LATENT, LINEAR, write_tiny_model

# Prompt and all tokens: one token, cells full but for one, full, and one over; a neighbour that
# reaches into a second KV block; prompts that are never decoded.
LENGTHS = (
    (1, 1), (1, 9), (20, 31), (63, 66), (64, 70), (65, 72), (128, 131), (140, 140), (300, 340),
    (2, 40), (33, 33), (90, 101),
)  # fmt: skip
SCHEDULES = 3
# The golden sets are of all three architectures; the tiny models have odd widths and a layer of
# each attention, which is what takes least time to compile.
CASES = [
    ("v2-gqa", "float32", "float32"),
    ("tiny-linear", "float32", "float32"),
    ("tiny-linear", "bfloat16", "bfloat16"),
    ("tiny-latent", "float32", "bfloat16"),
    ("tiny-latent", "bfloat16", "float32"),
    # With these, lightning beside either softmax attention has met every pair of dtypes, in models
    # of more layers.
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            ("v2-gqa", "bfloat16", "float32"),
            ("linear_v2-gqa", "float32", "bfloat16"),
            ("linear_v2-gqa", "bfloat16", "float32"),
            ("v2_5-mla", "float32", "float32"),
            ("v2_5-mla", "bfloat16", "bfloat16"),
        )
    ),
]
TINY = {
    "tiny-linear": {**LINEAR, "num_hidden_layers": 2},
    "tiny-latent": {**LATENT, "num_hidden_layers": 2},
}
ODD = dataclasses.replace(SIZES, num_decode=5, num_prefill=16, num_segments=3, page_size=16,
                          pages_a_sequence=23, num_pages=70)  # fmt: skip


def make(name: str, folder: Path, sizes: Sizes | None = None, **options: str) -> ExactDriver:
    """The driver of a golden set or a tiny model."""
    if name in TINY:
        write_tiny_model(folder, TINY[name], tokenizer=False)
        return ExactDriver(folder, sizes or ODD, **options)
    return ExactDriver(GOLDEN / name, sizes or SIZES, overrides=OVERRIDES, **options)


def requests(driver: ExactDriver) -> list[tuple[list[int], int]]:
    rng = np.random.default_rng(5)
    return [
        (rng.integers(0, driver.config.vocab_size, total).tolist(), prompt)
        for prompt, total in LENGTHS
    ]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path_factory) -> ExactDriver:
    name, dtype, state_dtype = request.param
    folder = tmp_path_factory.mktemp(name)
    return make(name, folder, dtype=dtype, state_dtype=state_dtype)


@pytest.fixture(scope="module")
def alone(case: ExactDriver) -> list[Run]:
    return [case.alone(*request) for request in requests(case)]


@pytest.mark.parametrize("schedule", range(SCHEDULES))
def test_r010_no_company_order_slot_or_page_changes_a_bit(
    case: ExactDriver, alone: list[Run], schedule: int
) -> None:
    """Also R008, R023, R035, R037, R040: logits of every step, recurrent state and pages."""
    runs = case.crowd(requests(case), np.random.default_rng(schedule))
    for got, want in zip(runs, alone, strict=True):
        assert_same_run(got, want)


def test_r010_the_last_row_and_segment_are_as_good_as_the_first(
    case: ExactDriver, alone: list[Run]
) -> None:
    """A full prefill call and a full decode call, the request always last, others long."""
    case.clean()
    wanted = alone[1]
    sizes, others = case.sizes, []
    tokens = requests(case)[8][0]
    last = Run(*requests(case)[1])
    pages = iter(range(1, sizes.num_pages))
    for slot in range(1, sizes.num_decode):
        others.append(Run(tokens[:20], 3, slot, [next(pages) for _ in range(2)]))
    last.slot, last.pages = sizes.num_decode, [next(pages)]
    case.poison([*others, last])
    case.prefill(others[: sizes.num_segments])
    case.prefill([*others[sizes.num_segments :], last])
    while not last.is_over:
        case.decode([*others, last])
    last.left = case.owned(last)
    assert_same_run(last, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-linear"])
def test_r066_a_lone_decode_row_takes_the_blocks_too(name: str, tmp_path: Path) -> None:
    """With one sequence at a time there is no company, but history, slot and pages remain."""
    driver = make(name, tmp_path, dataclasses.replace(ODD, num_decode=1, num_segments=1))
    wants = [driver.alone(*request) for request in requests(driver)]
    runs = driver.crowd(requests(driver), np.random.default_rng(1))
    for got, want in zip(runs, wants, strict=True):
        assert_same_run(got, want)
