"""What the compiler made of one step: plain numbers, for reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """All collectives of a kind in a program, each counted once however often a loop runs it.

    Attributes:
        kind: XLA's name: all-reduce, all-gather, reduce-scatter, all-to-all, ...
        over: the axes of the mesh along which they go: tensor, expert, ...
        is_in_layer: whether they belong to a layer, as XLA's names of operations tell.
        count: how many.
        bytes: of their results, on one device.
    """

    kind: str
    over: str
    is_in_layer: bool
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
        state_copies: of whole pools that are updated in place all the same; each counted once
            however often a loop runs it.
        trace_s: seconds to trace and lower.
        compile_s: seconds to compile.
        compile_cpu_s: the processor time of it, which other programs change less.
    """

    name: str
    rows_a_shard: int
    argument_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    collectives: tuple[Collective, ...]
    state_copies: int
    trace_s: float
    compile_s: float
    compile_cpu_s: float

    def beside_the_exchange(self, num_layers: int) -> float:
        """Collectives a layer, without those over `expert`: the exchange of the experts' rows."""
        inside = (x.count for x in self.collectives if x.is_in_layer and x.over != "expert")
        return sum(inside) / num_layers
