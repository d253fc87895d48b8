"""Changes to a checkpoint folder that change no tensor: what a reader must not be put off by.

The control group of the corruptions. A converter that refuses everything passes those.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any

from corruptions import (
    INDEX,
    LONG_AGO,
    MTP_LAYER,
    Kinds,
    Said,
    Victim,
    by_offset,
    edit_json,
    read_shard,
    read_tensors,
    relist,
    write_tensors,
)
from safetensors_bytes import pack

KINDS = Kinds()


def _shuffled(victim: Victim, items: dict[str, Any]) -> dict[str, Any]:
    names = list(items)
    return {names[i]: items[names[i]] for i in victim.rng.permutation(len(names))}


Header = dict[str, Any]
_HEADERS: dict[str, Callable[[Victim, Header], bytes]] = {
    "as json writes it": lambda v, h: json.dumps(h).encode(),
    "one blank behind": lambda v, h: json.dumps(h, separators=(",", ":")).encode() + b" ",
    "much room behind": lambda v, h: json.dumps(h).encode() + b" \n\t\r" * 5000,
    "indented": lambda v, h: json.dumps(h, indent=7).encode(),
    "blanks everywhere": lambda v, h: json.dumps(h, separators=(" ,\r\n", "\t: ")).encode(),
    "names in another order": lambda v, h: json.dumps(_shuffled(v, h)).encode(),
    "fields in another order": lambda v, h: json.dumps(
        {n: dict(reversed(e.items())) for n, e in h.items()}
    ).encode(),
    "names escaped": lambda v, h: json.dumps(h).replace('"model.', '"\\u006dodel.').encode(),
    "no metadata": lambda v, h: json.dumps({n: h[n] for n in by_offset(h)}).encode(),
    "empty metadata": lambda v, h: json.dumps(h | {"__metadata__": {}}).encode(),
    "more metadata": lambda v, h: json.dumps(
        h | {"__metadata__": {"format": "pt", "": "", "note": "\u4e2d\U0001f600\0" * 999}},
        ensure_ascii=False,
    ).encode(),
}


@KINDS.add("benign", _HEADERS)
def header(victim: Victim, value: Callable[[Victim, Header], bytes]) -> Said:
    for path in victim.shards:
        entries, data = read_shard(path)
        path.write_bytes(pack(value(victim, entries), data))
    return ()


@KINDS.add("benign", ["data in another order", "2 shards", "7 shards", "one file"])
def sharding(victim: Victim, value: str) -> Said:
    tensors = {name: t for path in victim.shards for name, t in read_tensors(path).items()}
    for path in (*victim.shards, victim.index):
        path.unlink()
    tensors = _shuffled(victim, tensors)
    names = list(tensors)
    count = {"data in another order": 3, "2 shards": 2, "7 shards": 7}.get(value, 1)
    victim.shards = [victim.folder / f"part {i}.safetensors" for i in range(count)]
    for i, path in enumerate(victim.shards):
        write_tensors(path, {name: tensors[name] for name in names[i::count]})
    if value != "one file":
        victim.index.write_text('{"weight_map": {}}')
        relist(victim)
    return ()


def _reversed(document: dict[str, Any]) -> None:
    items = list(reversed(document.items()))
    document.clear()
    document.update(items)


_DOCUMENTS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "config: unknown keys": (
        "config.json",
        lambda config: config.update({"x_unknown": [{"deep": None}], "_note": "NaN, [[[[ and \0"}),
    ),
    "config: keys without effect": (
        "config.json",
        lambda config: config.update(
            {"auto_map": {"AutoModel": "modeling_x.Model"}, "transformers_version": "9.9"}
        ),
    ),
    "config: another order": ("config.json", _reversed),
    "config: quantization_config null": (
        "config.json",
        lambda config: config.update(quantization_config=None),
    ),
    "index: another order": (INDEX, lambda index: _reversed(index["weight_map"])),
    "index: no metadata": (INDEX, lambda index: index.pop("metadata")),
    "index: strange metadata": (INDEX, lambda index: index.update(metadata=[1], x=None)),
}


@KINDS.add("benign", _DOCUMENTS)
def document(victim: Victim, value: tuple[str, Callable[[dict[str, Any]], object]]) -> Said:
    name, change = value
    edit_json(victim.folder / name, change)
    return ()


@KINDS.add("benign", ["e_score_correction_bias", "experts.expert_bias"])
def router_bias_by_another_name(victim: Victim, value: str) -> Said:
    old, new = "gate.expert_bias", value if "." in value else f"gate.{value}"
    for path in victim.shards:
        # Those of the next-token layer are kept as they are, under the names they have.
        tensors = read_tensors(path)
        names = {n: n if n.startswith(MTP_LAYER) else n.replace(old, new) for n in tensors}
        write_tensors(path, {names[n]: tensor for n, tensor in tensors.items()})
    victim.index.write_text('{"weight_map": {}}')
    relist(victim)
    return ()


def _link_inside(victim: Victim) -> None:
    (victim.folder / "parts").mkdir()
    for path in victim.shards:
        path.rename(victim.folder / "parts" / path.stem)
        path.symlink_to(f"parts/{path.stem}")


def _hub_cache(victim: Victim) -> None:
    root = victim.folder.parent / "hub"
    snapshot = root / "snapshots" / "0123abcd"
    shutil.copytree(victim.folder, snapshot)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(root / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    shutil.rmtree(victim.folder)
    victim.folder.symlink_to("hub/snapshots/0123abcd")


def _link_to_folder(victim: Victim) -> None:
    victim.folder.rename(victim.folder.parent / "elsewhere")
    victim.folder.symlink_to("elsewhere")


def _files_beside(victim: Victim) -> None:
    for name in ("pytorch_model.bin", "modeling_x.py", ".hidden", "notes.txt", "model.gguf"):
        (victim.folder / name).write_bytes(b"\x80\x04\xff")
    (victim.folder / "original").mkdir()
    (victim.folder / "original" / "model.safetensors").write_bytes(b"")
    (victim.folder / "generation_config.json").write_text('{"eos_token_id": [35, 36]}')


def _set_times(when: int) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        for path in (*victim.shards, victim.index, victim.config):
            os.utime(path, ns=(when, when))

    return change


_PLACES: dict[str, Callable[[Victim], None]] = {
    "links inside": _link_inside,
    "hub cache": _hub_cache,
    "link to the folder": _link_to_folder,
    "files beside": _files_beside,
    "README empty": lambda victim: (victim.folder / "README.md").write_bytes(b"") and None,
    "README gone": lambda victim: (victim.folder / "README.md").unlink(),
    "written in 1970": _set_times(0),
    "written in 2100": _set_times(LONG_AGO * 5 // 2),
    "read only": lambda victim: [path.chmod(0o444) for path in victim.shards] and None,
}


@KINDS.add("benign", _PLACES)
def place(victim: Victim, value: Callable[[Victim], None]) -> Said:
    value(victim)
    return ()
