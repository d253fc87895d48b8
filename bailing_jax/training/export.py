"""The trained weights as a released checkpoint looks: safetensors under the publishers' names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.params import describe
from convert.mapping import unplace

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
)
INDEX = "model.safetensors.index.json"


def export(
    folder: Path,
    config: ModelConfig,
    hf_config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    origin: Path,
    *,
    num_shards: int = 2,
) -> None:
    """Write a checkpoint folder; it appears whole or not at all, in place of an older one.

    Args:
        folder: to write.
        config: the model.
        hf_config: its config.json.
        weights: float32 by path.
        origin: the folder whose tokenizer and template files are taken along.
        num_shards: safetensors files.
    """
    from ml_dtypes import bfloat16

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = checkpoint_tensors(config, weights, np.dtype(bfloat16))
    _write_shards(partial, tensors, num_shards)
    content = {**hf_config, "torch_dtype": "bfloat16"}
    (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TEXT_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, partial / name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def checkpoint_tensors(
    config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: np.dtype[Any]
) -> dict[str, np.ndarray]:
    """Every checkpoint tensor by name, in `dtype`; a router's in float32, as the model has them."""
    tensors: dict[str, np.ndarray] = {}
    for param in describe(config):
        stored = np.dtype(np.float32) if param.dtype == "float32" else dtype
        values = np.asarray(weights[param.path]).astype(stored)
        for source in param.sources:
            out = tensors.setdefault(source.name, np.empty(source.shape, stored))
            unplace(source, values, out)
    return tensors


def _write_shards(folder: Path, tensors: Mapping[str, np.ndarray], num_shards: int) -> None:
    from safetensors.numpy import save_file

    total = sum(array.nbytes for array in tensors.values())
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(num_shards)]
    seen = 0
    for name, array in tensors.items():
        shards[min(num_shards - 1, seen * num_shards // total)][name] = array
        seen += array.nbytes
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
