"""The bug this project exists for, planted: the law of company must notice it.

In models of a layer of each attention, and of softmax attention alone. Nothing here is a matter of
bits, so nobody optimises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from driver import Driver
from random_checkpoints import V2
from test_laws import SIZES, alone, company, same_answer
from tiny_models import LATENT, LINEAR, write_tiny_model

from bailing_jax.batch import BatchLayout, Region

pytestmark = pytest.mark.unoptimised

# As many words as the laws' prompts are made of.
SMALL = {"num_hidden_layers": 2, "vocab_size": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "softmax": {**LINEAR, "architectures": [V2], "model_type": "bailing_moe"},
    "linear": LINEAR,
    "latent": LATENT,
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    config: dict[str, Any] = {**request.param, **SMALL}
    folder: Path = tmp_path_factory.mktemp("model")
    return Driver(write_tiny_model(folder, config, tokenizer=False), SIZES)


@pytest.fixture(scope="module")
def wants(driver: Driver) -> list[Any]:
    """The decoding requests by themselves, before anything is planted."""
    return [alone(driver, 45 + 10 * i, i) for i in range(3)]


def test_r010_without_the_swap_the_law_holds(driver: Driver, wants: list[Any]) -> None:
    """So that what fails below fails for the swap."""
    driver.reset()
    for got, want in zip(company(driver, list), wants, strict=False):
        same_answer(got, want)


def swapped_rows(patch: pytest.MonkeyPatch) -> None:
    """Rows sliced as if prefill came first."""
    patch.setattr(BatchLayout, "decode_rows", lambda self, x: x[self.num_prefill :])
    patch.setattr(BatchLayout, "prefill_rows", lambda self, x: x[: self.num_prefill])


def swapped_places(patch: pytest.MonkeyPatch) -> None:
    """Slots and pages sliced as if prefill came first."""
    decode, prefill = BatchLayout.decode_region, BatchLayout.prefill_region

    def both(layout: BatchLayout) -> tuple[jax.Array, jax.Array]:
        d, p = decode(layout), prefill(layout)
        slots = jnp.concatenate([p.slots, d.slots])
        return slots, jnp.concatenate([p.page_table, d.page_table])

    def swapped_decode(layout: BatchLayout) -> Region:
        slots, pages = both(layout)
        count = layout.num_decode
        return decode(layout)._replace(slots=slots[:count], page_table=pages[:count])

    def swapped_prefill(layout: BatchLayout) -> Region:
        slots, pages = both(layout)
        count = layout.num_decode
        return prefill(layout)._replace(slots=slots[count:], page_table=pages[count:])

    patch.setattr(BatchLayout, "decode_region", swapped_decode)
    patch.setattr(BatchLayout, "prefill_region", swapped_prefill)


@pytest.mark.parametrize(("plant", "width"), [(swapped_rows, 96), (swapped_places, 112)])
def test_r010_the_founding_swap_is_caught(
    driver: Driver,
    wants: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    width: int,
) -> None:
    plant(monkeypatch)
    # A width of its own: traces are shared by shape, and a planted one must not be.
    sizes = dataclasses.replace(SIZES, num_prefill=width)
    gots = company(Driver(driver.folder, sizes), list)
    for got, want in zip(gots, wants, strict=False):
        with pytest.raises(AssertionError):
            same_answer(got, want)
