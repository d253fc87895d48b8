"""The engine's own steps over a mesh of described devices, ready to be lowered.

The same programs that the engine compiles, over shapes in place of arrays: weights and state have a
place on the devices and no content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bailing_jax.batch import pack
from bailing_jax.config import ModelConfig
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.programs import Programs
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.layers.parallel import Parallel
from bailing_jax.mesh import MeshShape
from bailing_jax.model import build, param_dtype
from bailing_jax.params import Param
from bailing_jax.placement import Placement
from bailing_jax.planning.footprint import is_matrix
from bailing_jax.planning.quantised import scaled_shape
from bailing_jax.planning.workload import FP8, PAGE_SIZE, Workload
from bailing_jax.state import DecodeState

# (name, token rows a shard, lowers it and says what the engine tells XLA then)
Step = tuple[str, int, Callable[[], tuple[jax.stages.Lowered, dict[str, str | bool] | None]]]


class Built(NamedTuple):
    """The programs of a model that has no content.

    Attributes:
        programs: as the engine has them.
        leaves: the parameters, as shapes with a place.
        state: likewise.
        limits: sizes of one shard.
        mesh: of jax.
    """

    programs: Programs
    leaves: tuple[Any, ...]
    state: DecodeState
    limits: EngineLimits
    mesh: jax.sharding.Mesh


def built(config: ModelConfig, devices: Sequence[Any], mesh: MeshShape, load: Workload) -> Built:
    """Programs and arguments over a mesh of these devices."""
    placement = Placement(config, mesh, devices)
    options = RuntimeOptions(dtype=load.dtype, parallel=Parallel.of(config, mesh))

    def shape(param: Param) -> Any:
        if load.weight_dtype == FP8 and is_matrix(param):
            return scaled_shape(placement, param)
        return placement.param_shape(param, param_dtype(param, options))

    programs = Programs(build(config, options, shape), placement)
    limits = EngineLimits(load.decode_rows(mesh), load.max_model_len, load.prefill_chunk, PAGE_SIZE)
    # Nothing else is compiled for, whatever the devices are that stand in for them.
    spec = limits.state_spec(load.dtype, load.state_dtype, "tpu")
    state = DecodeState(placement.state_shapes(spec))  # pyright: ignore[reportArgumentType]
    return Built(programs, programs.leaves, state, limits, placement.mesh)


def traceable(
    config: ModelConfig, devices: Sequence[Any], mesh: MeshShape, load: Workload
) -> Iterator[Step]:
    """The step in which every sequence decodes, and the one that takes in a chunk beside them."""
    programs, leaves, state, limits, jax_mesh = built(config, devices, mesh, load)

    def lower(
        num_prefill: int, num_segments: int
    ) -> tuple[jax.stages.Lowered, dict[str, str | bool] | None]:
        layout = pack(
            [],
            [],
            num_decode=limits.max_num_seqs,
            num_prefill=num_prefill,
            num_segments=num_segments,
            page_size=limits.page_size,
            pages_a_sequence=limits.pages_a_sequence,
        )
        if mesh.num_shards > 1:
            layout = jax.tree.map(lambda a: np.stack([a] * mesh.num_shards), layout)
        # The mesh tells the kernels' wrappers which chip they are for.
        with jax.set_mesh(jax_mesh):
            lowered = programs.trace_step(leaves, state, layout).lower()
        return lowered, programs.compiler_options(layout)

    decode, prefill = limits.max_num_seqs, load.prefill_chunk
    yield "decode", decode, lambda: lower(0, 0)
    yield "prefill", decode + prefill, lambda: lower(prefill, load.segments(mesh))
