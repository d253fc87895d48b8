"""Programs over a mesh: one function of one shard's arrays becomes a program of all devices.

On one device that is `jax.jit` and nothing else. On several it runs inside `jax.shard_map`, each
device with its own part of parameters and state, and with its shard's layout. What several shards
take and give has a leading axis [shards, ...]; what the host reads comes back whole on every
device, so that every process can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import PartitionSpec

from bailing_jax.model import BailingForCausalLM
from bailing_jax.placement import Placement
from bailing_jax.state import DecodeState, StateSpec, allocate
from pallas_kernels import compat

T = TypeVar("T")

# A TPU's compiler unrolls a product over as large a block of its matrix as it may keep in VMEM, by
# default about 30 MiB. With 8 it writes less code and is done sooner (docs/experiments.md). But
# gathers of many rows keep them all there, and it gives up where they do not fit: a step's rows in
# float32 may take a quarter.
_SMALL_VMEM = 8 << 20


class Kind(Enum):
    """What an argument or a result of a program is."""

    LEAVES = "the parameters"
    STATE = "the state, donated"
    ROWS = "each shard's own"
    SAME = "the same for all shards"
    GATHERED = "each shard's own, whole on every device"
    FIRST = "the first shard's alone, whole on every device"


class Spread:
    """Makes programs for where a model lies.

    Args:
        model: its config, and the devices its layers know of.
        leaves: its parameters, or shapes with shardings in their place.
        placement: where they lie; None on one device.
    """

    def __init__(
        self, model: BailingForCausalLM, leaves: Sequence[Any], placement: Placement | None
    ) -> None:
        self._config = model.config
        self._parallel = model.parallel
        self._placement = placement
        self._waits = jax.process_count() > 1 and jax.default_backend() == "cpu"
        if placement is not None:
            self._leaf_specs = tuple(leaf.sharding.spec for leaf in leaves)

    def compiler_options(self, rows: int) -> dict[str, str | bool] | None:
        """What XLA is told for a step of so many token rows in all shards."""
        devices = jax.devices() if self._placement is None else self._placement.mesh.devices.flat
        is_small = rows * self._config.hidden_size * 4 <= _SMALL_VMEM // 4
        if devices[0].platform != "tpu" or not is_small:
            return None
        return {"xla_tpu_scoped_vmem_limit_kib": str(_SMALL_VMEM >> 10)}

    @property
    def num_shards(self) -> int:
        """Sets of devices with rows of their own."""
        return self._parallel.num_shards

    def jit(self, run: Callable, takes: Sequence[Kind], gives: Sequence[Kind]) -> Any:
        """The jitted program.

        Args:
            run: of one shard: what `takes` says -> a tuple of what `gives` says.
            takes: the kinds of its arguments.
            gives: the kinds of its results.
        """
        donated = [i for i, kind in enumerate(takes) if kind is Kind.STATE]
        if self._placement is None:
            return jax.jit(run, donate_argnums=donated)
        kinds = tuple(gives)

        def on_a_device(*arguments):
            mine = (self._own(kind, a) for kind, a in zip(takes, arguments, strict=True))
            results = run(*mine)
            return tuple(self._result(k, r) for k, r in zip(kinds, results, strict=True))

        ins = tuple(self._specs(kind) for kind in takes)
        outs = tuple(self._specs(kind) for kind in kinds)
        return jax.jit(
            compat.shard_map(on_a_device, self._placement.mesh, ins, outs),
            in_shardings=self._shardings(ins),
            out_shardings=self._shardings(outs),
            donate_argnums=donated,
        )

    def replicated(self, run: Callable) -> Any:
        """A program of small arrays that every device runs alike."""
        if self._placement is None:
            return jax.jit(run)
        whole = self._placement.sharded(PartitionSpec())
        return jax.jit(run, in_shardings=whole, out_shardings=whole)

    def whole(self, array: jax.Array) -> jax.Array:
        """The array on every device."""
        if self._placement is None:
            return array
        return self.settled(jax.device_put(array, self._placement.sharded(PartitionSpec())))

    def settled(self, results: T) -> T:
        """A program's results; where several processes share it on CPUs, once they are there.

        There the wait for other processes takes threads that the programs queued behind need too:
        a long queue stands still for good. TPUs and GPUs run it in order.
        """
        if self._waits:
            jax.block_until_ready(results)
        return results

    def put(self, arrays: T) -> T:
        """Host arrays of kind ROWS as the programs of several processes take them."""
        if self._placement is None or jax.process_count() == 1:
            return arrays
        place = self._placement.sharded(self._specs(Kind.ROWS))

        def one(array: Any) -> Any:
            if isinstance(array, jax.Array):
                return array
            return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

        return jax.tree.map(one, arrays)

    def for_all(self, arrays: T) -> T:
        """Every shard gets these host arrays."""
        if self.num_shards == 1:
            return arrays
        return jax.tree.map(lambda a: np.stack([a] * self.num_shards), arrays)

    def new_state(self, spec: StateSpec) -> DecodeState:
        """A state of zeros; `spec` is one shard's."""
        if self._placement is None:
            return allocate(self._config, spec)
        return self._placement.new_state(spec)

    def _own(self, kind: Kind, argument: Any) -> Any:
        """A shard's argument, without the axis of shards."""
        if kind is Kind.ROWS and self.num_shards > 1:
            return jax.tree.map(lambda a: a[0], argument)
        return argument

    def _result(self, kind: Kind, result: Any) -> Any:
        parallel = self._parallel
        if self.num_shards > 1 and kind is Kind.ROWS:
            return jax.tree.map(lambda r: r[None], result)
        if self.num_shards > 1 and kind is Kind.FIRST:
            return jax.tree.map(lambda r: parallel.of_first_shard(r)[None], result)
        if self.num_shards > 1 and kind is Kind.GATHERED:
            return jax.tree.map(parallel.gather_shards, result)
        return result

    def _specs(self, kind: Kind) -> Any:
        assert self._placement is not None
        if kind is Kind.LEAVES:
            return self._leaf_specs
        if kind is Kind.STATE:
            return DecodeState(self._placement.state_specs())  # pyright: ignore
        is_divided = kind is Kind.ROWS and self.num_shards > 1
        return self._placement.rows if is_divided else PartitionSpec()

    def _shardings(self, specs: Any) -> Any:
        assert self._placement is not None
        return jax.tree.map(
            self._placement.sharded, specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
