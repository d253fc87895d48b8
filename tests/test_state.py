"""What is kept between steps is arrays only, each kind in its own, and no ledger among them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from checks import assert_close
from tiny_models import LATENT, LINEAR, greedy, latent_llm, tiny_llm

from bailing_jax.config import ModelConfig
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.slots import SlotLedger
from bailing_jax.layer_plan import layer_plan
from bailing_jax.state import DecodeState, StateSpec, allocate, leaf_shapes, state_bytes

pytestmark = pytest.mark.unoptimised

SPEC = StateSpec(num_slots=5, num_pages=7, page_dtype="bfloat16", page_size=4)


@pytest.fixture(params=[LINEAR, LATENT], ids=["linear", "latent"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig.from_hf(request.param)


def test_r021_recurrent_state_and_pages_share_no_array(config: ModelConfig) -> None:
    """So the bytes of one can't be read as the other, whatever their dtypes."""
    state = allocate(config, SPEC)
    kinds = [layer.attention for layer in layer_plan(config)]
    assert {"lightning"} < set(kinds)
    for kind, leaf in zip(kinds, state.layers, strict=True):
        rows, dtype = (5, jnp.float32) if kind == "lightning" else (7, jnp.bfloat16)
        assert (leaf.shape[0], leaf.dtype) == (rows, dtype), kind
    buffers = [leaf.unsafe_buffer_pointer() for leaf in state.layers]
    assert len(set(buffers)) == len(buffers)
    assert state_bytes(config, SPEC) == sum(leaf.nbytes for leaf in state.layers)


def test_r031_the_state_holds_arrays_and_no_ledger(config: ModelConfig) -> None:
    """A ledger inside what is donated or restored would forget who owns what."""
    state = allocate(config, SPEC)
    assert isinstance(state, DecodeState)
    leaves = jax.tree.leaves(state)
    assert len(leaves) == config.num_layers
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    for ledger in (SlotLedger(3), PageLedger(3, 4)):
        assert jax.tree.leaves(ledger) == [ledger]  # to jax it is no container


def test_what_pages_keep_of_a_token_is_one_axis() -> None:
    """Of 1 key-value head of 16 its key and value; of a latent 20 + 8, or a whole row of lanes."""
    heads, latents = ModelConfig.from_hf(LINEAR), ModelConfig.from_hf(LATENT)
    whole = replace(SPEC, whole_lanes=True)
    for config, spec, width in ((heads, SPEC, 32), (heads, whole, 32), (latents, SPEC, 28),
                                (latents, whole, 128)):  # fmt: skip
        kinds = [layer.attention for layer in layer_plan(config)]
        shapes = {leaf.shape for kind, leaf in zip(kinds, leaf_shapes(config, spec), strict=True)
                  if kind != "lightning"}  # fmt: skip
        assert shapes == {(7, 4, width)}


def test_what_slots_keep_of_a_head_has_whole_lanes_on_a_tpu() -> None:
    """K = V = 16 here, 128 in released models."""
    config = ModelConfig.from_hf(LINEAR)
    for whole_lanes, width in ((False, 16), (True, 128)):
        spec = replace(SPEC, whole_lanes=whole_lanes)
        leaves = zip(layer_plan(config), leaf_shapes(config, spec), strict=True)
        shapes = {leaf.shape[2:] for layer, leaf in leaves if layer.attention == "lightning"}
        assert shapes == {(16, width)}


def test_zeros_behind_latents_and_states_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a TPU; more requests than slots, so that pages full of NaN are handed out again."""
    usual = EngineLimits.state_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            EngineLimits,
            "state_spec",
            lambda self, *dtypes: usual(self, *dtypes[:2], platform="tpu"),
        )
        padded = tiny_llm(LATENT, tokenizer=False)
    prompts = [[(7 * i + j) % 300 for j in range(5 + 9 * i)] for i in range(7)]
    answers = [
        [request.outputs[0].token_ids for request in llm.generate(prompts, greedy(6))]
        for llm in (padded, latent_llm())
    ]
    assert answers[0] == answers[1]
    assert_close(padded.logits(prompts[6]), latent_llm().logits(prompts[6]), "law_logits")
    states = [llm.recurrent_states(prompts[6]) for llm in (padded, latent_llm())]
    assert states[0].keys() == states[1].keys()
    for layer, state in states[1].items():
        assert states[0][layer].shape == state.shape
        assert_close(states[0][layer], state, "law_state", head_axis=0)
