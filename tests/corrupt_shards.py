"""Damage to one shard, rows S01 to S06: its header's text, its entries, its size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

from corruptions import (
    Entry,
    Kinds,
    Said,
    Victim,
    by_offset,
    named,
    read_shard,
    read_tensors,
    write_tensors,
)
from safetensors_bytes import pack

KINDS = Kinds()


# ---------------------------------------------------------------- S01, S02: the header as text

_FIXED_LENGTHS = (
    0, 1, 2, 7, 8, 64, 100_000_001, 2**31 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
_LENGTHS = ("one less", "one more", "all of the file", "one beyond the file", "twice the file")


@KINDS.add("s01", [*_FIXED_LENGTHS, *_LENGTHS])
def header_length(victim: Victim, value: int | str) -> Said:
    content = victim.shard.read_bytes()
    true, room = int.from_bytes(content[:8], "little"), len(content) - 8
    lengths = dict(zip(_LENGTHS, (true - 1, true + 1, room, room + 1, 2 * room), strict=True))
    length = value if isinstance(value, int) else lengths[value]
    victim.shard.write_bytes(length.to_bytes(8, "little") + content[8:])
    return (str(victim.shard),)


_NOT_TEXT = (
    b"\xff", b"\x80", b"\xc0\x80", b"\xe9", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe4\xb8",
    b"\0", b"\n", b"\x1f", b"\\x", b"\\u12 ", b'"',
)  # fmt: skip


@KINDS.add("s02", _NOT_TEXT, times=2)
def bytes_in_a_name(victim: Victim, value: bytes) -> Said:
    header, data = read_shard(victim.shard)
    name = victim.tensor().encode()
    at = victim.int(1, len(name))
    raw = json.dumps(header).encode().replace(name, name[:at] + value + name[at:], 1)
    victim.shard.write_bytes(pack(raw, data))
    return (str(victim.shard),)


def _nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "1" + closing * depth


NOT_JSON = {
    **named(("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "[1,]", "{,}", "'x'", "01", "+1")),
    **named((".5", "1.", "0x10", "nul", "True", "undefined", '"\x01"', '"\\u12"', "1 // one")),
    "5000 digits": "9" * 5000,
    "201 lists": _nested("[", "]", 201),
    "100000 lists": _nested("[", "]", 100_000),
    "100000 objects": _nested('{"a":', "}", 100_000),
    "unclosed lists": "[" * 100_000,
    "unclosed string": '"',
    "two million lists": "[" + "[]," * 2_000_000 + "1]",
}


@KINDS.add("s02", NOT_JSON)
def not_json_in_the_header(victim: Victim, value: str) -> Said:
    header, data = read_shard(victim.shard)
    header[victim.tensor()][victim.choice(("dtype", "shape", "data_offsets"))] = "@"
    victim.shard.write_bytes(pack(json.dumps(header).replace('"@"', value).encode(), data))
    return (str(victim.shard),)


@KINDS.add(
    "s02", ["same", "other", "escaped", "dtype", "shape", "data_offsets", "metadata"], times=2
)
def twice_in_the_header(victim: Victim, value: str) -> Said:
    header, data = read_shard(victim.shard)
    name = victim.tensor()
    text, entry = json.dumps(header), json.dumps(header[name])
    if value == "metadata":
        name = "__metadata__"
        text = '{"__metadata__": {"a": "b"}, ' + text[1:]
    elif value in header[name]:
        first = f'"{value}": {json.dumps(header[name][value])}'
        text, name = text.replace(entry, f"{{{first}, {entry[1:]}", 1), value
    else:
        other = entry if value == "same" else json.dumps(header[victim.tensor()])
        alike = f"\\u{ord(name[0]):04x}{name[1:]}" if value == "escaped" else name
        text = f'{{"{alike}": {other}, ' + text[1:]
    victim.shard.write_bytes(pack(text.encode(), data))
    return (str(victim.shard), f"{name!r} appears twice")


# ---------------------------------------------------------------- S02 - S05: a tensor's entry

Edit = Callable[[Entry, int, int], object]
_OFFSETS: dict[str, Callable[[int, int], Any]] = {
    "null": lambda a, b: None,
    "text": lambda a, b: f"{a}, {b}",
    "object": lambda a, b: {"0": a, "1": b},
    "none": lambda a, b: [],
    "one": lambda a, b: [b],
    "three": lambda a, b: [a, b, b],
    "bool": lambda a, b: [False, b],
    "bools": lambda a, b: [False, True],
    "floats": lambda a, b: [float(a), float(b)],
    "texts": lambda a, b: [str(a), str(b)],
    "nulls": lambda a, b: [None, None],
    "nested": lambda a, b: [[a, b]],
    "negative": lambda a, b: [-b - 1, -a - 1],
    "minus one": lambda a, b: [-1, b],
    "end 2**63": lambda a, b: [a, 2**63],
    "end 2**64-1": lambda a, b: [a, 2**64 - 1],
    "end 10**40": lambda a, b: [a, 10**40],
    "wrapped": lambda a, b: [2**64 - a - 1, b],
    "swapped": lambda a, b: [b, a],
    "empty": lambda a, b: [a, a],
    "one short": lambda a, b: [a, b - 1],
    "one long": lambda a, b: [a, b + 1],
}
_SHAPES: dict[str, Any] = {
    **named((None, 4, "4", {}, [-4], [-2, -2], [True, 4], [4.0], ["4"], [[4]], [None])),
    **named(([2**63], [10**40], [2**62 + 1, 4], [2**32, 2**32], [0, 2**62, 2**62], [0], [2**40])),
    "nine dimensions": [1] * 9,
}
_ENTRIES: dict[str, Callable[[Entry], Any]] = {
    "list": lambda entry: list(entry.values()),
    "null": lambda entry: None,
    "text": lambda entry: json.dumps(entry),
    "empty": lambda entry: {},
    "no dtype": lambda entry: {k: v for k, v in entry.items() if k != "dtype"},
    "no shape": lambda entry: {k: v for k, v in entry.items() if k != "shape"},
    "no data_offsets": lambda entry: {k: v for k, v in entry.items() if k != "data_offsets"},
    "strides": lambda entry: entry | {"strides": [1]},
    "upper case": lambda entry: {k.upper(): v for k, v in entry.items()},
}


def _edit_entry(victim: Victim, change: Callable[[Entry], Any]) -> Said:
    header, data = read_shard(victim.shard)
    name = victim.tensor()
    header[name] = change(header[name])
    victim.shard.write_bytes(pack(header, data))
    return (str(victim.shard), repr(name))


@KINDS.add("s05", _OFFSETS)
def offsets(victim: Victim, value: Callable[[int, int], Any]) -> Said:
    return _edit_entry(victim, lambda e: e | {"data_offsets": value(*e["data_offsets"])})


@KINDS.add("s05", ["start", "shape"], times=3)
def bool_for_a_number(victim: Victim, value: str) -> Said:
    """In Python False is 0 and True is 1; in JSON they are not."""
    header, data = read_shard(victim.shard)
    name = by_offset(header)[0] if value == "start" else victim.tensor()
    entry = header[name]
    if value == "start":
        assert entry["data_offsets"][0] == 0
        entry["data_offsets"][0] = False
    else:
        entry["shape"].insert(0, True)
    victim.shard.write_bytes(pack(header, data))
    return (str(victim.shard), repr(name), "must be a list of integers")


@KINDS.add("s04", _SHAPES)
def shape_values(victim: Victim, value: object) -> Said:
    return _edit_entry(victim, lambda e: e | {"shape": value})


@KINDS.add("s02", _ENTRIES)
def entry_fields(victim: Victim, value: Callable[[Entry], Any]) -> Said:
    return _edit_entry(victim, value)


_STRANGE_DTYPES = (
    "F4", "F6_E2M3", "F6_E3M2", "I4", "U4", "C64", "BF8", "bf16", "BF16 ", "bfloat16",
    "torch.bfloat16", "", "F128", "NaN", "x" * 100_000, None, 16, True, ["BF16"], {"BF16": 1},
)  # fmt: skip


@KINDS.add("s03", _STRANGE_DTYPES)
def unknown_dtype(victim: Victim, value: object) -> Said:
    return (*_edit_entry(victim, lambda e: e | {"dtype": value}), "is not read")


@KINDS.add("s03", ["F32", "I32", "I64", "U64", "F64", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def dtype_of_another_size(victim: Victim, value: str) -> Said:
    header, data = read_shard(victim.shard)
    name = victim.tensor(lambda _, entry: entry["dtype"] == "BF16")
    header[name]["dtype"] = value
    victim.shard.write_bytes(pack(header, data))
    return (str(victim.shard), repr(name), "span")


_SIZES = {
    "I16": 2, "U16": 2, "I32": 4, "I64": 8, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip


@KINDS.add("s03", list(_SIZES))
def dtype_of_no_model(victim: Victim, value: str) -> Said:
    """As in quantised releases: the file is sound, the dtype is none a model is read in."""
    tensors = read_tensors(victim.shard)
    name = victim.tensor()
    shape = tensors[name][1]
    tensors[name] = (value, shape, bytes(math.prod(shape) * _SIZES[value]))
    write_tensors(victim.shard, tensors)
    return (str(victim.folder), name, "readable")


Shape = list[int]
_SAME_SIZE: dict[str, Callable[[Shape], Shape]] = {
    "transposed": lambda shape: shape[::-1],
    "flat": lambda shape: [math.prod(shape)],
    "in front": lambda shape: [1, *shape],
    "behind": lambda shape: [*shape, 1],
    "between": lambda shape: [shape[0], 1, *shape[1:]],
    "eight dimensions": lambda shape: [1] * (8 - len(shape)) + shape,
    "row": lambda shape: [1, math.prod(shape)],
}
_OTHER_SIZE: dict[str, Callable[[Shape], Shape]] = {
    "no rows": lambda shape: [0, *shape[1:]],
    "no columns": lambda shape: [*shape[:-1], 0],
    "scalar": lambda shape: [],
    "a row less": lambda shape: [shape[0] - 1, *shape[1:]],
    "a row more": lambda shape: [shape[0] + 1, *shape[1:]],
    "a column more": lambda shape: [*shape[:-1], shape[-1] + 1],
    "doubled": lambda shape: [2, *shape],
}


@KINDS.add("s04", _SAME_SIZE, times=3)
def shape_of_equal_size(victim: Victim, value: Callable[[Shape], Shape]) -> Said:
    header, data = read_shard(victim.shard)
    name = victim.tensor(lambda _, entry: len(entry["shape"]) == 2)
    shape = value(header[name]["shape"])
    assert shape != header[name]["shape"]
    header[name]["shape"] = shape
    victim.shard.write_bytes(pack(header, data))
    return (str(victim.folder), name, f"wrong shape (got {shape}")


@KINDS.add("s04", _OTHER_SIZE)
def shape_the_data_does_not_have(victim: Victim, value: Callable[[Shape], Shape]) -> Said:
    return (*_edit_entry(victim, lambda e: e | {"shape": value(e["shape"])}), "span")


@KINDS.add("s04", _OTHER_SIZE, times=2)
def sound_file_of_another_shape(victim: Victim, value: Callable[[Shape], Shape]) -> Said:
    tensors = read_tensors(victim.shard)
    name = victim.tensor()
    dtype, shape, content = tensors[name]
    itemsize = len(content) // math.prod(shape)
    shape = value(shape)
    tensors[name] = (dtype, shape, (content * 2)[: math.prod(shape) * itemsize])
    write_tensors(victim.shard, tensors)
    return (str(victim.folder), name, f"wrong shape (got {shape}")


# ---------------------------------------------------------------- S05: how tensors tile the data

Header = dict[str, Any]


def _shift(header: Header, names: list[str], step: int) -> None:
    for name in names:
        header[name]["data_offsets"] = [at + step for at in header[name]["data_offsets"]]


def _early_tensor(victim: Victim, header: Header) -> tuple[str, int, int]:
    """A tensor that is not the first one, and its place."""
    name = victim.choice(by_offset(header)[1:])
    return (name, *header[name]["data_offsets"])


@KINDS.add("s05", ["one", "some"], times=6)
def tensor_moved_right(victim: Victim, value: str) -> Said:
    header, data = read_shard(victim.shard)
    name, start, end = _early_tensor(victim, header)
    _shift(header, [name], 1 if value == "one" else victim.int(2, end - start))
    victim.shard.write_bytes(pack(header, data))
    return (str(victim.shard), repr(name), "gap")


@KINDS.add("s05", ["one", "some"], times=6)
def tensor_moved_left(victim: Victim, value: str) -> Said:
    header, data = read_shard(victim.shard)
    name, start, _ = _early_tensor(victim, header)
    _shift(header, [name], -1 if value == "one" else -victim.int(2, start + 1))
    victim.shard.write_bytes(pack(header, data))
    return (str(victim.shard), repr(name), "overlaps")


@KINDS.add("s05", ["before all", "between"], times=6)
def gap_with_bytes(victim: Victim, value: str) -> Said:
    """Room for something hidden: the header says of no tensor that these bytes are its own."""
    header, data = read_shard(victim.shard)
    order = by_offset(header)
    name = order[0] if value == "before all" else _early_tensor(victim, header)[0]
    at = header[name]["data_offsets"][0]
    hidden = victim.rng.bytes(victim.int(1, 100))
    _shift(header, order[order.index(name) :], len(hidden))
    victim.shard.write_bytes(pack(header, data[:at] + hidden + data[at:]))
    return (str(victim.shard), repr(name), f"({len(hidden)} bytes)")


@KINDS.add("s05", ["another's range", "exchanged", "forgotten", "beyond the end"], times=4)
def ranges(victim: Victim, value: str) -> Said:
    header, data = read_shard(victim.shard)
    order = by_offset(header)
    size = {n: b - a for n in order for a, b in [header[n]["data_offsets"]]}
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    if value == "another's range":
        one, other = victim.choice(p for p in pairs if size[p[0]] == size[p[1]])
        header[other]["data_offsets"] = header[one]["data_offsets"]
        said: Said = (repr(one), repr(other), "overlaps")
    elif value == "exchanged":
        one, other = victim.choice(p for p in pairs if size[p[0]] != size[p[1]])
        first, second = header[one]["data_offsets"], header[other]["data_offsets"]
        header[one]["data_offsets"], header[other]["data_offsets"] = second, first
        said = (repr(min(one, other, key=list(header).index)), "span")
    elif value == "forgotten":
        name = victim.choice(order[:-1])
        del header[name]
        said = (repr(order[order.index(name) + 1]), f"({size[name]} bytes)")
    else:
        _shift(header, order[-1:], victim.int(len(data), 2**40))
        said = (repr(order[-1]), "gap")
    victim.shard.write_bytes(pack(header, data))
    return (str(victim.shard), *said)


# ---------------------------------------------------------------- S06: the file's size


@KINDS.add("s06", range(24))
def truncated_in_the_data(victim: Victim, _value: int) -> Said:
    header, data = read_shard(victim.shard)
    size = victim.shard.stat().st_size
    os.truncate(victim.shard, size - victim.int(1, len(data) + 1))
    return (str(victim.shard), "is truncated", repr(by_offset(header)[-1]))


@KINDS.add("s06", range(12))
def truncated_in_the_header(victim: Victim, _value: int) -> Said:
    data = read_shard(victim.shard)[1]
    os.truncate(victim.shard, victim.int(0, victim.shard.stat().st_size - len(data)))
    return (str(victim.shard),)


@KINDS.add("s06", [0, 7, 8, 9])
def truncated_to(victim: Victim, value: int) -> Said:
    os.truncate(victim.shard, value)
    return (str(victim.shard),)


@KINDS.add("s06", [1, 7, 8, 4096, "the file again", "8 GB of nothing", "some"], times=2)
def extended(victim: Victim, value: int | str) -> Said:
    content = victim.shard.read_bytes()
    if value == "8 GB of nothing":
        os.truncate(victim.shard, 2**33)
        return (str(victim.shard), f"{2**33 - len(content)} bytes after")
    sizes = {"the file again": len(content), "some": victim.int(9, 4096)}
    count = value if isinstance(value, int) else sizes[value]
    more = content if value == "the file again" else victim.rng.bytes(count)
    victim.shard.write_bytes(content + more)
    return (str(victim.shard), f"{count} bytes after")


@KINDS.add("s06", ["inserted", "lost", "block lost", "block twice", "block first"], times=3)
def bytes_in_the_data(victim: Victim, value: str) -> Said:
    """What a broken download does in the middle of a file."""
    content = victim.shard.read_bytes()
    at = victim.int(len(content) - len(read_shard(victim.shard)[1]), len(content) - 512)
    changed = {
        "inserted": content[:at] + b"\0" + content[at:],
        "lost": content[:at] + content[at + 1 :],
        "block lost": content[:at] + content[at + 512 :],
        "block twice": content[: at + 512] + content[at:],
        "block first": content[at : at + 512] + content,
    }
    victim.shard.write_bytes(changed[value])
    return (str(victim.shard),)
