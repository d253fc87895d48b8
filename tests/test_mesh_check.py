"""scripts/mesh_check.py: which prompts are near no tie, by an independent router's margins; and the
weights of its float64 model."""

from __future__ import annotations

import argparse

import jax
import mesh_check
import mesh_float64
import numpy as np
import pytest
from random_checkpoints import random_tensors
from reference_numpy import reference_forward
from tiny_models import CHUNK, LINEAR, SEED, tiny_llm

from bailing_jax.checkpoint.random_weights import draw
from bailing_jax.config import ModelConfig
from bailing_jax.params import describe
from convert.mapping import place

pytestmark = pytest.mark.unoptimised

# Float32 against float64, of scores between 0 and 1.
CLOSE = 1e-5


def router_margin(ids: list[int]) -> float:
    return reference_forward(LINEAR, random_tensors(LINEAR, SEED), ids).router_margin


def test_gaps_are_those_of_an_independent_router(rng: np.random.Generator) -> None:
    """Whole chunks and broken ones: rows that do not exist have no gap."""
    with mesh_check.watched_routers() as gaps:
        llm = tiny_llm()
        for length in (CHUNK, CHUNK + 5, 3):
            gaps.clear()
            ids = rng.integers(3, 300, length).tolist()
            llm.logits(ids)
            jax.effects_barrier()
            assert min(gaps) == pytest.approx(router_margin(ids), abs=CLOSE)
    gaps.clear()
    tiny_llm().logits(ids)
    assert gaps == []


def test_prompts_with_a_near_tie_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    llms = []

    def load(*_args: object) -> object:
        llms.append(tiny_llm())
        return llms[0]

    monkeypatch.setattr(mesh_check, "load", load)
    monkeypatch.setattr(mesh_check, "NUM", 6)
    monkeypatch.setattr(mesh_check, "ROUTER_MARGIN", 3e-3)
    monkeypatch.setattr(mesh_check, "TOKEN_MARGIN", 2e-2)
    args = argparse.Namespace(answer=3, longest=6)
    asked, tried = mesh_check.clear_prompts({}, args)
    assert len(asked) == 6 < tried
    for prompt, tokens in zip(asked, mesh_check.greedy(llms[0], asked, 3), strict=True):
        whole = prompt + tokens[:-1]
        assert router_margin(whole) >= 3e-3 - CLOSE
        logits = llms[0].logits(whole)[len(prompt) - 1 :]
        second, first = np.sort(logits, axis=1)[:, -2:].T
        np.testing.assert_array_less(2e-2 * logits.std(axis=1), first - second)


def test_drawn_tensors_are_those_that_would_be_read() -> None:
    config = ModelConfig.from_hf(LINEAR, {})
    tensors = mesh_float64.Drawn(config, 5)
    for param in describe(config):
        array = np.zeros(param.shape, np.float32)
        for source in param.sources:
            assert tensors[source.name].shape == source.shape
            place(source, tensors[source.name], array)
        np.testing.assert_array_equal(array, draw(param, 5))
    assert len(tensors) == len(list(tensors)) == len(set(tensors))
