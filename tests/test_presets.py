"""The presets against the published parameter counts, by formulas that share no code with us.

The counts below are the family's published sizes (billions; the multi-token-prediction layer is
counted apart). A wrong width, head count, rank, layer group or expert count moves them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping

import pytest

from bailing_jax.config import SUPPORTED, ModelConfig
from bailing_jax.errors import UserError
from bailing_jax.presets import PRESETS, find_preset, preset_names

# name: (total, active per token with both embeddings, the same without, MTP layer or None)
PUBLISHED = {
    "ling-lite": (16.802, 2.753, 2.235, None),
    "ling-plus": (290.603, 29.004, 27.644, None),
    "ling-mini-2.0": (16.256, 1.433, 0.789, 0.828),
    "ling-flash-2.0": (102.890, 6.152, 4.865, 3.306),
    "ling-1t": (999.705, 51.054, 48.479, 13.223),
    "ring-mini-linear-2.0": (16.423, 1.601, 0.957, None),
    "ring-flash-linear-2.0": (104.182, 7.444, 6.157, None),
    "ling-2.6-flash": (104.187, 7.449, 6.162, 3.307),
    "ling-2.6-1t": (1012.2, 63.6, 61.0, 13.2),
    "ling-3.0-flash": (124.414, 5.506, 4.701, 3.072),
    "ling-3.0-tiny": (7.893, 1.382, 0.899, 0.317),
}
# Published rounded ("about"), where the others have three decimals.
ROUNDED = {"ling-2.6-1t"}

# Softmax layers by the releases' own description; all others are linear attention.
SOFTMAX_LAYERS = {
    "ring-mini-linear-2.0": {4, 9, 14, 19},
    "ring-flash-linear-2.0": {7, 15, 23, 31},
    "ling-2.6-flash": {7, 15, 23, 31},
    "ling-2.6-1t": {7, 15, 23, 31, 39, 47, 55, 63, 71, 79},
    "ling-3.0-flash": {5, 11, 17, 23, 29, 35, 41},
    "ling-3.0-tiny": {3, 7, 11, 15, 19, 23},
}


class Count:
    """Parameters of one config, from the formulas of the architecture."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config
        self.hidden = self.number("hidden_size")
        self.heads = self.number("num_attention_heads")
        self.width = self.heads * self.number("head_dim")
        self.architecture = str(config["architectures"])

    def number(self, key: str) -> int:
        value = self.config[key]
        assert isinstance(value, int), key
        return value

    def is_softmax(self, layer: int) -> bool:
        if "layer_group_size" not in self.config:
            return True
        group, layers = self.number("layer_group_size"), self.number("num_hidden_layers")
        return (layer + 1) % group == 0 or layer >= layers // group * group

    def softmax_attention(self) -> int:
        if "kv_lora_rank" in self.config:
            return self.latent_attention()
        head_dim = self.number("head_dim")
        qkv_width = (self.heads + 2 * self.number("num_key_value_heads")) * head_dim
        norms = 2 * head_dim if self.config.get("use_qk_norm") else 0
        return self.hidden * qkv_width + self.width * self.hidden + norms

    def latent_attention(self) -> int:
        query_width = self.heads * (
            self.number("qk_nope_head_dim") + self.number("qk_rope_head_dim")
        )
        value_width = self.heads * self.number("v_head_dim")
        rank, query_rank = self.number("kv_lora_rank"), self.config["q_lora_rank"]
        if isinstance(query_rank, int):
            query = self.hidden * query_rank + query_rank + query_rank * query_width
        else:
            query = self.hidden * query_width
        down = self.hidden * (rank + self.number("qk_rope_head_dim")) + rank
        up = rank * (self.heads * self.number("qk_nope_head_dim") + value_width)
        gate = self.hidden * self.heads if "V3" in self.architecture else 0
        return query + down + up + value_width * self.hidden + gate

    def linear_attention(self) -> int:
        head_dim = self.number("head_dim")
        if "V3" not in self.architecture:  # lightning: q, k, v, gate, output; norms
            return 5 * self.hidden * self.width + self.width + 2 * head_dim
        # Delta attention: q, k, v, decay, gate, output; beta; 3 convolutions; dt, A, norm.
        convolutions = 3 * self.number("short_conv_kernel_size") * self.width
        small = self.width + self.heads + head_dim
        return 6 * self.hidden * self.width + self.hidden * self.heads + convolutions + small

    def expert(self) -> int:
        return 3 * self.hidden * self.number("moe_intermediate_size")

    def moe(self) -> int:
        experts = self.number("num_experts")
        shared = self.number("num_shared_experts") * self.expert()
        bias = experts if self.config.get("moe_router_enable_expert_bias") else 0
        return self.hidden * experts + bias + shared + experts * self.expert()

    def embeddings(self) -> int:
        return 2 * self.number("vocab_size") * self.hidden

    def total(self) -> int:
        dense_layers = self.number("first_k_dense_replace")
        count = self.embeddings() + self.hidden
        for layer in range(self.number("num_hidden_layers")):
            softmax = self.is_softmax(layer)
            count += self.softmax_attention() if softmax else self.linear_attention()
            is_dense = layer < dense_layers
            count += 3 * self.hidden * self.number("intermediate_size") if is_dense else self.moe()
            count += 2 * self.hidden
        return count

    def active(self) -> int:
        idle = self.number("num_experts") - self.number("num_experts_per_tok")
        moe_layers = self.number("num_hidden_layers") - self.number("first_k_dense_replace")
        return self.total() - moe_layers * idle * self.expert()

    def mtp(self) -> int:
        return self.softmax_attention() + 2 * self.hidden**2 + 5 * self.hidden + self.moe()


def check_count(name: str, count: int, published: float) -> None:
    billions = count / 1e9
    if name in ROUNDED:
        assert billions == pytest.approx(published, rel=0.005)
    else:
        assert billions == pytest.approx(published, abs=0.00051)


def test_names_are_complete_and_lower_case() -> None:
    assert preset_names() == tuple(PRESETS)
    assert set(PRESETS) == set(PUBLISHED)
    for name, preset in PRESETS.items():
        assert name == name.lower() == preset.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_parameters_match_the_published_count(name: str) -> None:
    preset, published = PRESETS[name], PUBLISHED[name][0]
    assert preset.total_parameters == published
    check_count(name, Count(preset.hf_config).total(), published)


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_parameters_match_the_published_count(name: str) -> None:
    count = Count(PRESETS[name].hf_config)
    check_count(name, count.active(), PUBLISHED[name][1])
    check_count(name, count.active() - count.embeddings(), PUBLISHED[name][2])


@pytest.mark.parametrize("name", [n for n, counts in PUBLISHED.items() if counts[3]])
def test_mtp_parameters_match_the_published_count(name: str) -> None:
    published = PUBLISHED[name][3]
    assert published is not None
    check_count(name, Count(PRESETS[name].hf_config).mtp(), published)


@pytest.mark.parametrize("name", SOFTMAX_LAYERS)
def test_layer_groups_give_the_published_layout(name: str) -> None:
    count = Count(PRESETS[name].hf_config)
    layers = range(count.number("num_hidden_layers"))
    assert {layer for layer in layers if count.is_softmax(layer)} == SOFTMAX_LAYERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_assumed_keys_are_in_the_config(name: str) -> None:
    preset = PRESETS[name]
    assert set(preset.assumed) <= set(preset.hf_config)
    assert len(set(preset.assumed)) == len(preset.assumed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_is_what_json_can_hold(name: str) -> None:
    config = dict(PRESETS[name].hf_config)
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_loader_reads_the_config_or_names_the_architecture(name: str) -> None:
    config = PRESETS[name].hf_config
    architectures = config["architectures"]
    assert isinstance(architectures, list)
    if architectures[0] not in SUPPORTED:
        with pytest.raises(UserError, match=architectures[0]):
            ModelConfig.from_hf(config)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a key nobody reads
        assert ModelConfig.from_hf(config).architecture == architectures[0]


def test_swiglu_limits_have_one_entry_a_layer() -> None:
    config = PRESETS["ling-3.0-flash"].hf_config
    routed, shared = config["expert_swiglu_limit_list"], config["share_expert_swiglu_limit_list"]
    assert isinstance(routed, list)
    assert isinstance(shared, list)
    assert len(routed) == len(shared) == config["num_hidden_layers"]
    assert [i for i, limit in enumerate(routed) if limit] == list(range(35, 42))
    assert [i for i, limit in enumerate(shared) if limit] == list(range(34, 42))


def test_find_preset_takes_the_released_spelling() -> None:
    assert find_preset("Ling-1T") is PRESETS["ling-1t"]
    assert find_preset("ling-2.6-flash") is PRESETS["ling-2.6-flash"]
    assert find_preset("llama-2") is None


def test_configs_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(TypeError):
        PRESETS["ling-1t"].hf_config["hidden_size"] = 1  # type: ignore[index]
