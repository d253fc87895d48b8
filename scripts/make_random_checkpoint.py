"""Write a random LinearV2 checkpoint in the released Hugging Face format.

`python scripts/make_random_checkpoint.py --out DIR --seed N [--config JSON]` writes
`config.json` and `model.safetensors`: lightning attention in every layer but the last of each
group, mixture-of-experts after the dense layers, weights ~ N(0, 1/fan_in), norms of one. It is
real work of a real shape, so speed measured on it counts; the text it produces is noise.

Shapes follow the released tensor names, stored `[out, in]`. This module knows nothing of any
engine: it needs numpy and safetensors only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Config: TypeAlias = dict[str, Any]
Shapes: TypeAlias = dict[str, tuple[int, ...]]

DEFAULT_CONFIG: Config = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "model_type": "bailing_moe_linear",
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 10,
    "layer_group_size": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "group_norm_size": 4,
    "linear_silu": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "use_rmsnorm": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "eos_token_id": 8191,
    "pad_token_id": 8191,
    "torch_dtype": "float32",
    "use_cache": True,
}

# Fields a shape or a name depends on: any other value would need tensors not written here.
FIXED_FIELDS: tuple[str, ...] = (
    "architectures",
    "model_type",
    "use_bias",
    "use_qkv_bias",
    "num_nextn_predict_layers",
    "moe_router_enable_expert_bias",
    "torch_dtype",
)

# Routers that mask a dropped group with 0 instead of minus infinity agree with the others only
# while every biased score is positive, so the bias is.
EXPERT_BIAS_MAX = 0.05


def merged_config(overrides: Config) -> Config:
    """Return the default config with `overrides` applied; raise ValueError on a bad field."""
    unknown = sorted(set(overrides) - set(DEFAULT_CONFIG))
    if unknown:
        raise ValueError(f"unknown config fields {unknown}; known: {sorted(DEFAULT_CONFIG)}")
    config = DEFAULT_CONFIG | overrides
    for name in FIXED_FIELDS:
        if config[name] != DEFAULT_CONFIG[name]:
            raise ValueError(f"{name} must stay {DEFAULT_CONFIG[name]!r}, got {config[name]!r}")
    if config["num_experts"] % config["n_group"]:
        raise ValueError("num_experts must be a multiple of n_group")
    if config["num_attention_heads"] % config["group_norm_size"]:
        raise ValueError("num_attention_heads must be a multiple of group_norm_size")
    return config


def is_softmax_layer(config: Config, layer: int) -> bool:
    """Whether `layer` has softmax attention: the last of its group, or in an incomplete group."""
    group = config["layer_group_size"]
    complete = config["num_hidden_layers"] // group * group
    return (layer + 1) % group == 0 or layer >= complete


def tensor_shapes(config: Config) -> Shapes:
    """Return every tensor's name and shape, in file order."""
    d, v = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.word_embeddings.weight": (v, d)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (d,)
        shapes |= {prefix + "attention." + n: s for n, s in _attention_shapes(config, layer)}
        shapes[prefix + "post_attention_layernorm.weight"] = (d,)
        shapes |= {prefix + "mlp." + n: s for n, s in _mlp_shapes(config, layer)}
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def _attention_shapes(config: Config, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, n, h = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    softmax = is_softmax_layer(config, layer)
    # Lightning layers have as many key and value heads as query heads, whatever the config says.
    k = config["num_key_value_heads"] if softmax else n
    yield "query_key_value.weight", ((n + 2 * k) * h, d)
    if config["use_qk_norm"]:
        yield "query_layernorm.weight", (h,)
        yield "key_layernorm.weight", (h,)
    if not softmax:
        yield "g_proj.weight", (n * h, d)
        yield "g_norm.weight", (n * h,)
    yield "dense.weight", (d, n * h)


def _mlp_shapes(config: Config, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, e = config["hidden_size"], config["num_experts"]
    if layer < config["first_k_dense_replace"]:
        yield from _swiglu_shapes("", d, config["intermediate_size"])
        return
    f = config["moe_intermediate_size"]
    yield "gate.weight", (e, d)
    yield "gate.expert_bias", (e,)
    for expert in range(e):
        yield from _swiglu_shapes(f"experts.{expert}.", d, f)
    if config["num_shared_experts"]:
        yield from _swiglu_shapes("shared_experts.", d, f * config["num_shared_experts"])


def _swiglu_shapes(prefix: str, d: int, f: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (f, d)
    yield prefix + "up_proj.weight", (f, d)
    yield prefix + "down_proj.weight", (d, f)


def parameter_counts(config: Config) -> dict[str, int]:
    """Count parameters: all of them, and those one decoded token reads.

    Active are the chosen experts and everything else that is multiplied with; of an untied
    embedding table a token reads one row, which counts as such.
    """
    total = active = 0
    for name, shape in tensor_shapes(config).items():
        size = math.prod(shape)
        total += size
        if ".mlp.experts." in name:
            continue
        is_lookup = name == "model.word_embeddings.weight" and not config["tie_word_embeddings"]
        active += shape[-1] if is_lookup else size
    d, f = config["hidden_size"], config["moe_intermediate_size"]
    sparse = max(0, config["num_hidden_layers"] - config["first_k_dense_replace"])
    active += sparse * config["num_experts_per_tok"] * 3 * d * f
    return {"total": total, "active": active}


def random_tensors(config: Config, seed: int) -> dict[str, NDArray[np.float32]]:
    """Draw every tensor; one seed gives one file."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("expert_bias"):
            tensors[name] = rng.uniform(0.0, EXPERT_BIAS_MAX, shape).astype(np.float32)
        elif len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
        else:
            scale = np.float32(shape[-1] ** -0.5)
            tensors[name] = rng.standard_normal(shape, np.float32) * scale
    return tensors


def write_checkpoint(folder: Path, config: Config, seed: int) -> int:
    """Write `config.json` and `model.safetensors` into `folder`; return the bytes of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def parse_overrides(text: str) -> Config:
    """Read config fields from JSON, or from the JSON file that `text` names."""
    path = Path(text)
    source = text if text.lstrip().startswith("{") else path.read_text()
    overrides = json.loads(source)
    if not isinstance(overrides, dict):
        raise ValueError(f"--config must be a JSON object, got {type(overrides).__name__}")
    return overrides


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="write a random LinearV2 checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="{}", help="fields to override: JSON, or a JSON file")
    args = parser.parse_args()
    try:
        config = merged_config(parse_overrides(args.config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    weight_bytes = write_checkpoint(args.out, config, args.seed)
    counts = parameter_counts(config)
    print(
        f"{args.out}: {counts['total'] / 1e6:.1f} M parameters "
        f"({counts['active'] / 1e6:.1f} M active), {weight_bytes / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
