"""Write a Hugging Face checkpoint of any size in seconds: real headers, and holes for weights.

`python scripts/make_sparse_checkpoint.py --out DIR [--preset NAME | --config FILE]` writes
`config.json`, the index and the safetensors shards of a model, a trillion parameters if nothing
else is asked for. Names, shapes and dtypes are a release's, next-token prediction layer included;
the data is a hole in the file, which reads as zeros and takes no disk. What is done to headers
(planning, checking, refusing) can so be tried at full size. `--seed` writes random data instead.

Shapes come from `bailing_jax.params`, so this is no second opinion about them; no device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bailing_jax.config import ModelConfig
from bailing_jax.errors import UserError
from bailing_jax.params import Param, Shape, describe
from bailing_jax.presets import find_preset, preset_names

DEFAULT_PRESET = "ling-2.6-1t"
SHARD_BYTES = 5 * 10**9
ITEM_BYTES = {"BF16": 2, "F32": 4}

_PIECE = 2**22  # random elements made at a time
_FLOAT32 = ("expert_bias", "e_score_correction_bias")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its name, the format's name of its dtype, its shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Fill: TypeAlias = Callable[[BinaryIO, Tensor], None]  # writes the tensor where the file stands


def tensors_of(hf_config: Mapping[str, Any], where: str = "config.json") -> list[Tensor]:
    """Every tensor of the checkpoint, in the order in which a release fills its shards.

    Raises:
        UserError: the config is of no supported model, or has two next-token prediction layers.
    """
    config = ModelConfig.from_hf(hf_config, where=where)
    shapes = dict(_in_release_order(describe(config)))
    count = hf_config.get("num_nextn_predict_layers") or 0
    if count > 1 or (count and config.num_dense_layers >= config.num_layers):
        raise UserError(f"{where}: num_nextn_predict_layers {count} of this model is not written")
    if count:
        shapes = _with_mtp_layer(shapes, config)
    return [
        Tensor(name, "F32" if name.endswith(_FLOAT32) else "BF16", shape)
        for name, shape in shapes.items()
    ]


def _in_release_order(params: Iterable[Param]) -> Iterator[tuple[str, Shape]]:
    """Releases go expert after expert, a parameter has all experts of one projection."""
    stacked: list[Param] = []
    for param in params:
        if param.sources[0].index is not None:
            stacked.append(param)
            continue
        for expert in zip(*(p.sources for p in stacked), strict=True):
            yield from ((source.name, source.shape) for source in expert)
        stacked = []
        yield from ((source.name, source.shape) for source in param.sources)
    if stacked:
        raise ValueError("a model ends with its final norm, not with experts")


def _with_mtp_layer(shapes: Mapping[str, Shape], config: ModelConfig) -> dict[str, Shape]:
    """With a layer like the last (softmax attention, experts) and what joins two tokens."""
    last, new = f"model.layers.{config.num_layers - 1}.", f"model.layers.{config.num_layers}."
    layer = {
        name.replace(last, new, 1): shape for name, shape in shapes.items() if name.startswith(last)
    }
    width = config.hidden_size
    layer |= {f"{new}{name}.weight": (width,) for name in ("enorm", "hnorm", "final_layernorm")}
    layer[f"{new}eh_proj.weight"] = (width, 2 * width)
    behind = {name: shape for name, shape in shapes.items() if _is_behind_layers(name)}
    before = {name: shape for name, shape in shapes.items() if name not in behind}
    return before | layer | behind


def _is_behind_layers(name: str) -> bool:
    return not _LAYER.match(name) and not name.startswith("model.word_embeddings")


def write_checkpoint(
    folder: Path,
    hf_config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    fill: Fill | None = None,
) -> list[Tensor]:
    """Write the checkpoint into a new folder; returns its tensors.

    Args:
        folder: must not exist; its parent must.
        hf_config: the content of config.json.
        shard_bytes: a shard ends before the tensor that would make it larger.
        fill: writes the data; without it there are only holes.

    Raises:
        UserError: as `tensors_of`; or the folder cannot be made.
    """
    tensors = tensors_of(hf_config)
    try:
        folder.mkdir()
    except OSError as error:
        hint = "Give the name of a new folder in one that exists."
        raise UserError(f"{folder}: {error.strerror}", hint) from error
    _write_json(folder / "config.json", dict(hf_config))
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        _write_shard(folder / name, shard, fill)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return tensors


def _shards(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: Sequence[Tensor], fill: Fill | None) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # As the safetensors library puts them: layer by layer in shards, but by name within each.
    tensors = sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.name))
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if fill is not None:
            for tensor in tensors:
                fill(file, tensor)
        file.truncate(8 + len(header) + end)


def random_fill(seed: int) -> Fill:
    """Writes bfloat16 of random bits below 2 in magnitude, and float32 between 0 and 1."""
    rng = np.random.default_rng(seed)

    def fill(file: BinaryIO, tensor: Tensor) -> None:
        if tensor.dtype == "F32":
            file.write(rng.random(tensor.shape, np.float32).tobytes())
            return
        for left in range(math.prod(tensor.shape), 0, -_PIECE):
            bits = rng.integers(0, 2**16, min(left, _PIECE), np.uint16)
            # Without the exponent's highest bit nothing is large, infinite or NaN.
            file.write((bits & np.uint16(0xBFFF)).tobytes())

    return fill


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_config(preset: str, path: Path | None) -> dict[str, Any]:
    """The config.json at `path`, or the preset's if that is None.

    Raises:
        UserError: there is no such file or preset.
    """
    if path is not None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    found = find_preset(preset)
    if found is None:
        raise UserError(f"--preset {preset}: must be one of {', '.join(preset_names())}")
    return dict(found.hf_config)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="write a checkpoint of real shapes")
    parser.add_argument("--out", type=Path, required=True, help="folder to be made")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", default=DEFAULT_PRESET, help=f"default: {DEFAULT_PRESET}")
    which.add_argument("--config", type=Path, help="a config.json instead of a preset")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="default: 5")
    parser.add_argument("--seed", type=int, help="write random data of this seed, not holes")
    args = parser.parse_args()
    try:
        hf_config = read_config(args.preset, args.config)
        fill = None if args.seed is None else random_fill(args.seed)
        tensors = write_checkpoint(args.out, hf_config, int(args.shard_gb * 1e9), fill)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = sorted(args.out.glob("*.safetensors"))
    on_disk = sum(os.stat(path).st_blocks * 512 for path in args.out.iterdir())
    print(
        f"{args.out}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e9:.1f} GB in "
        f"{len(files)} files, {on_disk / 1e6:.1f} MB of disk"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
