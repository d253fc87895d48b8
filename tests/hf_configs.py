"""A config.json of each architecture, written out by hand, with all dimensions different."""

from __future__ import annotations

import warnings
from typing import Any

from bailing_jax.config import ModelConfig

V2 = "BailingMoeV2ForCausalLM"
LINEAR_V2 = "BailingMoeLinearV2ForCausalLM"
V2_5 = "BailingMoeV2_5ForCausalLM"

# As a value for `changed`: leave the key out.
ABSENT = object()

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 56,
    "num_hidden_layers": 7,
    "first_k_dense_replace": 1,
    "intermediate_size": 44,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "use_qk_norm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "num_experts": 12,
    "num_experts_per_tok": 5,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 9,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "eos_token_id": 95,
    "torch_dtype": "bfloat16",
}
_LINEAR: dict[str, Any] = {
    "layer_group_size": 3,
    "group_norm_size": 4,
    "partial_rotary_factor": 0.5,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 23,
    "kv_lora_rank": 31,
    "qk_nope_head_dim": 13,
    "qk_rope_head_dim": 8,
    "v_head_dim": 11,
}

BASES: dict[str, dict[str, Any]] = {
    V2: {**_COMMON, "architectures": [V2], "model_type": "bailing_moe"},
    LINEAR_V2: {
        **_COMMON,
        **_LINEAR,
        "architectures": [LINEAR_V2],
        "model_type": "bailing_moe_linear",
    },
    V2_5: {
        **_COMMON,
        **_LINEAR,
        **_LATENT,
        "architectures": [V2_5],
        "model_type": "bailing_hybrid",
    },
}


def changed(architecture: str, **changes: object) -> dict[str, Any]:
    """The architecture's config with keys replaced, added or (ABSENT) removed."""
    config = {**BASES[architecture], **changes}
    return {key: value for key, value in config.items() if value is not ABSENT}


def read(architecture: str, **changes: object) -> ModelConfig:
    """The config, which must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelConfig.from_hf(changed(architecture, **changes))
