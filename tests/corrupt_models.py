"""Damage to what a checkpoint says, rows S08 to S10: config, values, which tensors there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from corruptions import (
    MTP_LAYER,
    Kinds,
    Said,
    Values,
    Victim,
    edit_json,
    named,
    read_tensors,
    relist,
    write_tensors,
)
from hf_configs import LINEAR_V2, V2, V2_5

KINDS = Kinds()

# ---------------------------------------------------------------- S08: config.json, other formats

_INTEGERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "topk_group",
)  # fmt: skip
_MORE_INTEGERS = {
    "v2": ("num_key_value_heads",),
    "linear": ("num_key_value_heads", "layer_group_size", "group_norm_size"),
    "v2_5": (
        "layer_group_size", "group_norm_size", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim",
    ),
}  # fmt: skip
_NO_SIZES = ("7", "", 1.5, True, [4], {}, -1, 0, 2**31, 10**40)


def _required(checkpoint: str) -> tuple[str, ...]:
    return (*_INTEGERS, *_MORE_INTEGERS[checkpoint])


def _set(victim: Victim, key: str, value: object) -> Said:
    edit_json(victim.config, lambda config: config.update({key: value}))
    return (str(victim.config), f"{key} =")


@KINDS.add("s08", lambda checkpoint: named([*_required(checkpoint), "rope_theta"]))
def config_key_lost(victim: Victim, value: str) -> Said:
    edit_json(victim.config, lambda config: config.pop(value))
    return (str(victim.config), value)


@KINDS.add("s08", lambda checkpoint: named([*_required(checkpoint), "rope_theta"]))
def config_key_null(victim: Victim, value: str) -> Said:
    edit_json(victim.config, lambda config: config.update({value: None}))
    return (str(victim.config), value)


@KINDS.add("s08", lambda checkpoint: named(_required(checkpoint)), times=2)
def config_size_of_no_model(victim: Victim, value: str) -> Said:
    return _set(victim, value, victim.choice(_NO_SIZES))


_UNSUPPORTED: list[tuple[str, Any]] = [
    *(("architectures", [name]) for name in ("BailingMoeForCausalLM", "BailingMoeV3ForCausalLM")),
    *(("architectures", [name]) for name in ("LlamaForCausalLM", "", "bailing", None, 1)),
    *(("architectures", value) for value in (V2, 5, {}, [[V2]])),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ("quantization_config", {}),
    ("quantization_config", []),
    ("layers_block_type", ["attention"]),
    ("torch_dtype", "float8_e4m3fn"),
    ("torch_dtype", "int8"),
    ("torch_dtype", 16),
    ("hidden_act", "gelu"),
    ("score_function", "softmax"),
    ("norm_topk_prob", False),
    ("norm_head", True),
    ("use_sliding_window", True),
    ("moe_router_enable_expert_bias", 1),
    ("short_conv_kernel_size", 4),
    ("use_qk_norm", "yes"),
    ("tie_word_embeddings", 0),
    ("use_qkv_bias", "no"),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", "1e-6"),
    ("rope_theta", 1),
    ("rope_theta", -10_000),
    ("rope_theta", "600000"),
    ("rope_scaling", "yarn"),
    ("rope_scaling", [1]),
    ("routed_scaling_factor", -2.5),
    ("routed_scaling_factor", True),
    ("eos_token_id", "</s>"),
    ("eos_token_id", [1, None]),
    ("eos_token_id", -1),
    ("decay_layer_offset", 2),
    ("decay_layer_offset", True),
    ("n_group", 3),
    ("n_group", 4),
    ("topk_group", 3),
    ("num_experts_per_tok", 3),
    ("num_experts", 4.0),
    ("first_k_dense_replace", 4),
    ("first_k_dense_replace", -1),
    ("partial_rotary_factor", 1.5),
    ("partial_rotary_factor", 0.1),
    ("num_nextn_predict_layers", -1),
    ("num_hidden_layers", 4097),
    ("num_attention_heads", 2**16 + 1),
    ("num_experts", 2**16 + 2),
]


@KINDS.add("s08", named(_UNSUPPORTED))
def config_value(victim: Victim, value: tuple[str, object]) -> Said:
    return _set(victim, *value)


# What the tensors then miss, or have too many of.
_MISFITS: dict[str, list[tuple[str, object, str]]] = {
    "all": [
        ("vocab_size", 38, "model.word_embeddings.weight"),
        ("hidden_size", 25, "model.word_embeddings.weight"),
        ("num_hidden_layers", 4, "model.layers.3."),
        ("num_hidden_layers", 2, "model.layers.2."),
        ("num_experts", 6, "experts.4."),
        ("moe_intermediate_size", 6, "experts.0.down_proj.weight"),
        ("intermediate_size", 21, "model.layers.0.mlp.down_proj.weight"),
        ("first_k_dense_replace", 0, "model.layers.0.mlp.experts.0."),
        ("first_k_dense_replace", 2, "model.layers.1.mlp.experts.0."),
        ("num_shared_experts", 2, "shared_experts.down_proj.weight"),
        ("num_shared_experts", 0, "shared_experts.down_proj.weight"),
        ("head_dim", 16, "query_key_value.weight"),
        ("use_qk_norm", False, "query_layernorm.weight"),
        ("use_bias", True, "attention.dense.bias"),
        ("use_qkv_bias", True, "query_key_value.bias"),
        ("num_attention_heads", 4, "attention.dense.weight"),
    ],
    "v2": [
        ("num_key_value_heads", 2, "query_key_value.weight"),
        ("architectures", [LINEAR_V2], ""),
    ],
    "linear": [
        ("layer_group_size", 3, "model.layers.1.attention.g_proj.weight"),
        ("num_key_value_heads", 2, "query_key_value.weight"),
        ("tie_word_embeddings", False, "lm_head.weight"),
        ("architectures", [V2], "attention.g_norm.weight"),
        ("architectures", [V2_5], ""),
    ],
    "v2_5": [
        ("layer_group_size", 3, "model.layers.1.attention.g_proj.weight"),
        ("q_lora_rank", None, "attention.q_proj.weight"),
        ("q_lora_rank", 8, "attention.q_a_proj.weight"),
        ("kv_lora_rank", 10, "attention.kv_a_proj_with_mqa.weight"),
        ("qk_nope_head_dim", 6, "attention.kv_b_proj.weight"),
        ("qk_rope_head_dim", 6, "attention.kv_a_proj_with_mqa.weight"),
        ("v_head_dim", 4, "attention.kv_b_proj.weight"),
        ("architectures", [LINEAR_V2], ""),
    ],
}


def _misfits(checkpoint: str) -> Values:
    return named([*_MISFITS["all"], *_MISFITS[checkpoint]])


@KINDS.add("s08", _misfits)
def config_of_another_model(victim: Victim, value: tuple[str, object, str]) -> Said:
    key, new, said = value
    _set(victim, key, new)
    return (str(victim.folder), said)


_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack")


@KINDS.add("s08", [(suffix, index) for suffix in _FORMATS for index in (True, False)])
def no_safetensors(victim: Victim, value: tuple[str, bool]) -> Said:
    suffix, keep_index = value
    for path in victim.shards:
        path.rename(path.with_suffix(suffix))
    if keep_index:
        return (str(victim.folder), repr(victim.shard.name), "missing")
    victim.index.unlink()
    name = victim.shard.with_suffix(suffix).name
    return (str(victim.folder), repr(name), "nothing pickled is ever opened")


# ---------------------------------------------------------------- S09: values

BITS = {  # as bfloat16 and as float32
    "NaN": (0x7FC0, 0x7FC00000),
    "-NaN": (0xFFC0, 0xFFC00000),
    "signalling NaN": (0x7F81, 0x7F800001),
    "+inf": (0x7F80, 0x7F800000),
    "-inf": (0xFF80, 0xFF800000),
    "1e31": (0x72FC, 0x72FC6F7C),
    "-1e31": (0xF2FC, 0xF2FC6F7C),
    "the largest": (0x7F7F, 0x7F7FFFFF),
}


def in_the_last_file(name: str) -> bool:
    """Whether the converter comes to a tensor when it has written most of the others."""
    return name.startswith((MTP_LAYER, "model.norm"))


_PLACES: dict[str, Callable[[str], bool]] = {
    "any": lambda name: True,
    "vector": lambda name: "norm" in name,
    "expert": lambda name: ".experts." in name,
    "router": lambda name: "mlp.gate." in name,
    "router's bias": lambda name: name.endswith("expert_bias"),
    "next-token layer": lambda name: name.startswith(MTP_LAYER),
    "last file": in_the_last_file,
}


def _values(checkpoint: str) -> Values:
    return {
        f"{value} in {place}": (bits, wanted)
        for value, bits in BITS.items()
        for place, wanted in _PLACES.items()
        if not (checkpoint == "linear" and place == "next-token layer")
    }


@KINDS.add("s09", _values)
def value_of_no_weight(
    victim: Victim, value: tuple[tuple[int, int], Callable[[str], bool]]
) -> Said:
    return plant(victim, *value)


def plant(victim: Victim, bits: tuple[int, int], wanted: Callable[[str], bool]) -> Said:
    """Put a value into an element of one of the wanted tensors, of whatever shard."""
    places = [(p, n) for p in victim.shards for n in read_tensors(p) if wanted(n)]
    shard, name = victim.choice(places)
    tensors = read_tensors(shard)
    dtype, shape, content = tensors[name]
    array = np.frombuffer(content, {"BF16": np.uint16, "F32": np.uint32}[dtype]).copy()
    at = victim.int(0, array.size)
    array[at] = bits[dtype == "F32"]
    tensors[name] = (dtype, shape, array.tobytes())
    write_tensors(shard, tensors)
    index = tuple(int(i) for i in np.unravel_index(at, shape))
    return (str(shard), repr(name), f"at index {index}")


# ---------------------------------------------------------------- S10: which tensors there are

_RENAMED: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "blank behind": lambda name: name + " ",
    "another prefix": lambda name: "transformer." + name.removeprefix("model."),
    "doubled prefix": lambda name: "model." + name,
    "no suffix": lambda name: name.rpartition(".")[0],
    "other suffix": lambda name: name.rpartition(".")[0] + ".weight_scale_inv",
    "full width": lambda name: name.replace("e", "\uff45"),
    "nul": lambda name: name + "\0",
    "escape": lambda name: name + "\x1b[2J",
    "right to left": lambda name: "\u202e" + name,
    "empty": lambda name: "",
    "very long": lambda name: name + "x" * 10_000,
}


@KINDS.add("s10", range(6))
def tensor_lost(victim: Victim, _value: int) -> Said:
    name = victim.tensor()
    tensors = read_tensors(victim.shard)
    del tensors[name]
    write_tensors(victim.shard, tensors)
    edit_json(victim.index, lambda index: index["weight_map"].pop(name))
    return (str(victim.folder), "missing: 1 x", name)


@KINDS.add("s10", _RENAMED, times=2)
def tensor_renamed(victim: Victim, value: Callable[[str], str]) -> Said:
    name = victim.tensor()
    tensors = read_tensors(victim.shard)
    tensors[value(name)] = tensors.pop(name)
    write_tensors(victim.shard, tensors)
    relist(victim)
    return (str(victim.folder), name, "missing: 1 x", "unexpected: 1 x")


_STRANGERS = (
    "extra", "model.layers.99.input_layernorm.weight", "model.layers.0.attention.dense.weight_s",
    "model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.-1.input_layernorm.weight",
    "model.layers.01.input_layernorm.weight", "__metadata__2", "model.embed_tokens.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias", "lm_head.bias",
)  # fmt: skip


@KINDS.add("s10", _STRANGERS)
def tensor_too_many(victim: Victim, value: str) -> Said:
    tensors = read_tensors(victim.shard)
    write_tensors(victim.shard, {**tensors, value: ("BF16", [3], bytes(6))})
    relist(victim)
    return (str(victim.folder), value, "unexpected: 1 x")
