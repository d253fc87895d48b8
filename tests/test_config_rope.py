"""RoPE in a config.json: base, rotated channels and YaRN, under every spelling in use."""

from __future__ import annotations

from typing import Any

import pytest
from hf_configs import ABSENT, V2, V2_5, changed, read

from bailing_jax.config import ConfigWarning, ModelConfig, Rope, Yarn


def rope_of(config: ModelConfig) -> Rope:
    """The rope of the GQA or lightning heads."""
    attention = config.gqa or config.lightning
    assert attention is not None
    assert attention.rope is not None
    return attention.rope


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({}, 20),
        ({"rotary_dim": 8}, 8),
        ({"partial_rotary_factor": 0.5}, 10),
        ({"partial_rotary_factor": 0.5, "rotary_dim": 8}, 10),
        ({"partial_rotary_factor": 1.0}, 20),
        ({"partial_rotary_factor": 0.25, "head_dim": 26}, 6),
        ({"rope_parameters": {"partial_rotary_factor": 0.3}}, 6),
    ],
)
def test_t4_rotated_channels(keys: dict[str, object], want: int) -> None:
    assert rope_of(read(V2, **keys)).num_dims == want


def test_t3_partial_rotary_factor_never_reaches_latent_attention() -> None:
    config = read(V2_5, partial_rotary_factor=0.5)
    assert config.mla is not None
    assert config.mla.rope.num_dims == 8
    assert rope_of(config).num_dims == 10


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 7e4},
        {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 7e4}},
        {"rope_theta": 7e4, "rope_parameters": {"rope_theta": 70_000}},
        {"rope_theta": 7e4, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": None, "rope_scaling": {"type": "default", "rope_theta": 7e4}},
    ],
)
def test_t4_rope_theta_is_found_in_either_place(keys: dict[str, object]) -> None:
    assert rope_of(read(V2, **keys)).theta == 7e4


YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
PLAIN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": None, "mscale_all_dim": None}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "kind", [{"type": "yarn"}, {"rope_type": "yarn"}, {"type": "yarn", "rope_type": "yarn"}]
)
@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({}, PLAIN),
        ({"beta_fast": 16, "beta_slow": 2.5}, PLAIN | {"beta_fast": 16.0, "beta_slow": 2.5}),
        ({"mscale": 0.7, "mscale_all_dim": 0}, PLAIN | {"mscale": 0.7, "mscale_all_dim": 0.0}),
    ],
)
def test_yarn_is_read_in_every_style(
    place: str, kind: dict[str, str], keys: dict[str, Any], want: dict[str, Any]
) -> None:
    config = read(V2_5, **{place: {**kind, **YARN, **keys, "attention_factor": 1.25}})
    yarn = Yarn(factor=4.0, original_max_positions=1024, attention_factor=1.25, **want)
    assert config.mla is not None
    assert rope_of(config).yarn == config.mla.rope.yarn == yarn


@pytest.mark.parametrize(
    "block", [None, {}, {"type": "default"}, {"rope_type": "default", "factor": 1.0}]
)
def test_no_scaling(block: object) -> None:
    assert rope_of(read(V2, rope_scaling=block)).yarn is None


def test_yarn_counts_from_max_positions_when_no_original_length_is_given() -> None:
    yarn = rope_of(read(V2, rope_scaling={"type": "yarn", "factor": 3.0})).yarn
    assert yarn is not None
    assert (yarn.factor, yarn.original_max_positions) == (3.0, 4096)


def test_yarn_factor_is_used_as_given_and_a_contradiction_is_said() -> None:
    keys = changed(V2, rope_scaling={"type": "yarn", **YARN, "factor": 2.0})
    with pytest.warns(ConfigWarning, match=r"factor 2\.0 is used as given.* is 4$") as caught:
        config = ModelConfig.from_hf(keys)
    assert len(caught) == 1
    yarn = rope_of(config).yarn
    assert yarn is not None
    assert yarn.factor == 2.0
