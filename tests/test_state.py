"""What is kept between steps is arrays only, each kind in its own, and no ledger among them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from tiny_models import LATENT, LINEAR

from bailing_jax.config import ModelConfig
from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.slots import SlotLedger
from bailing_jax.layer_plan import layer_plan
from bailing_jax.state import DecodeState, StateSpec, allocate, state_bytes

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
