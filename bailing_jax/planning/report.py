"""A plan as text and as JSON. Every number says its unit, and what is a bound says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bailing_jax.planning.compiled_step import CompiledStep
from bailing_jax.planning.model import PlannedModel
from bailing_jax.planning.ranking import Candidate
from bailing_jax.planning.roofline import Phase
from bailing_jax.planning.workload import Workload

_GIB = 2**30
_MOST_MESHES = 8
NOTHING_RAN = "Bounds from published peak rates, not measurements: nothing was run."


@dataclass(frozen=True)
class Plan:
    """A model on a topology.

    Attributes:
        model: what is planned.
        load: what for.
        chosen: the mesh that was asked for, or the best.
        ranked: all meshes of the topology, the best first.
        smallest: the best mesh of the smallest slice of these chips that has room, if any has.
        compiled: what the compiler made of the steps, where it was asked.
    """

    model: PlannedModel
    load: Workload
    chosen: Candidate
    ranked: tuple[Candidate, ...]
    smallest: Candidate | None
    compiled: tuple[CompiledStep, ...] = ()


def as_object(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it; names end in their unit."""
    model, topology = plan.model, plan.chosen.topology
    smallest, layers = plan.smallest, model.config.num_layers
    return {
        "model": model.name,
        "model_remark": model.remark,
        "architecture": model.config.architecture,
        "parameters": {"total": model.num_parameters, "active": model.num_active},
        "topology": {
            "name": topology.name,
            "chips": topology.num_chips,
            "devices": topology.num_devices,
            "devices_a_chip": topology.chip.devices_a_chip,
            "hosts": topology.num_hosts,
            "hbm_bytes_a_device": topology.chip.hbm_bytes,
        },
        "in_force": asdict(plan.load),
        "remark": NOTHING_RAN,
        "chosen": candidate_object(plan.chosen),
        "fits": plan.chosen.fits,
        "smallest_slice": None if smallest is None else candidate_object(smallest),
        "meshes": [candidate_object(found) for found in plan.ranked],
        "compiled": [
            asdict(step) | {"beside_the_exchange": step.beside_the_exchange(layers)}
            for step in plan.compiled
        ],
    }


def candidate_object(found: Candidate) -> dict[str, Any]:
    """One mesh as JSON has it."""
    bounds, chip = found.roofline, found.topology.chip
    needs = dict(found.footprint.needs)
    return {
        "topology": found.topology.name,
        "chips": found.topology.num_chips,
        "mesh": asdict(found.mesh),
        "bytes_a_device": needs,
        "bytes_a_chip": {name: size * chip.devices_a_chip for name, size in needs.items()},
        "total_bytes_a_device": found.footprint.total_bytes,
        "allowed_bytes_a_device": found.allowed_bytes,
        "slots_a_shard": found.footprint.slots,
        "pages_a_shard": found.footprint.pages,
        "fits": found.fits,
        "decode": {
            **_phase_object(bounds.decode),
            "tokens_per_s_bound": bounds.decode_rate,
            "tokens_per_s_in_turns_bound": bounds.decode_in_turns,
        },
        "prefill": {
            **_phase_object(bounds.prefill),
            "tokens_per_s_bound": bounds.prefill_rate,
        },
        "first_token": {
            "seconds_bound": bounds.first_token_seconds,
            "binds": bounds.first_token_binds,
        },
    }


def _phase_object(phase: Phase) -> dict[str, Any]:
    return {
        "memory_s": phase.memory,
        "compute_s": phase.compute,
        "interconnect_s": phase.interconnect,
        "step_s_bound": phase.bound_seconds,
        "binds": phase.binds,
    }


def as_text(plan: Plan) -> str:
    """The plan as a person reads it."""
    model, load, topology = plan.model, plan.load, plan.chosen.topology
    chip = topology.chip
    hosts, devices = _count(topology.num_hosts, "host"), _count(topology.num_devices, "device")
    allowed = f"{load.memory_fraction:g} of {chip.hbm_bytes / _GIB:.2f} GiB a device"
    lines = [
        f"{model.name}: {model.remark}",
        f"{model.config.architecture}: {model.num_parameters / 1e9:,.3f} B parameters, "
        f"{model.num_active / 1e9:,.3f} B active a token",
        f"weights {load.weight_dtype}, pages {load.dtype}, recurrent state {load.state_dtype}",
        f"{load.max_num_seqs} sequences of {load.max_model_len} tokens, prefill chunk "
        f"{load.prefill_chunk} tokens",
        f"{topology.name}: {_count(topology.num_chips, 'chip')}, {devices}, {hosts}; {allowed}",
        "",
        *_memory(plan.chosen),
        _verdict(plan),
        "",
        *_bounds(plan.chosen, load),
        "",
        *_table(plan.ranked),
    ]
    if plan.compiled:
        lines += ["", *_compiled(plan)]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _memory(found: Candidate) -> list[str]:
    mesh, chip = found.mesh, found.topology.chip
    per_chip = chip.devices_a_chip > 1
    shards = f"{_count(mesh.num_shards, 'shard')} of {_count(mesh.tensor, 'device')}"
    heading = f"{'GiB':>16}{'a device':>14}" + f"{'a chip':>12}" * per_chip
    rows = [*found.footprint.needs.items(), ("total", found.footprint.total_bytes)]
    rows.append(("allowed", found.allowed_bytes))

    def row(what: str, size: int) -> str:
        remark = " (estimate)" * (what == "temporaries")
        chips = f"{size * chip.devices_a_chip / _GIB:12.3f}" * per_chip
        return f"  {what.replace('_', ' '):<16}{size / _GIB:12.3f}{chips}{remark}"

    slots = f"{found.footprint.slots} slots and {found.footprint.pages} pages a shard"
    return [f"mesh {mesh}: {shards}, {slots}", heading, *(row(*each) for each in rows)]


def _verdict(plan: Plan) -> str:
    found, smallest = plan.chosen, plan.smallest
    chip = found.topology.chip.name
    if smallest is None:
        least = f"No {chip} slice has room for this load: fewer sequences or shorter ones?"
    else:
        chips = _count(smallest.topology.num_chips, "chip")
        least = (
            f"The smallest {chip} slice with room is {smallest.topology.name} ({chips}, mesh "
            f"{smallest.mesh})."
        )
    if found.fits:
        return f"fits. {least}"
    better = plan.ranked[0]
    other = f" Mesh {better.mesh} does." if better.fits else ""
    return f"does not fit.{other} {least}"


def _bounds(found: Candidate, load: Workload) -> list[str]:
    bounds, prompt = found.roofline, load.prompt_tokens
    step = bounds.decode.bound_seconds
    return [
        NOTHING_RAN,
        f"  decode      at most {bounds.decode_rate:12,.0f} tokens/s, "
        f"{load.max_num_seqs} sequences with {prompt} tokens behind each; a step at least "
        f"{step * 1e3:,.3f} ms: {_parts(bounds.decode)}",
        f"              at most {bounds.decode_in_turns:12,.0f} tokens/s where messages and "
        "products take turns",
        f"  prefill     at most {bounds.prefill_rate:12,.0f} tokens/s, every shard busy: "
        f"{_parts(bounds.prefill)}",
        f"  first token after at least {bounds.first_token_seconds * 1e3:,.3f} ms, one prompt of "
        f"{prompt} tokens alone: {bounds.first_token_binds} binds",
    ]


def _parts(phase: Phase) -> str:
    names = ("memory", "compute", "interconnect")
    parts = ", ".join(f"{name} {getattr(phase, name) * 1e3:,.3f} ms" for name in names)
    return f"{phase.binds} binds ({parts})"


def _table(ranked: Sequence[Candidate]) -> list[str]:
    head = (
        f"{'GiB a device':>14}{'fits':>6}{'decode, tokens/s':>18}{'in turns':>10}"
        f"{'first token, ms':>17}"
    )
    width = max(len(str(found.mesh)) for found in ranked[:_MOST_MESHES])
    lines = [f"meshes, best first (bounds){'':<{max(0, width - 25)}}{head}"]
    width = max(width, 25)
    for found in ranked[:_MOST_MESHES]:
        bounds = found.roofline
        lines.append(
            f"  {found.mesh!s:<{width}}{found.footprint.total_bytes / _GIB:13.2f}"
            f"{'yes' if found.fits else 'no':>6}{bounds.decode_rate:18,.0f}"
            f"{bounds.decode_in_turns:10,.0f}{bounds.first_token_seconds * 1e3:17,.2f}"
        )
    if len(ranked) > _MOST_MESHES:
        lines.append(f"  and {len(ranked) - _MOST_MESHES} more")
    return lines


def _compiled(plan: Plan) -> list[str]:
    lines = [f"compiled for {plan.chosen.topology.name}, not run (bytes are a device's):"]
    for step in plan.compiled:
        collectives = ", ".join(
            f"{found.count} {found.kind} over {found.over} ({found.bytes / 1e6:,.2f} MB)"
            for found in step.collectives
        )
        beside = step.beside_the_exchange(plan.model.config.num_layers)
        lines += [
            f"  {step.name}: {step.rows_a_shard} rows a shard; traced in {step.trace_s:.1f} s, "
            f"compiled in {step.compile_s:.1f} s ({step.compile_cpu_s:.1f} s of processor time)",
            f"    arguments {step.argument_bytes / _GIB:.3f} GiB, of which state updated in place "
            f"{step.alias_bytes / _GIB:.3f} GiB; temporaries {step.temporary_bytes / _GIB:.3f} "
            f"GiB; code {step.code_bytes / 2**20:.1f} MiB",
            f"    collectives in the program: {collectives or 'none'}",
            f"    a layer has {beside:.2f} beside the exchange of the experts' rows",
            *[f"    whole pools are copied at {step.state_copies} places"]
            * bool(step.state_copies),
        ]
    return lines
