"""What a config.json is refused for: by name, with the value found and the values allowed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from hf_configs import ABSENT, BASES, LINEAR_V2, V2, V2_5, changed

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError

V1 = "BailingMoeForCausalLM"
V3 = "BailingMoeV3ForCausalLM"
VL = "BailingMoeV3VLForConditionalGeneration"
NAN, INFINITY = math.nan, math.inf


def refused(config: dict[str, Any]) -> UserError:
    """The refusal: bad usage, without a warning beside it, naming the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            ModelConfig.from_hf(config, where="here/config.json")
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.message.startswith("here/config.json: ")
    return caught.value


def refused_value(config: dict[str, Any], key: str, allowed: str) -> None:
    """The refusal names the key, the value found and the allowed ones."""
    found, _, choices = refused(config).message.partition("; allowed: ")
    assert found == f"here/config.json: {key} = {config[key]!r}"
    assert allowed in choices


# ---- architectures


@pytest.mark.parametrize("name", [V1, V3, VL, "BailingMoeV9ForCausalLM", "LlamaForCausalLM", ""])
def test_t14_other_architectures_are_refused_by_name(name: str) -> None:
    # A config a V2.5 loader would otherwise read without complaint.
    error = refused(changed(V2_5, architectures=[name]))
    assert f"architectures = {name!r}; allowed: {V2}, {LINEAR_V2}, {V2_5}" in error.message
    known = name.startswith("Bailing")
    assert error.hint == (
        f"{name} is recognised but not supported yet." if known else "Not a Bailing model."
    )


@pytest.mark.parametrize(
    "key", ["short_conv_kernel_size", "no_kda_lora", "kda_safe_gate", "kda_lower_bound"]
)
@pytest.mark.parametrize("value", [4, None])
def test_t14_v3_without_architectures_is_known_by_its_keys(key: str, value: object) -> None:
    error = refused(changed(V2_5, architectures=ABSENT, **{key: value}))
    assert f"architectures = {V3!r}" in error.message


def test_v1_without_architectures_is_what_bailing_moe_means_without_groups() -> None:
    error = refused(changed(V2, architectures=ABSENT, n_group=ABSENT, topk_group=ABSENT))
    assert f"architectures = {V1!r}" in error.message


@pytest.mark.parametrize("value", ["llama", "bailing_moe_v3_vl", 3, ABSENT])
def test_an_unknown_model_type_does_not_stand_in_for_architectures(value: object) -> None:
    error = refused(changed(V2, architectures=ABSENT, model_type=value))
    assert f"model_type = {None if value is ABSENT else value!r}; allowed: " in error.message


@pytest.mark.parametrize("value", [V2, 5, [5], [None], {V2: 1}, [[V2]], True])
def test_architectures_is_a_list_with_a_name(value: object) -> None:
    refused_value(changed(V2, architectures=value), "architectures", "a list with one name")


# ---- values that are known and not implemented, or that contradict each other

TRUE_ONLY = ("norm_topk_prob", "moe_router_enable_expert_bias", "use_rmsnorm")
FALSE_ONLY = (
    "multi_gate",
    "norm_head",
    "norm_softmax",
    "scale_router_input",
    "up_proj_norm",
    "use_mla_nope",
    "use_nGPT",
    "use_sliding_window",
    "value_norm",
)
V3_KEYS = {
    "short_conv_kernel_size": 4,
    "no_kda_lora": True,
    "use_kda_lora": False,
    "kda_safe_gate": True,
    "kda_lower_bound": -5,
    "expert_swiglu_limit_list": [0, 4],
    "share_expert_swiglu_limit_list": [0, 5],
    "gated_attention_proj_granularity_type": "head_wise",
}
FIXED: list[tuple[str, str, object, str]] = [
    (V2_5, "quantization_config", {"quant_method": "fp8"}, "null"),
    (V2_5, "layers_block_type", ["attention"], "null"),
    (V2_5, "full_attention_type", "gqa", "'mla'"),
    (V2, "full_attention_type", "mla", "null"),
    (V2_5, "lightning_layerwise_decay", False, "True"),
    (V2, "score_function", "softmax", "'sigmoid'"),
    (V2_5, "scoring_func", "softmax", "'sigmoid'"),
    (V2_5, "topk_method", "greedy", "'noaux_tc'"),
    (V2, "router_dtype", "bf16", "'fp32', 'float32'"),
    (V2, "hidden_act", "gelu", "'silu'"),
    (V2_5, "rope_interleave", False, "True"),
    (LINEAR_V2, "rope_interleave", True, "False"),
    (V2, "sliding_window", 4096, "null"),
    *((V2_5, key, False, "True") for key in TRUE_ONLY),
    # In JSON, 1 is not true.
    *((V2_5, key, 1, "True") for key in TRUE_ONLY),
    *((V2_5, key, True, "False") for key in FALSE_ONLY),
    *((V2_5, key, 0, "False") for key in FALSE_ONLY),
    *((V2_5, key, value, "null") for key, value in V3_KEYS.items()),
]


@pytest.mark.parametrize(("architecture", "key", "value", "allowed"), FIXED)
def test_what_means_another_computation_is_refused(
    architecture: str, key: str, value: object, allowed: str
) -> None:
    refused_value(changed(architecture, **{key: value}), key, allowed)
    ModelConfig.from_hf(changed(architecture, **{key: None}))


CONTRADICTORY: list[tuple[str, str, object, str]] = [
    (V2_5, "qk_head_dim", 20, "21 (or"),  # 13 + 8
    (V2_5, "qk_head_dim", 21.0, "21 (or"),
    (V2_5, "qk_rope_head_dim", 7, "an even number"),
    (V2, "n_group", 5, "divisors of 12"),
    (V2, "n_group", 12, "two or more experts a group"),
    (V2, "topk_group", 5, "1 to 4"),
    (V2, "topk_group", 0, "1 to 4"),
    (V2, "num_experts_per_tok", 7, "1 to 6 (kept experts)"),  # 2 groups of 3
    (V2, "num_key_value_heads", 4, "divisors of 6"),
    (LINEAR_V2, "num_key_value_heads", 12, "divisors of 6"),
    (V2_5, "group_norm_size", 7, "divisors of 120"),
    (V2, "rotary_dim", 5, "even, 2 to head_dim = 20"),
    (V2, "rotary_dim", 22, "even, 2 to head_dim = 20"),
    (V2, "partial_rotary_factor", 0.25, "even, 2 to head_dim = 20"),
    (V2, "partial_rotary_factor", 0.05, "even, 2 to head_dim = 20"),
    (V2, "partial_rotary_factor", 1.5, "even, 2 to head_dim = 20"),
    (V2, "first_k_dense_replace", 8, "0 to 7"),
    (LINEAR_V2, "decay_layer_offset", 2, "0 to 1"),
    (LINEAR_V2, "decay_layer_offset", -1, "0 to 1"),
    (V2, "rope_theta", 1.0, "a number > 1"),
    (V2, "rope_theta", None, "no base is ever assumed"),
]


@pytest.mark.parametrize(("architecture", "key", "value", "allowed"), CONTRADICTORY)
def test_s08_values_that_do_not_fit_each_other_are_refused(
    architecture: str, key: str, value: object, allowed: str
) -> None:
    refused_value(changed(architecture, **{key: value}), key, allowed)


def test_an_implied_head_dim_must_divide() -> None:
    config = changed(V2, head_dim=0, hidden_size=56)
    refused_value(config, "num_attention_heads", "a divisor of 56")


def test_one_group_cannot_keep_two() -> None:
    refused_value(changed(V2, n_group=1, topk_group=2), "topk_group", "1 to 1")


# ---- types and ranges

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "max_position_embeddings",
    "layer_group_size",
    "group_norm_size",
    "rotary_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "topk_group",
)
NOT_NEGATIVE = (
    "head_dim",
    "n_group",
    "num_shared_experts",
    "moe_shared_expert_intermediate_size",
    "num_nextn_predict_layers",
    "first_k_dense_replace",
    "decay_layer_offset",
)
# The architecture that reads every key in question.
READS = {"num_key_value_heads": LINEAR_V2}
NO_INTEGERS = (True, False, "5", 5.0, 1e30, NAN, INFINITY, [5], {}, -3, 2**31, 10**400)


@pytest.mark.parametrize("key", [*POSITIVE, *NOT_NEGATIVE])
def test_s08_sizes_are_bounded_integers(key: str) -> None:
    low = 1 if key in POSITIVE else 0
    for value in (*NO_INTEGERS, *((0,) if low else ())):
        config = changed(READS.get(key, V2_5), **{key: value})
        refused_value(config, key, f"an integer from {low} to ")


@pytest.mark.parametrize(
    ("key", "limit"),
    [("num_hidden_layers", 4096), ("num_attention_heads", 2**16), ("num_experts", 2**16)],
)
def test_s08_what_is_counted_out_has_a_small_limit(key: str, limit: int) -> None:
    refused_value(changed(LINEAR_V2, **{key: limit + 1}), key, f"1 to {limit}")
    refused_value(changed(LINEAR_V2, **{key: 2**31 - 1}), key, f"1 to {limit}")


@pytest.mark.parametrize(
    "key", ["rms_norm_eps", "routed_scaling_factor", "rope_theta", "partial_rotary_factor"]
)
@pytest.mark.parametrize(
    "value", [True, "1", [1.0], {}, -1.0, 0, 0.0, NAN, INFINITY, -INFINITY, 10**400]
)
def test_s08_numbers_are_finite_and_positive(key: str, value: object) -> None:
    refused_value(changed(V2_5, **{key: value}), key, "number")


@pytest.mark.parametrize(
    "key",
    [
        "tie_word_embeddings",
        "use_bias",
        "use_qkv_bias",
        "use_qk_norm",
        "linear_silu",
        "use_linear_silu",
        "linear_rope",
    ],
)
@pytest.mark.parametrize("value", [0, 1, "true", 1.0, []])
def test_s08_switches_are_true_or_false(key: str, value: object) -> None:
    refused_value(changed(V2_5, **{key: value}), key, "true, false")


@pytest.mark.parametrize("value", [True, -1, "5", 1.0, {}, [1, True], [1, -1], [[1]], [None]])
def test_s08_end_tokens_are_ids(value: object) -> None:
    refused_value(changed(V2, eos_token_id=value), "eos_token_id", "a token id or a list of them")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["int8", "float8_e4m3fn", "torch.float64", 16, True, ["float32"]])
def test_unreadable_dtypes_are_refused(key: str, value: object) -> None:
    refused_value(changed(V2, **{key: value}), key, "float32, bfloat16, float16")


# ---- missing keys

ALWAYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "topk_group",
)
REQUIRED = [
    *((name, key) for name in BASES for key in ALWAYS),
    *((name, "num_key_value_heads") for name in (V2, LINEAR_V2)),
    *((name, key) for name in (LINEAR_V2, V2_5) for key in ("layer_group_size", "group_norm_size")),
    *(
        (V2_5, key)
        for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    ),
]


@pytest.mark.parametrize("absent", [ABSENT, None])
@pytest.mark.parametrize(("architecture", "key"), REQUIRED)
def test_missing_keys_are_named(architecture: str, key: str, absent: object) -> None:
    error = refused(changed(architecture, **{key: absent}))
    assert f"here/config.json: {key} is missing; it must be an integer from 1" in error.message
    assert error.hint


# ---- rope blocks


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "YARN", 3, ["yarn"], {}])
def test_other_rope_scalings_are_refused(place: str, key: str, kind: object) -> None:
    error = refused(changed(V2, **{place: {key: kind, "factor": 2.0}}))
    assert f"{key} = {kind!r}; allowed: default, yarn" in error.message


NESTED: list[tuple[dict[str, object], str]] = [
    ({"type": "yarn"}, "factor is missing"),
    ({"factor": 4.0}, "rope_type = None; allowed: default, yarn"),
    ({"rope_type": "yarn", "type": "linear"}, "type = 'linear'; allowed: 'yarn'"),
    ({"rope_type": "default", "type": "yarn"}, "type = 'yarn'; allowed: 'default'"),
    ({"type": "yarn", "factor": "4"}, "factor = '4'"),
    ({"type": "yarn", "factor": 0}, "factor = 0"),
    ({"type": "yarn", "factor": NAN}, "factor = nan"),
    ({"type": "yarn", "factor": 4, "truncate": False}, "truncate = False"),
    ({"type": "yarn", "factor": 4, "beta_fast": -1}, "beta_fast = -1"),
    ({"type": "yarn", "factor": 4, "beta_slow": True}, "beta_slow = True"),
    ({"type": "yarn", "factor": 4, "mscale": -0.5}, "mscale = -0.5"),
    ({"type": "yarn", "factor": 4, "mscale_all_dim": "1"}, "mscale_all_dim = '1'"),
    ({"type": "yarn", "factor": 4, "attention_factor": 0}, "attention_factor = 0"),
    (
        {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768.0},
        "original_max_position_embeddings = 32768.0",
    ),
    ({"rope_theta": 1e4}, "rope_theta = 10000.0; allowed: 600000.0, as at the top level"),
    ({"rope_theta": "6e5"}, "rope_theta = '6e5'"),
]


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("block", "said"), NESTED)
def test_wrong_values_inside_a_rope_block_are_named(
    place: str, block: dict[str, object], said: str
) -> None:
    assert said in refused(changed(V2, **{place: block})).message


def test_the_width_of_a_window_that_is_off_is_ignored() -> None:
    off = changed(V2, sliding_window=4096, use_sliding_window=False)
    assert ModelConfig.from_hf(off) == ModelConfig.from_hf(changed(V2))


def test_two_rope_blocks_must_agree() -> None:
    yarn = {"type": "yarn", "factor": 4.0}
    both = {"rope_scaling": yarn, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    error = refused(changed(V2, **both))
    assert "rope_parameters.factor = 2.0; allowed: 4.0, as in rope_scaling" in error.message
    ModelConfig.from_hf(changed(V2, rope_scaling=yarn, rope_parameters={**yarn}))


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("block", ["yarn", 4.0, [], True])
def test_a_rope_block_is_an_object(place: str, block: object) -> None:
    refused_value(changed(V2, **{place: block}), place, "null or an object")


def test_where_partial_rotary_factor_contradicts_itself() -> None:
    config = changed(V2, partial_rotary_factor=0.5, rope_parameters={"partial_rotary_factor": 1.0})
    assert "partial_rotary_factor = 1.0; allowed: 0.5" in refused(config).message
