"""Small random Bailing checkpoints with every irregularity a released one may have.

`draw_config` is a hypothesis strategy for a config.json, `random_tensors` its weights under the
checkpoint's names, `write_checkpoint` puts both on disk as a release would. Dimensions are drawn
all different where the family allows, so that a transposed or misread axis cannot go unnoticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from reference_numpy import head_dim, layer_kinds
from safetensors.numpy import save_file

V2 = "BailingMoeV2ForCausalLM"
LINEAR_V2 = "BailingMoeLinearV2ForCausalLM"
V2_5 = "BailingMoeV2_5ForCausalLM"
ARCHITECTURES = (V2, LINEAR_V2, V2_5)
LINEAR_V2_ALIASES = ("BailingMoELinearForCausalLM", "BailingMoeLinearForCausalLM")

# Keys of released files that change nothing, there to be tolerated.
INERT = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 20,
    "output_router_logits": False,
    "use_cache": True,
    "use_rmsnorm": True,
    "router_dtype": "fp32",
    "mtp_loss_scaling_factor": 0,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "torch_dtype": "float32",
}

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class _Sizes:
    """Draws sizes that no earlier draw of this config has taken."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.taken = draw, set[int]()

    def new(self, low: int, high: int, step: int = 1) -> int:
        free = [size for size in range(low, high + 1, step) if size not in self.taken]
        size = self.draw(st.sampled_from(free))
        self.taken.add(size)
        return size


@st.composite
def draw_config(draw: st.DrawFn, architectures: Sequence[str] = ARCHITECTURES) -> dict[str, Any]:
    """A small config.json of one of `architectures`; every prompt below 128 tokens fits."""
    architecture = draw(st.sampled_from(architectures))
    sizes = _Sizes(draw)
    config = {**INERT, **_heads(draw, sizes)}
    if architecture == V2_5:
        config |= _mla(draw, sizes)
    layers = draw(st.sampled_from([1, 2, 3, 4, 5, 5, 6, 6, 7, 7]))
    vocab = sizes.new(37, 97)
    config |= {
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, min(2, layers))),
        "vocab_size": vocab,
        "pad_token_id": vocab - 1,
        "eos_token_id": vocab - 1,
        "intermediate_size": sizes.new(20, 60),
        "use_bias": draw(st.booleans()),
        "use_qkv_bias": draw(st.booleans()),
        "use_qk_norm": draw(st.sampled_from([True, True, False])),
        "tie_word_embeddings": draw(st.sampled_from([False, False, True])),
        # V2.5's low-rank norms always use 1e-6, so another value would be ambiguous there.
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])) if architecture != V2_5 else 1e-6,
        "num_nextn_predict_layers": draw(st.integers(0, 1)) if architecture != LINEAR_V2 else 0,
    }
    config |= _experts(draw, sizes) | _rope(draw, config)
    if architecture != V2:
        config |= _linear(draw, config)
    return _name(draw, architecture) | config


def _name(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """What the file calls itself; a model_type alone does not tell the architectures apart."""
    if architecture == V2:
        kind = draw(st.sampled_from(["bailing_moe", "bailing_moe_v2"]))
    elif architecture == V2_5:
        kind = "bailing_hybrid"
    else:
        kind = "bailing_moe_linear"
        architecture = draw(st.sampled_from([*[LINEAR_V2] * 4, *LINEAR_V2_ALIASES]))
    return {"architectures": [architecture], "model_type": kind}


def _heads(draw: st.DrawFn, sizes: _Sizes) -> dict[str, Any]:
    """Head counts and widths; the heads together need not be as wide as the model."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 5, 6]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    width = sizes.new(8, 24, 2)
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes.taken |= {heads * width, (heads + 2 * kv_heads) * width, 3 * heads * width}
    implied = 24 <= heads * width <= 72 and draw(st.sampled_from([False, False, True]))
    if implied:
        absent = draw(st.sampled_from([{}, {"head_dim": None}]))
        return config | {"hidden_size": heads * width} | absent
    return config | {"hidden_size": sizes.new(24, 72), "head_dim": width}


def _mla(draw: st.DrawFn, sizes: _Sizes) -> dict[str, Any]:
    """Ranks and head widths of latent attention."""
    nope, rope = sizes.new(5, 20), sizes.new(4, 14, 2)
    return {
        "q_lora_rank": draw(st.sampled_from([None, sizes.new(10, 36)])),
        "kv_lora_rank": sizes.new(9, 40),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "qk_head_dim": nope + rope,
        "v_head_dim": sizes.new(5, 22),
        "rope_interleave": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "seq_aux": True,
    }


def _experts(draw: st.DrawFn, sizes: _Sizes) -> dict[str, Any]:
    """Routed and shared experts. A group has at least two experts, as its score is a sum of two."""
    groups = draw(st.sampled_from([0, 1, 2, 2, 3, 4]))
    spread = max(groups, 1)
    experts = spread * draw(st.integers(max(2, -(-4 // spread)), 12 // spread))
    kept = draw(st.integers(1, spread))
    config: dict[str, Any] = {
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, kept * experts // spread))),
        "moe_intermediate_size": sizes.new(5, 30),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 1.75])),
    }
    if groups:
        config |= {"n_group": groups, "topk_group": kept}
    else:
        ungrouped = [{}, {"n_group": None, "topk_group": None}, {"n_group": 0, "topk_group": 0}]
        config |= draw(st.sampled_from(ungrouped))
    shared = draw(st.sampled_from([1, 1, 2, 3, 0, None]))
    config |= {} if shared is None else {"num_shared_experts": shared}
    if draw(st.booleans()):
        config["moe_shared_expert_intermediate_size"] = sizes.new(5, 30)
    return config


def _linear(draw: st.DrawFn, config: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning layers: the groups of layers, the groups of channels and the optional switches."""
    channels = config["num_attention_heads"] * head_dim(config)
    # A norm over fewer than four channels says little of its input: x / |x| is a sign.
    norms = [g for g in range(1, min(13, channels // 4 + 1)) if channels % g == 0]
    optional = (
        ({}, {"decay_layer_offset": 0}, {"decay_layer_offset": 1}),
        ({}, {"linear_silu": False}, {"linear_silu": True}, {"use_linear_silu": True}),
        ({}, {"linear_rope": True}, {"linear_rope": False}),
    )
    # A group larger than the model leaves no lightning layer: legal, but dull if drawn often.
    filled = [g for g in (2, 3, 4) if g <= config["num_hidden_layers"]]
    linear: dict[str, Any] = {
        "layer_group_size": draw(st.sampled_from([*filled * 3, 2, 3, 4])),
        "group_norm_size": draw(st.sampled_from(norms)),
    }
    for choices in optional:
        linear |= draw(st.sampled_from(choices))
    return linear


def _rope(draw: st.DrawFn, config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope base, rotated channels and YaRN, in the places older and newer files keep them."""
    width = head_dim(config)
    factors = [f for f in (0.25, 0.5, 0.75, 1.0) if int(width * f) >= 2 and int(width * f) % 2 == 0]
    factor = draw(st.sampled_from(factors))
    partial = {"partial_rotary_factor": factor}
    dims = {"rotary_dim": int(width * factor)}
    rope: dict[str, Any] = dict(draw(st.sampled_from([{}, partial, dims, partial | dims])))
    scaling = _yarn(draw) if draw(st.booleans()) else None
    trained = (scaling or {}).get("original_max_position_embeddings", 128)
    extent = int(trained * (scaling or {"factor": 2.0})["factor"])
    # Some users leave the length of another factor in the file; the factor counts.
    rope["max_position_embeddings"] = draw(st.sampled_from([extent, extent, extent, 4096]))
    theta = {"rope_theta": draw(st.sampled_from([1e4, 6e5, 1_000_000, 6e6]))}
    style = draw(st.sampled_from(["top", "top", "inside", "split"]))
    if style == "top":
        key = draw(st.sampled_from(["type", "rope_type"]))
        return rope | theta | {"rope_scaling": {key: "yarn"} | scaling if scaling else None}
    block = {"rope_type": "yarn"} | scaling if scaling else {"rope_type": "default"}
    if style == "inside":
        return rope | {"rope_parameters": block | theta}
    return rope | theta | {"rope_parameters": block}


def _yarn(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a YaRN block but its type."""
    yarn: dict[str, Any] = {"factor": draw(st.sampled_from([2.0, 2.5, 4.0]))}
    lengths = ({"original_max_position_embeddings": n} for n in (64, 128, 512))
    attention = (
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"mscale_all_dim": 0.8},
        {"mscale": 0.8, "mscale_all_dim": 0},
        {"attention_factor": 1.15},
        {"attention_factor": 1.15, "mscale": 1.0, "mscale_all_dim": 0.6},
    )
    yarn |= draw(st.sampled_from([*lengths, {}]))
    yarn |= draw(st.sampled_from([{}, *attention]))
    return yarn | draw(
        st.sampled_from([{}, {"beta_fast": 32, "beta_slow": 1}, {"beta_fast": 16.0}])
    )


def tensor_shapes(
    config: Mapping[str, Any], *, kv_a_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, in the order a release stores them."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (vocab, width)}
    kinds = layer_kinds(config)
    # The MTP block sits behind the last layer, has softmax attention and is always sparse.
    mtp = config.get("num_nextn_predict_layers") or 0
    full = "mla" if "kv_lora_rank" in config else "gqa"
    for i, kind in enumerate([*kinds, *[full] * mtp]):
        block = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}.{norm}.weight"] = (width,)
        attention = _mla_shapes(config, kv_a_bias) if kind == "mla" else _head_shapes(config, kind)
        shapes |= {f"{block}.attention.{name}": shape for name, shape in attention}
        dense = i < config["first_k_dense_replace"] and i < len(kinds)
        mlp = _ffn("", width, config["intermediate_size"]) if dense else _moe_shapes(config)
        shapes |= {f"{block}.mlp.{name}": shape for name, shape in mlp}
        if i >= len(kinds):
            for norm in ("enorm", "hnorm", "final_layernorm"):
                shapes[f"{block}.{norm}.weight"] = (width,)
            shapes[f"{block}.eh_proj.weight"] = (width, 2 * width)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _head_shapes(config: Mapping[str, Any], kind: str) -> Shapes:
    """GQA and lightning attention; lightning has a kv head for every query head."""
    width, heads, head = config["hidden_size"], config["num_attention_heads"], head_dim(config)
    kv_heads = heads if kind == "lightning" else config["num_key_value_heads"]
    rows = (heads + 2 * kv_heads) * head
    yield "query_key_value.weight", (rows, width)
    if config["use_qkv_bias"]:
        yield "query_key_value.bias", (rows,)
    if config["use_qk_norm"]:
        yield "query_layernorm.weight", (head,)
        yield "key_layernorm.weight", (head,)
    if kind == "lightning":
        yield "g_proj.weight", (heads * head, width)
        yield "g_norm.weight", (heads * head,)
    yield "dense.weight", (width, heads * head)
    if config["use_bias"]:
        yield "dense.bias", (width,)


def _mla_shapes(config: Mapping[str, Any], kv_a_bias: bool) -> Shapes:
    """Latent attention."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    if q_rank is None:
        yield "q_proj.weight", (heads * (nope + rope), width)
    else:
        yield "q_a_proj.weight", (q_rank, width)
        if config["use_qkv_bias"]:
            yield "q_a_proj.bias", (q_rank,)
        yield "q_a_layernorm.weight", (q_rank,)
        yield "q_b_proj.weight", (heads * (nope + rope), q_rank)
    yield "kv_a_proj_with_mqa.weight", (kv_rank + rope, width)
    if kv_a_bias:
        yield "kv_a_proj_with_mqa.bias", (kv_rank + rope,)
    yield "kv_a_layernorm.weight", (kv_rank,)
    yield "kv_b_proj.weight", (heads * (nope + value), kv_rank)
    yield "dense.weight", (width, heads * value)
    if config["use_qkv_bias"]:
        yield "dense.bias", (width,)


def _moe_shapes(config: Mapping[str, Any]) -> Shapes:
    """Router, routed experts and the shared experts, which are stored as one wide one."""
    width, experts = config["hidden_size"], config["num_experts"]
    yield "gate.weight", (experts, width)
    yield "gate.expert_bias", (experts,)
    for expert in range(experts):
        yield from _ffn(f"experts.{expert}.", width, config["moe_intermediate_size"])
    shared = config.get("num_shared_experts") or 0
    each = config.get("moe_shared_expert_intermediate_size") or config["moe_intermediate_size"]
    if shared:
        yield from _ffn("shared_experts.", width, each * shared)


def _ffn(prefix: str, width: int, inner: int) -> Shapes:
    """A SwiGLU's three matrices."""
    yield f"{prefix}gate_proj.weight", (inner, width)
    yield f"{prefix}up_proj.weight", (inner, width)
    yield f"{prefix}down_proj.weight", (width, inner)


def random_tensors(
    config: Mapping[str, Any], seed: int, *, kv_a_bias: bool = False
) -> dict[str, np.ndarray]:
    """Every checkpoint tensor in float32; logits have a standard deviation of about 1.

    `kv_a_bias` adds the bias that some exporters give MLA's kv_a_proj_with_mqa.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config, kv_a_bias=kv_a_bias).items():
        mean, spread = _moments(name, shape)
        tensors[name] = (mean + spread * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def _moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name.endswith("expert_bias"):
        return -0.3, 0.3  # mostly negative: a dropped group masked with 0 would win
    if name.endswith(".bias"):
        return 0.0, 0.2
    if len(shape) == 1:
        return 1.0, 0.1
    # Experts that all score alike would make each choice a near-tie, and the bias decide alone.
    gain = 2.0 if name.endswith("mlp.gate.weight") else 1.0
    return 0.0, gain / math.sqrt(shape[1])


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write config.json and the weights, rounded to `dtype` but for the router's bias."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    stored = {
        name: np.ascontiguousarray(value, np.float32 if _keeps_float32(name) else DTYPES[dtype])
        for name, value in tensors.items()
    }
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(np.array_split(list(stored), shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        part = {str(name): stored[str(name)] for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _keeps_float32(name: str) -> bool:
    """The router's bias, under any of its names; a cast would move near-ties."""
    return name.endswith(("expert_bias", "e_score_correction_bias"))
