"""Damage to a checkpoint folder, rows S02 and S07: JSON files, index, shards, links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corruptions import (
    CONFIG,
    CONFIGS,
    INDEX,
    Kinds,
    Said,
    Victim,
    edit_json,
    named,
    read_tensors,
    write_sound,
    write_tensors,
)
from safetensors_bytes import POINTER

KINDS = Kinds()

# ---------------------------------------------------------------- S02: index and config as text


def _with(raw: str) -> Callable[[Victim, str], bytes]:
    return lambda victim, text: f'{{"x": {raw}, {text[1:]}'.encode()


Damage = Callable[[Victim, str], bytes]
_TEXTS: dict[str, Damage] = {
    "empty": lambda v, t: b"",
    "blank": lambda v, t: b" \n",
    "list": lambda v, t: f"[{t}]".encode(),
    "string": lambda v, t: json.dumps(t).encode(),
    "number": lambda v, t: b"1",
    "null": lambda v, t: b"null",
    "no end": lambda v, t: t.rstrip()[:-1].encode(),
    "cut": lambda v, t: t[: v.int(1, len(t) - 2)].encode(),
    "cut elsewhere": lambda v, t: t[: v.int(1, len(t) - 2)].encode(),
    "no beginning": lambda v, t: t[1:].encode(),
    "two documents": lambda v, t: (t + t).encode(),
    "comma at the end": lambda v, t: (t.rstrip()[:-1] + ",}").encode(),
    "single quotes": lambda v, t: t.replace('"', "'").encode(),
    "comment": lambda v, t: ("// sound\n" + t).encode(),
    "utf-16": lambda v, t: t.encode("utf-16"),
    "byte order mark": lambda v, t: b"\xef\xbb\xbf" + t.encode(),
    "latin-1": lambda v, t: b'{"\xe9": 1,' + t[1:].encode(),
    "surrogate": lambda v, t: b'{"\xed\xa0\x80": 1,' + t[1:].encode(),
    "nul": lambda v, t: t.encode() + b"\0",
    "random bytes": lambda v, t: v.rng.bytes(len(t)),
    "lfs pointer": lambda v, t: POINTER.encode(),
    "web page": lambda v, t: b"<!DOCTYPE html><html></html>",
    "key twice": lambda v, t: f'{{"x": 1, "x": 1, {t[1:]}'.encode(),
    "all keys twice": lambda v, t: (t.rstrip()[:-1] + "," + t[1:]).encode(),
    "inner key twice": _with('{"a": {"b": 1, "b": 2}}'),
    **{f"NaN and such: {raw}": _with(raw) for raw in ("NaN", "-NaN", "Infinity", "-Infinity")},
    "1e999": _with("1e999"),
    "5000 digits": _with("9" * 5000),
    "201 lists": _with("[" * 201 + "]" * 201),
    "100000 lists": _with("[" * 100_000 + "]" * 100_000),
    "100000 objects": _with('{"a":' * 100_000 + "1" + "}" * 100_000),
    "unclosed lists": _with("[" * 100_000),
    "two million lists": _with("[" + "[]," * 2_000_000 + "1]"),
}


@KINDS.add("s02", _TEXTS)
def index_text(victim: Victim, value: Damage) -> Said:
    victim.index.write_bytes(value(victim, victim.index.read_text()))
    return (str(victim.index),)


@KINDS.add("s02", _TEXTS)
def config_text(victim: Victim, value: Damage) -> Said:
    victim.config.write_bytes(value(victim, victim.config.read_text()))
    return (str(victim.config),)


@KINDS.add(
    "s02", {"config": (CONFIG, 2**24), "index": (INDEX, 10**8), "README": ("README.md", 2**24)}
)
def huge_text(victim: Victim, value: tuple[str, int]) -> Said:
    name, limit = value
    os.truncate(victim.folder / name, limit + 1)
    return (str(victim.folder / name), str(limit))


# ---------------------------------------------------------------- S07: index and shards

_NAMES: dict[str, Callable[[Victim], Any]] = {
    "above": lambda v: f"../{v.folder.name}/{v.shard.name}",
    "far above": lambda v: f"{'../' * 40}etc/x.safetensors",
    "absolute": lambda v: str(v.shard),
    "here": lambda v: f"./{v.shard.name}",
    "below": lambda v: f"parts/{v.shard.name}",
    "slash behind": lambda v: v.shard.name + "/",
    "two slashes": lambda v: f"//{v.shard.name}",
    "backslash": lambda v: f"parts\\{v.shard.name}",
    "drive": lambda v: f"C:{v.shard.name}",
    "url": lambda v: f"https://example.org/{v.shard.name}",
    "nul behind": lambda v: v.shard.name + "\0",
    "nul within": lambda v: v.shard.stem + "\0.safetensors",
    "newline": lambda v: v.shard.stem + "\n.safetensors",
    "escape": lambda v: v.shard.stem + "\x1b[2J.safetensors",
    "right to left": lambda v: v.shard.stem + "\u202e.safetensors",
    "surrogate": lambda v: v.shard.stem + "\ud800.safetensors",
    "pickle": lambda v: "pytorch_model.bin",
    "config": lambda v: CONFIG,
    "upper case": lambda v: v.shard.name.upper(),
    "blank": lambda v: v.shard.name + " ",
    **{ascii(value): lambda v, value=value: value for value in ("", ".", "..", None, 1, True)},
    "list": lambda v: [v.shard.name],
    "object": lambda v: {"file": v.shard.name},
}


@KINDS.add("s07", _NAMES)
def shard_name_in_the_index(victim: Victim, value: Callable[[Victim], Any]) -> Said:
    name = victim.tensor()
    edit_json(victim.index, lambda index: index["weight_map"].update({name: value(victim)}))
    return (str(victim.index), repr(name), "must be the name of a .safetensors file")


@KINDS.add("s07", named([None, [], {}, 1, "weights", [{}], ["model.norm.weight"], "absent"]))
def weight_map(victim: Victim, value: object) -> Said:
    document = {} if value == "absent" else {"weight_map": value}
    victim.index.write_text(json.dumps({"metadata": {"total_size": 1}} | document))
    return (str(victim.index), "weight_map must be")


_IN_THE_INDEX = ("lost", "added", "renamed", "in another shard", "in no shard", "shard lost")


@KINDS.add("s07", _IN_THE_INDEX, times=3)
def tensors_in_the_index(victim: Victim, value: str) -> Said:
    name, other = victim.tensor(), victim.choice(p for p in victim.shards if p != victim.shard)
    said: Said = (str(victim.index), repr(name))

    def change(index: dict[str, Any]) -> None:
        listed = index["weight_map"]
        if value in ("lost", "renamed"):
            del listed[name]
        if value in ("added", "renamed"):
            listed[name + "_2"] = victim.shard.name
        if value == "in another shard":
            listed[name] = other.name
        if value == "in no shard":
            listed[name] = f"model-{victim.int(0, 10**5):05d}-of-00003.safetensors"
        if value == "shard lost":
            index["weight_map"] = {n: s for n, s in listed.items() if s != victim.shard.name}

    edit_json(victim.index, change)
    if value == "added":
        said = (str(victim.index), repr(name + "_2"))
    elif value == "in no shard":
        wanted = json.loads(victim.index.read_text())["weight_map"][name]
        said = (str(victim.folder), repr(wanted), "missing")
    elif value == "shard lost":
        said = (str(victim.folder), repr(victim.shard.name), "not in")
    return said


@KINDS.add("s07", ["same", "stranger", "empty", "hidden"])
def surplus_shard(victim: Victim, value: str) -> Said:
    surplus = victim.folder / f"{'.' * (value == 'hidden')}more-{victim.int(0, 99)}.safetensors"
    if value in ("same", "hidden"):
        shutil.copy(victim.shard, surplus)
    else:
        write_tensors(surplus, {} if value == "empty" else {"w": ("U8", [3], b"abc")})
    return (str(victim.folder), repr(surplus.name), f"not in {INDEX}")


@KINDS.add(
    "s07", ["lost", "all lost", "renamed", "exchanged", "index lost", "other release"], times=2
)
def shards(victim: Victim, value: str) -> Said:
    other = victim.shards[victim.shards.index(victim.shard) - 1]
    if value == "exchanged":
        content = victim.shard.read_bytes()
        victim.shard.write_bytes(other.read_bytes())
        other.write_bytes(content)
        moved = min([*read_tensors(victim.shard), *read_tensors(other)])
        return (str(victim.index), repr(moved), "in another shard")
    if value == "index lost":
        victim.index.unlink()
        other.unlink()
        return (str(victim.folder), f"no {INDEX}", repr(victim.shard.name))
    if value == "other release":
        strangers = victim.folder.parent / "other release"
        wanted = next(c for c in CONFIGS if c != victim.checkpoint)
        write_sound(strangers, wanted, shards=len(victim.shards))
        shutil.copy(strangers / victim.shard.name, victim.shard)
        shutil.rmtree(strangers)
        return (str(victim.folder), "tensor")
    for path in victim.shards if value == "all lost" else [victim.shard]:
        if value == "renamed":
            path.rename(path.with_stem(path.stem + "-copy"))
        else:
            path.unlink()
    return (str(victim.folder), repr(victim.shard.name), "missing")


@KINDS.add("s07", ["copied", "copied and listed", "moved"], times=4)
def tensor_in_another_shard(victim: Victim, value: str) -> Said:
    other = victim.choice(path for path in victim.shards if path != victim.shard)
    name = victim.tensor()
    tensors = read_tensors(victim.shard)
    write_tensors(other, {**read_tensors(other), name: tensors.pop(name)})
    if value == "moved":
        write_tensors(victim.shard, tensors)
        return (str(victim.index), repr(name), "in another shard")
    if value == "copied and listed":
        edit_json(victim.index, lambda index: index["weight_map"].update({name: other.name}))
    return (str(victim.folder), repr(name), other.name, victim.shard.name)


def _link_out(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def _chain_out(path: Path) -> None:
    (path.parent / "parts").mkdir()
    _link_out(path)
    path.rename(path.parent / "parts" / "first")
    path.symlink_to("parts/first")


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "link out": _link_out,
    "chain of links out": _chain_out,
    "broken link": _replaced(lambda p: p.symlink_to("absent")),
    "link to itself": _replaced(lambda p: p.symlink_to(p.name)),
    "link to the folder": _replaced(lambda p: p.symlink_to(".")),
    "link above": _replaced(lambda p: p.symlink_to("..")),
    "link to /dev/zero": _replaced(lambda p: p.symlink_to("/dev/zero")),
    "link to a process": _replaced(lambda p: p.symlink_to("/proc/self/mem")),
    "pipe": _replaced(os.mkfifo),
    "folder": _replaced(Path.mkdir),
    "lfs pointer": lambda p: p.write_text(POINTER),
    "empty": lambda p: p.write_bytes(b""),
}
_FILES = {"config": CONFIG, "index": INDEX, "shard": "shard", "README": "README.md"}


@KINDS.add(
    "s07",
    {
        f"{file}: {how}": (name, make)
        for file, name in _FILES.items()
        for how, make in _SPECIAL.items()
        if (file, how) != ("README", "empty")
    },
)
def special_file(victim: Victim, value: tuple[str, Callable[[Path], object]]) -> Said:
    name, make = value
    path = victim.shard if name == "shard" else victim.folder / name
    make(path)
    return (str(path),)
