"""Reads the collectives off a compiled program's text."""

from __future__ import annotations

import re
from collections.abc import Iterator

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
# `%name = TYPE kind(`, `kind-start(`: an asynchronous one; its `-done` is not counted again.
_CALL = re.compile(rf" = (?P<type>\(?[^=]*?\)?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


def collectives(text: str) -> tuple[Collective, ...]:
    """Those of a program in HLO text, by kind, in the order of KINDS."""
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        call = _CALL.search(line)
        if call is not None:
            sizes = list(_sizes(call["type"]))
            if call["start"] and len(sizes) > 1:
                # An asynchronous one names its operands beside its results.
                sizes = sizes[len(sizes) // 2 :] if call["kind"] != "all-reduce" else sizes
            found.setdefault(call["kind"], []).append(sum(sizes))
    return tuple(
        Collective(kind, len(found[kind]), sum(found[kind])) for kind in KINDS if kind in found
    )


def _sizes(text: str) -> Iterator[int]:
    """Bytes of every array in a type."""
    for dtype, shape in _ARRAY.findall(text):
        bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])  # pyright: ignore
        count = 1
        for dim in shape.split(","):
            count *= int(dim or 1)
        yield count * bits // 8
