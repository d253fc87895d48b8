"""The real decode and prefill steps, compiled for a TPU topology that need not be there.

libtpu holds the whole compiler. Arguments are shapes with a place on the described devices:
nothing is allocated and nothing runs, so there are no times of steps here, only what the compiler
laid out: bytes, updates in place, collectives, and how long it took.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE, UserError
from bailing_jax.mesh import MeshShape
from bailing_jax.planning import hlo
from bailing_jax.planning.compiled_step import CompiledStep
from bailing_jax.planning.model import PlannedModel
from bailing_jax.planning.topology import Topology
from bailing_jax.planning.workload import Workload

# Compile only: no TPU is looked for, and several processes may load libtpu at once.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def prepare(topology: Topology) -> None:
    """Set up the environment; call it before jax is imported.

    Raises:
        UserError: GPUs, or no libtpu.
    """
    if not topology.chip.is_tpu:
        raise UserError(
            f"compile: {topology.name} can't be compiled for without such a GPU",
            "Leave it out, or give a TPU topology.",
            EXIT_USAGE,
            options=("compile",),
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compile: libtpu, which holds the compiler for TPUs, is not installed",
            "pip install 'bailing-jax[plan]' (in this folder: pip install -e '.[plan]').",
            EXIT_USAGE,
            options=("compile",),
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def steps(
    model: PlannedModel,
    topology: Topology,
    mesh: MeshShape,
    load: Workload,
    say: Callable[[str], None],
) -> tuple[CompiledStep, ...]:
    """Compile the decode step and the prefill step.

    Raises:
        UserError: no libtpu, or the compiler finds that a step does not fit.
    """
    prepare(topology)
    from bailing_jax.planning import steps as real

    devices = _devices(topology)
    found = []
    for name, rows, lower in real.traceable(model.config, devices, mesh, load):
        say(f"compiling the {name} step for {topology.name}")
        found.append(_compiled(name, rows, lower, topology, mesh))
    return tuple(found)


def _devices(topology: Topology) -> Any:
    from jax.experimental import topologies

    bounds = {} if topology.num_chips >= topology.chip.chips_a_host else {
        "chips_per_host_bounds": [1, 1, 1]
    }  # fmt: skip
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.libtpu_name, **bounds
    ).devices


def _compiled(
    name: str,
    rows: int,
    lower: Callable[[], tuple[Any, dict[str, str | bool] | None]],
    topology: Topology,
    mesh: MeshShape,
) -> CompiledStep:
    import jax

    begun = time.perf_counter()
    lowered, options = lower()
    traced, used = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        if "memory" not in first.lower():
            raise
        raise UserError(
            f"compile: the {name} step does not fit {topology.name}: {first[:300]}",
            "Fewer sequences, a shorter --max-model-len, another mesh or a larger slice.",
            EXIT_DOES_NOT_FIT,
            options=("compile",),
        ) from error
    done = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return CompiledStep(
        name=name,
        rows_a_shard=rows,
        argument_bytes=memory.argument_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=hlo.collectives(text, mesh),
        state_copies=hlo.state_copies(text),
        trace_s=round(traced - begun, 1),
        compile_s=round(done - traced, 1),
        compile_cpu_s=round(time.process_time() - used, 1),
    )
