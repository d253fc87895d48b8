"""Presets: the released models' configurations under their names, for runs without a checkpoint.

A preset is a config.json written out, so that planning, benchmarks and random-weight runs need no
download; `ModelConfig.from_hf(preset.hf_config)` reads it like a file. A key that could not be
read from a published file or confirmed by the published parameter count is named in `assumed`:
its value is the sibling release's, and the real config.json decides. All of the family is listed;
architectures the loader does not know yet are refused by name there, not here. Standard library
only; knows neither arrays nor the loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Preset:
    """A released model by name.

    Args:
        name: the release's name in lower case.
        hf_config: the keys and values of its config.json.
        assumed: the keys of `hf_config` whose values are expected, not read anywhere.
        total_parameters: in billions, embeddings included, multi-token-prediction layer excluded.
    """

    name: str
    hf_config: Mapping[str, object]
    assumed: tuple[str, ...]
    total_parameters: float


_Config = dict[str, object]

_V1: _Config = {
    "architectures": ["BailingMoeForCausalLM"],
    "model_type": "bailing_moe",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 126464,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "tie_word_embeddings": False,
    "norm_head": True,
    "norm_softmax": False,
    "rms_norm_eps": 1e-6,
    "use_bias": False,
    "use_qkv_bias": False,
    "rope_theta": 600_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 16384,
    "first_k_dense_replace": 0,
    "num_experts": 64,
    "norm_topk_prob": True,
}

# What every architecture from V2 on shares; the entries below are differences to it.
_V2: _Config = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 157184,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "use_rmsnorm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "head_dim": 128,
    "rope_theta": 600_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "num_nextn_predict_layers": 0,
}

_MINI: _Config = {
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 512,
    "num_hidden_layers": 20,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}

_FLASH: _Config = {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "first_k_dense_replace": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}

_1T: _Config = {
    "hidden_size": 8192,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "num_hidden_layers": 80,
    "first_k_dense_replace": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}

_HALF_ROTARY: _Config = {"partial_rotary_factor": 0.5}

_LINEAR_V2: _Config = {
    **_HALF_ROTARY,
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "model_type": "bailing_moe_linear",
    "group_norm_size": 4,
    "linear_silu": False,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 131072,
}

# Shared by V2.5 and V3.
_LATENT: _Config = {
    **_HALF_ROTARY,
    "model_type": "bailing_hybrid",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 192,
    "v_head_dim": 128,
    "rope_interleave": True,
    "rope_theta": 6_000_000.0,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
}

_V2_5: _Config = {
    **_LATENT,
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "layer_group_size": 8,
    "linear_silu": False,
    "q_lora_rank": 1536,
    "scoring_func": "sigmoid",
}

_V3: _Config = {
    **_LATENT,
    "architectures": ["BailingMoeV3ForCausalLM"],
    "eos_token_id": 156895,
    "rotary_dim": 64,
    "short_conv_kernel_size": 4,
    "no_kda_lora": True,
    "use_kda_lora": False,
    "kda_safe_gate": True,
    "kda_lower_bound": -5,
    "gated_attention_proj_granularity_type": "head_wise",
    "group_norm_size": 1,
    "use_mla_nope": False,
    "use_nGPT": False,
    "up_proj_norm": False,
    "value_norm": False,
    "scale_router_input": False,
    "mtp_use_kda": False,
}

_ROUTER_ASSUMED = ("n_group", "topk_group", "routed_scaling_factor")


def _ling_lite() -> Preset:
    """The 2502 release; 1.5 has `norm_head` false and twice the positions."""
    config = {
        **_V1,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
    }
    return _preset("ling-lite", config, 16.802)


def _ling_plus() -> Preset:
    config = {
        **_V1,
        "hidden_size": 5376,
        "intermediate_size": 12288,
        "moe_intermediate_size": 3072,
        "num_hidden_layers": 88,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "head_dim": 96,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
    }
    return _preset("ling-plus", config, 290.603)


def _ling_mini() -> Preset:
    # Some releases carry a multi-token-prediction layer; generation never runs it.
    config = {**_V2, **_MINI, **_HALF_ROTARY}
    return _preset("ling-mini-2.0", config, 16.256, ("num_nextn_predict_layers",))


def _ling_flash() -> Preset:
    config = {**_V2, **_FLASH, **_HALF_ROTARY}
    assumed = (*_ROUTER_ASSUMED, "rope_theta", "num_nextn_predict_layers")
    return _preset("ling-flash-2.0", config, 102.890, assumed)


def _ling_1t() -> Preset:
    # 32768 positions come from a converted file, and the release notes speak of 64K: open.
    config = {**_V2, **_1T, "rotary_dim": 64}
    assumed = (*_ROUTER_ASSUMED, "max_position_embeddings", "num_nextn_predict_layers")
    return _preset("ling-1t", config, 999.705, assumed)


def _ring_mini_linear() -> Preset:
    config = {**_V2, **_MINI, **_LINEAR_V2, "layer_group_size": 5}
    return _preset("ring-mini-linear-2.0", config, 16.423)


def _ring_flash_linear() -> Preset:
    config = {**_V2, **_FLASH, **_LINEAR_V2, "layer_group_size": 8}
    assumed = (
        *_ROUTER_ASSUMED,
        "group_norm_size",
        "linear_silu",
        "partial_rotary_factor",
        "rope_theta",
        "max_position_embeddings",
        "num_nextn_predict_layers",
    )
    return _preset("ring-flash-linear-2.0", config, 104.182, assumed)


def _ling_2_6_flash() -> Preset:
    config = {
        **_V2,
        **_FLASH,
        **_V2_5,
        "num_key_value_heads": 32,
        "group_norm_size": 4,
        "max_position_embeddings": 131072,
    }
    return _preset("ling-2.6-flash", config, 104.187, ("rope_scaling", "routed_scaling_factor"))


def _ling_2_6_1t() -> Preset:
    config = {
        **_V2,
        **_1T,
        **_V2_5,
        "num_key_value_heads": 64,
        "group_norm_size": 8,
        "max_position_embeddings": 262144,
    }
    assumed = (
        "num_key_value_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "qk_head_dim",
        "v_head_dim",
        "rope_theta",
        "rope_scaling",
        "first_k_dense_replace",
        "routed_scaling_factor",
    )
    return _preset("ling-2.6-1t", config, 1012.2, assumed)


def _ling_3_0_flash() -> Preset:
    config = {
        **_V2,
        **_V3,
        "hidden_size": 2560,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "moe_shared_expert_intermediate_size": 768,
        "num_hidden_layers": 42,
        "first_k_dense_replace": 2,
        "layer_group_size": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_experts": 512,
        "q_lora_rank": None,
        "max_position_embeddings": 262144,
        # Layers 35 to 41, and 34 to 39 then 40 and 41; 0 is "no clamp".
        "expert_swiglu_limit_list": [0] * 35 + [4] * 7,
        "share_expert_swiglu_limit_list": [0] * 34 + [5] * 6 + [7] * 2,
    }
    return _preset("ling-3.0-flash", config, 124.414)


def _ling_3_0_tiny() -> Preset:
    config = {
        **_V2,
        **_V3,
        "hidden_size": 1536,
        "intermediate_size": 4608,
        "moe_intermediate_size": 512,
        "moe_shared_expert_intermediate_size": 512,
        "num_hidden_layers": 24,
        "first_k_dense_replace": 1,
        "layer_group_size": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 128,
        "q_lora_rank": 256,
        "linear_silu": True,
        "max_position_embeddings": 131072,
        "expert_swiglu_limit_list": None,
        "share_expert_swiglu_limit_list": None,
        "num_nextn_predict_layers": 0,
    }
    return _preset("ling-3.0-tiny", config, 7.893, ("num_nextn_predict_layers",))


def _preset(name: str, config: _Config, total: float, assumed: tuple[str, ...] = ()) -> Preset:
    return Preset(name, MappingProxyType(config), assumed, total)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            _ling_lite(),
            _ling_plus(),
            _ling_mini(),
            _ling_flash(),
            _ling_1t(),
            _ring_mini_linear(),
            _ring_flash_linear(),
            _ling_2_6_flash(),
            _ling_2_6_1t(),
            _ling_3_0_flash(),
            _ling_3_0_tiny(),
        )
    }
)


def find_preset(name: str) -> Preset | None:
    """The preset of that name in any case (`Ling-1T` is `ling-1t`), or None."""
    return PRESETS.get(name.lower())


def preset_names() -> tuple[str, ...]:
    """All names, oldest architecture first."""
    return tuple(PRESETS)
