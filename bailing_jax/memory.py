"""What a run needs of each device's memory, worked out before anything is allocated.

Weights, recurrent slots and the temporaries of the largest program are fixed by the options; what
the allowed share of memory leaves goes to pages, up to every sequence at full length. Fewer pages
than that are no failure: requests give way to each other then. One sequence at full length must
fit. Loading and the dry run both ask here, so that they agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from bailing_jax import runtime
from bailing_jax.batch import pack
from bailing_jax.config import ModelConfig
from bailing_jax.engine import sampler
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.sizes import ProgramSize, job_programs
from bailing_jax.engine_options import EngineOptions
from bailing_jax.layer_plan import layer_plan
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.mesh import MeshShape
from bailing_jax.model import build, param_dtype
from bailing_jax.params import Param, describe
from bailing_jax.sharding import axis_sizes, local_config, local_shape
from bailing_jax.state import DecodeState, StateSpec, leaf_shapes
from bailing_jax.temporaries import peak_bytes

# `peak_bytes` came to 0.74 to 1.26 times what XLA allocated for the largest program
# (Compiled.memory_analysis().temp_size_in_bytes; CPU, float32 and bfloat16, jaxlib 0.10.2 and
# 0.12.0), over 2 to 7 layers of ring-mini-linear-2.0, ling-mini-2.0 and ling-2.6-flash at their
# real widths with 1, 8 and 32 sequences, and the tests' tiny models. The lowest are bfloat16 with
# one sequence, and a vocabulary larger than all else. On a GPU nobody has measured it yet.
# tests/cli/test_dry_run.py measures again.
_MARGIN = 1.4


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in force and the bytes they take.

    Attributes:
        limits: the engine's, with the pages that fit.
        spec: the state of those limits.
        needs: bytes of a device by purpose; "temporaries" is the estimate for the largest program.
        memory_bytes: of a device, its share of the machine's on a CPU; None when it can't be told.
        allowed_bytes: the share of it that may be used.
    """

    limits: EngineLimits
    spec: StateSpec
    needs: Mapping[str, int]
    memory_bytes: int | None
    allowed_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """All that is needed."""
        return sum(self.needs.values())

    @property
    def fits(self) -> bool | None:
        """Whether it does; None when the memory is not known."""
        return None if self.allowed_bytes is None else self.total_bytes <= self.allowed_bytes


def plan_memory(
    config: ModelConfig, runtime_options: RuntimeOptions, options: EngineOptions
) -> MemoryPlan:
    """Work out pages and bytes. Nothing is allocated.

    Raises:
        UserError: the options do not go with the model.
    """
    limits, mesh = options.limits(config), options.mesh_shape
    local = local_config(config, mesh.tensor)
    dtypes = runtime_options.dtype, options.state_dtype
    spec = limits.state_spec(*dtypes, runtime.platform())
    params = describe(config)
    # The step with the most rows does all that the others do.
    largest = max(job_programs(limits), key=lambda size: size.decode_rows + size.prefill_rows)
    temporaries = temporary_bytes(config, runtime_options, limits, spec, largest)
    weights = sum(
        math.prod(local_shape(config, p, mesh)) * param_dtype(p, runtime_options).itemsize
        for p in params
    )
    recurrent, pages = _state_bytes(local, spec)
    memory = runtime.memory_bytes(mesh.num_devices)
    allowed = None if memory is None else int(memory * options.memory_fraction)
    if allowed is not None and pages:
        page = pages // spec.num_pages
        # NULL takes a page too.
        room = (allowed - weights - recurrent - temporaries) // page - 1
        if room < limits.num_pages:
            least = min(limits.pages_a_sequence, limits.num_pages)
            limits = replace(limits, max_num_pages=max(room, least))
            spec = limits.state_spec(*dtypes, runtime.platform())
            pages = page * spec.num_pages
    needs = {
        "weights": weights,
        "recurrent_state": recurrent,
        "pages": pages,
        "temporaries": temporaries,
    }
    return MemoryPlan(limits, spec, needs, memory, allowed)


def _state_bytes(config: ModelConfig, spec: StateSpec) -> tuple[int, int]:
    """Bytes of slots and of pages, NULL included."""
    recurrent = pages = 0
    for layer, leaf in zip(layer_plan(config), leaf_shapes(config, spec), strict=True):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if layer.attention == "lightning":
            recurrent += size
        else:
            pages += size
    return recurrent, pages


def temporary_bytes(
    config: ModelConfig,
    runtime_options: RuntimeOptions,
    limits: EngineLimits,
    spec: StateSpec,
    size: ProgramSize,
) -> int:
    """An estimate, from above, of what a step allocates while it runs, its logits included."""

    parallel = runtime_options.parallel
    mesh = MeshShape(parallel.data, parallel.expert, parallel.tensor)

    def shape(param: Param) -> Any:
        size = local_shape(config, param, mesh)
        return jax.ShapeDtypeStruct(size, param_dtype(param, runtime_options))

    graphdef, params = nnx.split(build(config, runtime_options, shape))

    def step(params, state, layout, knobs):
        model = nnx.merge(graphdef, params)
        x, state, _ = model(state, layout)
        logits = model.logits(x[layout.logit_rows])
        return sampler.pick(logits, knobs, layout.positions[layout.logit_rows]), logits, state

    layout = pack(
        [],
        [],
        num_decode=size.decode_rows,
        num_prefill=size.prefill_rows,
        num_segments=size.segments,
        page_size=limits.page_size,
        pages_a_sequence=limits.pages_a_sequence,
    )
    local = local_config(config, mesh.tensor)
    leaves: Any = leaf_shapes(local, spec)  # shapes stand for arrays, as in `shape`
    knobs = sampler.knobs(int(np.shape(layout.logit_rows)[0]), (), ())
    # As one device sees it, with the axes that it sums over.
    axes = list(axis_sizes(config, mesh).items())
    traced = jax.make_jaxpr(step, axis_env=axes)(params, DecodeState(leaves), layout, knobs)
    return int(_MARGIN * peak_bytes(traced.jaxpr, runtime.platform()))
