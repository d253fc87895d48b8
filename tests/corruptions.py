"""Small sound checkpoints, and how a copy of one is damaged.

A `Kind` damages a `Victim` (a copy) as one of its values says, and returns what the refusal must
say: names of files and tensors. Values times checkpoints times repeats are the kind's `cases`; a
case draws from a seed made of its name only, so it is the same in every run. The kinds are in
`corrupt_shards` (one file) and `corrupt_folders` (everything else). Nothing here knows how the
converter checks.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hf_configs import LINEAR_V2, V2, V2_5, changed
from random_checkpoints import random_tensors, write_checkpoint
from safetensors_bytes import pack

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
LONG_AGO = 1_600_000_000 * 10**9  # so that whatever is rewritten has another mtime
MTP_LAYER = "model.layers.3."

_SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "vocab_size": 37,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "num_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "eos_token_id": 35,
}
_GROUPS = {"layer_group_size": 2, "group_norm_size": 2}
_RANKS = {"q_lora_rank": 7, "kv_lora_rank": 9}
_WIDTHS = {"qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 3}
CONFIGS = {
    "v2": changed(V2, **_SMALL, num_nextn_predict_layers=1),
    "linear": changed(
        LINEAR_V2, **_SMALL, **_GROUPS, tie_word_embeddings=True, num_nextn_predict_layers=0
    ),
    "v2_5": changed(V2_5, **_SMALL, **_GROUPS, **_RANKS, **_WIDTHS, num_nextn_predict_layers=1),
}

Said = tuple[str, ...]
Entry = dict[str, Any]


def write_sound(folder: Path, checkpoint: str, seed: int = 1, shards: int = 3) -> None:
    """Write one of CONFIGS in bfloat16, last changed long ago."""
    config = CONFIGS[checkpoint]
    tensors = random_tensors(config, seed)
    write_checkpoint(folder, config, tensors, shards=shards, dtype="bfloat16")
    (folder / "README.md").write_text("A model card.\n")
    for path in folder.iterdir():
        os.utime(path, ns=(LONG_AGO, LONG_AGO))


class Victim:
    """A copy of a sound checkpoint: `shard` is the one to damage, `rng` decides the rest."""

    def __init__(self, folder: Path, checkpoint: str, number: int, seed: str) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.rng = np.random.default_rng(zlib.crc32(seed.encode()))
        self.shards = sorted(folder.glob("*.safetensors"))
        first = zlib.crc32(seed.rpartition(" ")[0].encode())
        self.shard = self.shards[(first + number) % len(self.shards)]
        self.index, self.config = folder / INDEX, folder / CONFIG

    def int(self, low: int, high: int) -> int:
        """An integer in [low, high)."""
        return int(self.rng.integers(low, high))

    def choice(self, options: Iterable[Any]) -> Any:
        """One of several."""
        options = list(options)
        return options[self.int(0, len(options))]

    def tensor(self, wanted: Callable[[str, Entry], bool] = lambda _name, _entry: True) -> str:
        """A tensor of the shard that the model uses (its MTP layer is another matter)."""
        entries = read_shard(self.shard)[0]
        names = [n for n in entries if not n.startswith(("__", MTP_LAYER))]
        return self.choice(n for n in names if wanted(n, entries[n]))


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a sound file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def by_offset(header: Mapping[str, Any]) -> list[str]:
    """The tensors' names in the order of their data."""
    names = [name for name in header if name != "__metadata__"]
    return sorted(names, key=lambda name: header[name]["data_offsets"])


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    """Write a sound file of (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    path.write_bytes(pack(header, data))


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """What `write_tensors` writes, metadata left out."""
    header, data = read_shard(path)
    return {
        name: (header[name]["dtype"], header[name]["shape"], data[slice(*offsets)])
        for name in by_offset(header)
        for offsets in [header[name]["data_offsets"]]
    }


def tensors_of(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a folder's sound files."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in read_tensors(path).items()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file's document in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=2))


def relist(victim: Victim) -> None:
    """Let the index say what the shards hold."""
    found = {name: path.name for path in victim.shards for name in read_tensors(path)}
    edit_json(victim.index, lambda index: index.update(weight_map=found))


# ---------------------------------------------------------------- kinds and their cases

Corrupt = Callable[[Victim, Any], Said]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One damaged checkpoint; the name says all there is to know about it."""

    name: str
    checkpoint: str
    number: int
    value: object
    corrupt: Corrupt

    def damage(self, folder: Path) -> Said:
        """Damage a copy of the checkpoint; returns what the refusal must say."""
        return self.corrupt(Victim(folder, self.checkpoint, self.number, self.name), self.value)


@dataclass(frozen=True)
class Kind:
    """A way to damage a checkpoint; `values` may depend on which one it is."""

    name: str
    corrupt: Corrupt
    values: Values | Callable[[str], Values]
    times: int

    def cases(self) -> list[Case]:
        """Every value for every checkpoint, `times` times."""
        return [
            Case(f"{self.name} {checkpoint} {label} {number}", checkpoint, number, value, corrupt)
            for corrupt in [self.corrupt]
            for checkpoint in CONFIGS
            for label, value in self.values_of(checkpoint).items()
            for number in range(self.times)
        ]

    def values_of(self, checkpoint: str) -> Values:
        """Each value by its label."""
        return self.values if isinstance(self.values, Mapping) else self.values(checkpoint)


class Kinds(list[Kind]):
    """The kinds of a module, in its order."""

    def add(
        self, row: str, values: Values | Callable[[str], Values] | Iterable[Any], times: int = 1
    ) -> Callable[[Corrupt], Corrupt]:
        """Register a function as a kind under a row of the list of known failures."""

        def register(corrupt: Corrupt) -> Corrupt:
            known = values if isinstance(values, Mapping) or callable(values) else named(values)
            self.append(Kind(f"{row}_{corrupt.__name__}", corrupt, known, times))
            return corrupt

        return register


def named(values: Iterable[Any]) -> dict[str, Any]:
    """Each value under what it looks like."""
    values = list(values)
    found = {ascii(value)[:60]: value for value in values}
    assert len(found) == len(values)
    return found
