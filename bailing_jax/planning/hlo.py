"""Reads off a compiled program's text: its collectives (kind, bytes, and over which devices), and
whether it lays out the state anew.

A group of devices says which axis of the mesh a collective runs over: devices are numbered in the
order of the mesh, `tensor` the fastest, then `expert`, then `data`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

from bailing_jax.mesh import MeshShape
from bailing_jax.planning.compiled_step import Collective

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# The jitted function that every layer is (bailing_jax.model), in the names of operations.
_LAYER = "jit(_run_layer)"
# `input_output_alias={ {2}: (118, {}, may-alias), ... }`: arguments that are updated in place. More
# than 2,000 arguments are one tuple: `{2}: (0, {2021}, may-alias)`.
_ALIASES = re.compile(r"input_output_alias=\{(.*?) \}, ")
_ALIASED = re.compile(r": \((\d+), \{(\d*)\}")
_ARGUMENTS = re.compile(r"entry_computation_layout=\{\((.*?)\)->")
_COPY = re.compile(r" = (?P<type>[^ ]+) (?:copy|transpose)\(")
# `%name = TYPE kind(`, `kind-start(`: an asynchronous one; its `-done` is not counted again.
_CALL = re.compile(rf" = (?P<type>\(?[^=]*?\)?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def collectives(text: str, mesh: MeshShape) -> tuple[Collective, ...]:
    """Those of a program in HLO text, alike ones together, in the order of KINDS."""
    found: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for line in text.splitlines():
        call = _CALL.search(line)
        if call is None:
            continue
        sizes = list(_sizes(call["type"]))
        if call["start"] and call["kind"] != "all-reduce" and len(sizes) > 1:
            # An asynchronous one names its operands before its results.
            sizes = sizes[len(sizes) // 2 :]
        key = (call["kind"], _axis(_first_group(line), mesh), _LAYER in line)
        found[key].append(sum(sizes))
    return tuple(
        Collective(kind, over, is_in_layer, len(sizes), sum(sizes))
        for kind in KINDS
        for (each, over, is_in_layer), sizes in sorted(found.items())
        if each == kind
    )


def state_copies(text: str) -> int:
    """How often a program in HLO text copies a whole argument that it updates in place.

    The compiler may keep a pool's buffer and yet lay it out anew before and after each update: such
    copies are found by their dtype and size. Each is counted once, however often a loop runs it.
    """
    aliases, arguments = _ALIASES.search(text), _ARGUMENTS.search(text)
    if aliases is None or arguments is None:
        return 0
    arrays = list(_arrays(arguments[1]))
    state = {arrays[int(inside or number)] for number, inside in _ALIASED.findall(aliases[1])}
    return sum(not state.isdisjoint(_arrays(copy["type"])) for copy in _COPY.finditer(text))


def _sizes(text: str) -> Iterator[int]:
    """Bytes of every array in a type."""
    return (size for _, size in _arrays(text))


def _arrays(text: str) -> Iterator[tuple[str, int]]:
    """Dtype and bytes of every array in a type."""
    for dtype, shape in _ARRAY.findall(text):
        digits = _BITS.search(dtype)
        bits = 8 if digits is None else int(digits[0])  # pred has none and takes a byte
        yield dtype, math.prod(int(dim) for dim in shape.split(",") if dim) * bits // 8


def _first_group(line: str) -> tuple[int, ...]:
    """The devices of one group; () where the text names none: all of them."""
    listed = _LISTED.search(line)
    if listed is not None:
        return tuple(int(number) for number in listed[1].split(","))
    counted = _COUNTED.search(line)
    if counted is None:
        return ()
    size, dims = int(counted[1]), [int(dim) for dim in counted[2].split(",")]
    order = [int(axis) for axis in counted[3].split(",")] if counted[3] else range(len(dims))
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    # Device numbers in row-major order of `dims`, read off along its axes in another order.
    places = itertools.product(*(range(dims[axis]) for axis in order))
    numbers = (
        sum(place * strides[axis] for place, axis in zip(at, order, strict=True)) for at in places
    )
    return tuple(itertools.islice(numbers, size))


def _axis(group: tuple[int, ...], mesh: MeshShape) -> str:
    """The axes of the mesh along which a group's devices differ."""
    if not group:
        return "all"
    sizes = {"tensor": mesh.tensor, "expert": mesh.expert, "data": mesh.data}
    names, stride = [], 1
    for name, size in sizes.items():
        if len({number // stride % size for number in group}) > 1:
            names.append(name)
        stride *= size
    return " and ".join(reversed(names)) or "none"
