"""What the compiler made of one step: plain numbers, for reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """All collectives of a kind in a program, each counted once however often a loop runs it.

    Attributes:
        kind: XLA's name: all-reduce, all-gather, reduce-scatter, all-to-all, ...
        count: how many.
        bytes: of their results, on one device.
    """

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class CompiledStep:
    """A step compiled for a topology; bytes are a device's.

    Attributes:
        name: "decode" or "prefill".
        rows_a_shard: token rows a shard.
        argument_bytes: weights, state and the layout, as the compiler lays them out.
        alias_bytes: of arguments that are updated in place.
        temporary_bytes: allocated while it runs.
        code_bytes: of the program.
        collectives: by kind.
        trace_s: seconds to trace and lower.
        compile_s: seconds to compile.
    """

    name: str
    rows_a_shard: int
    argument_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    collectives: tuple[Collective, ...]
    trace_s: float
    compile_s: float
