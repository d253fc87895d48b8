"""How much memory a traced program needs at a time beyond its arguments, without compiling it.

Reads the trace as XLA would lay it out. Elementwise work is fused into its reader. A scatter works
in place unless somebody else still reads the old values, for whom XLA copies them. A loop's carry
takes over the buffers it starts from, or copies of what is constant. On a CPU, jaxlib 0.10 widens
the weights that a loop takes slice by slice as a whole before it. Buffers live from where they
are made to their last reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# What XLA computes inside its reader and never writes to memory...
_FUSED = frozenset({
    "abs", "add", "and", "bitcast_convert_type", "broadcast_in_dim", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "div", "eq", "exp", "expm1", "floor", "ge", "gt",
    "integer_pow", "iota", "is_finite", "le", "le_to", "log", "log1p", "logistic", "lt", "lt_to",
    "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pow", "rem", "reshape", "round", "rsqrt",
    "select_n", "sign", "sin", "slice", "split", "sqrt", "square", "squeeze", "stop_gradient",
    "sub", "tanh", "transpose", "xor",
})  # fmt: skip
# ... and what reads its operands that way. Everything else wants them in memory.
_FUSES = _FUSED | {
    "argmax", "concatenate", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
}  # fmt: skip
_SAME_BUFFER = {"reshape", "squeeze"}
_SLICED = _SAME_BUFFER | {"dynamic_slice", "gather", "slice"}
_UPDATES = {"scatter", "scatter-add", "dynamic_update_slice"}
_LOOPS = {"while", "scan"}
# Threefry mixes two counters into a number, and they are joined only where it is read.
_RANDOM, _COUNTERS = "random_bits", 2
_CALLS = _LOOPS | {
    "call", "checkpoint", "closed_call", "cond", "core_call", "custom_jvp_call", "custom_vjp_call",
    "jit", "pjit", "remat",
}  # fmt: skip
# The first release seen to widen slices only; 0.10.2 does not.
_WIDENS_SLICES = (0, 12)
# A call of at least so many operations is a layer: measured once for all layers of its kind.
_LAYER = 100


def peak_bytes(jaxpr: Any, platform: str) -> int:
    """The most bytes a program holds at a time beyond its arguments and what it writes into them.

    Args:
        jaxpr: of the program, as `jax.make_jaxpr(...)(...).jaxpr`; arguments that a scatter
            updates are taken to be donated.
        platform: "cpu", "gpu" or "tpu".
    """
    return _Trace(platform).measure(jaxpr, has_layers=True).peak


class _Operation(NamedTuple):
    """One operation on numbered values, None for constants.

    `sizes` are bytes an output, `inside` what the operation needs while it runs, `ahead` what it
    needs that can be made at any time before, and `in_place` the operand whose buffer an output
    takes over (None: a new one), for each output.
    """

    name: str
    operands: list[int | None]
    outputs: list[int]
    sizes: list[int]
    inside: int
    ahead: int
    in_place: Sequence[int | None]


class _Measured(NamedTuple):
    """The most bytes in use at a time, inputs excluded; for each output, the input it reuses."""

    peak: int
    in_place: list[int | None]


class _Trace:
    """Reads jaxprs into operations and measures them."""

    def __init__(self, platform: str) -> None:
        self._platform = platform
        self._count = 0
        self._layers: dict[Any, _Measured] = {}

    def measure(self, jaxpr: Any, *, has_layers: bool = False) -> _Measured:
        """Measure a program, a layer or the body of a loop; layers are measured once a kind."""
        values: dict[Any, int | None] = {v: self._new() for v in jaxpr.constvars + jaxpr.invars}
        inputs = self._count
        operations = list(self._operations(jaxpr, values, has_layers=has_layers))
        results = [_value(v, values) for v in jaxpr.outvars]
        return _Layout(operations, inputs, results).measured([values[v] for v in jaxpr.invars])

    def _new(self) -> int:
        self._count += 1
        return self._count

    def _operations(
        self, jaxpr: Any, values: dict[Any, int | None], *, has_layers: bool = False
    ) -> Iterator[_Operation]:
        """The operations of a jaxpr, those of what it calls among them."""
        for equation in jaxpr.eqns:
            operands = [_value(v, values) for v in equation.invars]
            called = self._called(equation)
            if called is None or equation.primitive.name in _LOOPS:
                yield self._operation(equation, called, operands, values)
            elif has_layers and len(called.eqns) >= _LAYER:
                measured = self._layers.get(called) or self.measure(called)
                self._layers[called] = measured
                taken = [None if i is None else operands[i] for i in measured.in_place]
                yield self._define(equation, operands, values, taken, measured.peak)
            else:
                inner = dict(zip(called.invars, operands[-len(called.invars) :], strict=True))
                inner |= dict.fromkeys(called.constvars)
                yield from self._operations(called, inner)
                for variable, result in zip(equation.outvars, called.outvars, strict=True):
                    values[variable] = _value(result, inner)

    def _called(self, equation: Any) -> Any | None:
        """The jaxpr an equation runs, if it runs one: of a loop its body.

        A kernel brings a jaxpr too, of what happens inside the chip: not of interest here.
        """
        params = equation.params
        if equation.primitive.name not in _CALLS:
            return None
        if platforms := params.get("branches_platforms"):
            here = (p is None or self._platform in p for p in platforms)
            found = params["branches"][list(here).index(True)]
        elif "branches" in params:
            # Room is made for whichever is taken.
            found = max(params["branches"], key=lambda branch: self.measure(branch.jaxpr).peak)
        else:
            names = ("body_jaxpr", "jaxpr", "call_jaxpr")
            found = next((params[name] for name in names if name in params), None)
        return getattr(found, "jaxpr", found)

    def _operation(
        self,
        equation: Any,
        body: Any | None,
        operands: list[int | None],
        values: dict[Any, int | None],
    ) -> _Operation:
        """A loop, or an operation without inner ones."""
        name, outputs = equation.primitive.name, equation.outvars
        if body is None:
            is_first = name in _SAME_BUFFER or name in _UPDATES
            taken = operands[:1] if is_first else [None] * len(outputs)
            return self._define(equation, operands, values, taken)
        # What a loop carries has the same shape inside and outside; what a scan reads or writes
        # row by row is one dimension smaller inside.
        carried = [v.aval.shape == o.aval.shape for v, o in zip(body.outvars, outputs, strict=True)]
        arguments = operands[-len(body.invars) :]  # a while's condition may bring its own before
        whole = equation.invars[-len(body.invars) :]
        same = [v.aval.shape == o.aval.shape for v, o in zip(body.invars, whole, strict=True)]
        num_fixed = sum(same) - sum(carried)
        start = iter(arguments[num_fixed:])
        taken = [next(start) if is_carried else None for is_carried in carried]
        inside, ahead = self.measure(body).peak, self._widened(body, num_fixed)
        return self._define(equation, operands, values, taken, inside, ahead)

    def _define(
        self,
        equation: Any,
        operands: list[int | None],
        values: dict[Any, int | None],
        in_place: Sequence[int | None],
        inside: int = 0,
        ahead: int = 0,
    ) -> _Operation:
        outputs = [self._new() for _ in equation.outvars]
        values.update(zip(equation.outvars, outputs, strict=True))
        sizes = [_bytes(v.aval) for v in equation.outvars]
        name = equation.primitive.name
        if name == _RANDOM:
            sizes = [_COUNTERS * size for size in sizes]
        return _Operation(name, operands, outputs, sizes, inside, ahead, in_place)

    def _widened(self, body: Any, num_fixed: int) -> int:
        """Bytes of what a loop slices and widens again and again, widened once for all."""
        import jax

        if self._platform != "cpu" or jax.__version_info__ >= _WIDENS_SLICES:
            return 0
        values: dict[Any, int | None] = {v: self._new() for v in body.invars}
        whole = {values[v]: math.prod(v.aval.shape) for v in body.invars[:num_fixed]}
        widened: dict[int | None, int] = {}
        for operation in self._operations(body, values):
            first = operation.operands[0] if operation.operands else None
            if first in whole and operation.name in _SLICED:
                whole[operation.outputs[0]] = whole[first]
            elif first in whole and operation.name == "convert_element_type":
                widened[first] = 4 * whole[first]
        return sum(widened.values())


class _Layout:
    """Which values lie in memory, from when to when.

    Args:
        operations: in their order.
        num_inputs: values up to this number come from outside and cost nothing.
        results: values that live to the end.
    """

    def __init__(
        self, operations: list[_Operation], num_inputs: int, results: list[int | None]
    ) -> None:
        self._operations = operations
        self._num_inputs = num_inputs
        self._results = results
        self._readers: dict[int | None, list[int]] = {}
        self._maker: dict[int | None, int] = {}
        for number, operation in enumerate(operations):
            for value in operation.operands:
                self._readers.setdefault(value, []).append(number)
            self._maker.update(dict.fromkeys(operation.outputs, number))
        self._last = {value: numbers[-1] for value, numbers in self._readers.items()}
        self._last.update(dict.fromkeys(results, len(operations)))
        self._fused = self._find_fused()
        self._buffer: dict[int | None, int | None] = {}

    def measured(self, inputs: list[int | None]) -> _Measured:
        """The peak, and which of `inputs` each result reuses."""
        change = [0] * (len(self._operations) + 2)
        for start, end, size in self._lifetimes():
            change[start] += size
            change[end + 1] -= size
        peak = live = 0
        for delta, operation in zip(change, self._operations, strict=False):
            live += delta
            peak = max(peak, live + operation.inside)
        places = {value: i for i, value in enumerate(inputs)}
        taken = [places.get(self._buffer.get(value, value)) for value in self._results]
        return _Measured(peak, taken)

    def _find_fused(self) -> set[int | None]:
        """The values that are never written to memory; what they read lives as long as they."""
        fused: set[int | None] = set()
        results = set(self._results)
        for number in reversed(range(len(self._operations))):
            operation = self._operations[number]
            readers = [r for value in operation.outputs for r in self._readers.get(value, ())]
            if operation.name not in _FUSED or not results.isdisjoint(operation.outputs):
                continue
            if all(self._operations[reader].name in _FUSES for reader in readers):
                fused.update(operation.outputs)
                last = max((self._last.get(v, number) for v in operation.outputs), default=number)
                for value in operation.operands:
                    self._last[value] = max(self._last.get(value, number), last)
        return fused

    def _lifetimes(self) -> list[tuple[int, int, int]]:
        """(first operation, last operation, bytes) of every buffer."""
        size: dict[int | None, int] = {}
        others = []
        for number, operation in enumerate(self._operations):
            is_loop = operation.name in _LOOPS
            others.append((0, number, operation.ahead))
            for value, num_bytes, taken in zip(
                operation.outputs, operation.sizes, operation.in_place, strict=True
            ):
                buffer = self._buffer.get(taken, taken)
                mine = buffer is not None and buffer > self._num_inputs
                if value in self._fused:
                    continue
                if buffer is None or buffer in self._fused or (is_loop and not mine):
                    size[value] = num_bytes
                    continue
                self._buffer[value] = buffer
                if is_loop and self._is_constant(buffer):
                    # Made once for all layers, and copied where a loop starts from it.
                    others.append((0, len(self._operations), num_bytes))
                self._last[buffer] = max(
                    self._last.get(buffer, number), self._last.get(value, number)
                )
                if operation.name in _UPDATES and self._is_read_beside(number, taken):
                    # Nothing orders the readers of the old and of the new values.
                    readers = self._readers[taken] + self._readers.get(value, [])
                    others.append((self._maker.get(taken, 0), max(readers), num_bytes))
        return others + [
            (self._maker[value], max(self._last.get(value, 0), self._maker[value]), num_bytes)
            for value, num_bytes in size.items()
        ]

    def _is_constant(self, value: int | None) -> bool:
        """Whether a value is made of literals alone."""
        maker = self._maker.get(value)
        return maker is not None and not any(self._operations[maker].operands)

    def _is_read_beside(self, number: int, value: int | None) -> bool:
        """Whether a value has a reader that need not come before operation `number`."""
        before: set[int] = set()
        todo = [number]
        while todo:
            operation = todo.pop()
            if operation not in before:
                before.add(operation)
                operands = self._operations[operation].operands
                todo += [self._maker[v] for v in operands if v in self._maker]
        return not before.issuperset(self._readers.get(value, ()))


def _value(variable: Any, values: Mapping[Any, int | None]) -> int | None:
    """The number of a variable; a literal has none."""
    return None if hasattr(variable, "val") else values[variable]


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)
