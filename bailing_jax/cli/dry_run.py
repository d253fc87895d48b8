"""generate --dry-run: what a run would need, from the config alone.

Parameters, state and programs are described before any of them exists, so nothing is allocated,
compiled or run: bytes are added up from shapes. Only the temporaries of a program are an
estimate: its trace is read as XLA would lay it out. A folder's weights are matched by name and
shape where they are there; a folder with only config.json is planned too. So is a mesh of more
devices than there are: one of them stands for all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bailing_jax.engine.sizes import ProgramSize, job_programs, prompt_programs
from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from bailing_jax.config import ModelConfig
    from bailing_jax.params import Param

_GIB = 2**30


@dataclass(frozen=True)
class DryRun:
    """What a run needs and what the machine has.

    Attributes:
        model: folder or preset.
        weights_seen: what is known about the weights, as a sentence.
        architecture: as in config.json.
        parameters: "total", and "active": those one token meets.
        in_force: dtypes and sizes by option name.
        slots: recurrent slots.
        pages: cache pages that fit into the allowed memory.
        pages_wanted: those of every sequence at full length.
        mesh: devices along each axis.
        devices: of the mesh.
        devices_here: that this machine has.
        bytes: of a device by purpose; "temporaries" is the estimate for the largest program.
        total_bytes: their sum.
        platform: "cpu", "gpu" or "tpu".
        memory_bytes: of the machine or a device that is here; None when it can't be told.
        allowed_bytes: the share of it that may be used.
        fits: None when the memory is not known.
        programs: "one_prompt" and "job" (prompts of any length, as many as there may be at once):
            the sizes of the steps they compile.
    """

    model: str
    weights_seen: str
    architecture: str
    parameters: Mapping[str, int]
    in_force: Mapping[str, str | int | float]
    slots: int
    pages: int
    pages_wanted: int
    mesh: str
    devices: int
    devices_here: int
    bytes: Mapping[str, int]
    total_bytes: int
    platform: str
    memory_bytes: int | None
    allowed_bytes: int | None
    fits: bool | None
    programs: Mapping[str, tuple[ProgramSize, ...]]


def run(
    model: str | Path,
    options: Mapping[str, Any],
    hf_overrides: Mapping[str, object],
    *,
    prompt_tokens: int | None = None,
    as_json: bool = False,
) -> int:
    """Print what a run would need; returns the exit code (3: it does not fit).

    Args:
        model: a folder or a preset's name.
        options: fields of `EngineOptions` by name.
        hf_overrides: config.json keys that replace the file's.
        prompt_tokens: the prompt's length where it is known.
        as_json: one JSON object in place of the table.

    Raises:
        UserError: anything wrong with model, config or options.
    """
    needs = plan(model, options, hf_overrides, prompt_tokens=prompt_tokens)
    print(json.dumps(as_object(needs)) if as_json else as_text(needs), flush=True)
    return EXIT_DOES_NOT_FIT if needs.fits is False else EXIT_OK


def plan(
    model: str | Path,
    options: Mapping[str, Any],
    hf_overrides: Mapping[str, object],
    *,
    prompt_tokens: int | None = None,
) -> DryRun:
    """Work out what a run would need; arguments and errors as `run`."""
    import jax

    from bailing_jax import plugins, runtime
    from bailing_jax.engine_options import EngineOptions
    from bailing_jax.memory import plan_memory
    from bailing_jax.params import describe

    plugins.load()
    chosen = EngineOptions(**options)
    config, weights_seen = _read(model, hf_overrides)
    platform = runtime.platform()
    devices_here = jax.device_count()
    mesh = chosen.mesh_shape  # one device of "auto", which takes those that are here
    chosen = chosen.resolved(config, max(devices_here, mesh.num_devices))
    runtime_options = chosen.runtime(config, platform)
    needed = plan_memory(config, runtime_options, chosen)
    limits, params = needed.limits, describe(config)
    return DryRun(
        model=str(model),
        weights_seen=weights_seen,
        architecture=config.architecture,
        parameters={
            "total": sum(param.size for param in params),
            "active": _active_parameters(config, params),
        },
        in_force={
            "dtype": runtime_options.dtype,
            "state_dtype": chosen.state_dtype,
            "max_num_seqs": limits.max_num_seqs,
            "max_model_len": limits.max_model_len,
            "prefill_chunk": limits.prefill_chunk,
            "memory_fraction": chosen.memory_fraction,
        },
        slots=limits.max_num_seqs,
        pages=limits.num_pages,
        pages_wanted=limits.max_num_seqs * limits.pages_a_sequence,
        mesh=str(chosen.mesh_shape),
        devices=chosen.mesh_shape.num_devices,
        devices_here=devices_here,
        bytes=needed.needs,
        total_bytes=needed.total_bytes,
        platform=platform,
        memory_bytes=needed.memory_bytes,
        allowed_bytes=needed.allowed_bytes,
        fits=needed.fits,
        programs={
            "one_prompt": prompt_programs(limits, prompt_tokens),
            "job": job_programs(limits),
        },
    )


def as_object(needs: DryRun) -> dict[str, Any]:
    """The plan as JSON has it; a program is an object of its sizes."""
    programs = {job: [size._asdict() for size in sizes] for job, sizes in needs.programs.items()}
    return {**dataclasses.asdict(needs), "programs": programs}


def as_text(needs: DryRun) -> str:
    """The plan as a table, with the flags that help when it does not fit."""
    total, active = (needs.parameters[kind] / 1e6 for kind in ("total", "active"))
    in_force = [f"{name} {value}" for name, value in needs.in_force.items()]
    lines = [
        f"{needs.model}: {needs.weights_seen}",
        f"{needs.architecture}: {total:,.1f} M parameters, {active:,.1f} M active a token",
        ", ".join(in_force[:2]),
        ", ".join(in_force[2:]),
        *_devices(needs),
        _places(needs),
        "",
        *(
            _row(what.replace("_", " "), size, "(estimate)" if what == "temporaries" else "")
            for what, size in needs.bytes.items()
        ),
        _row("total", needs.total_bytes),
    ]
    if needs.memory_bytes is None or needs.allowed_bytes is None:
        lines.append(f"the memory of this {needs.platform} can't be told: whether it fits is open")
    else:
        lines += [
            _row("memory", needs.memory_bytes, f"({needs.platform})"),
            _row("allowed", needs.allowed_bytes),
            "fits" if needs.fits else f"does not fit. {_what_helps(needs)}",
        ]
    lines += ["", "programs compiled (decode rows, prefill rows, prefill segments):"]
    for job, sizes in needs.programs.items():
        steps = "  ".join(f"({d}, {t}, {p})" for d, t, p in sizes)
        lines.append(f"  {job.replace('_', ' '):<16}{steps}")
    return "\n".join(lines)


def _devices(needs: DryRun) -> list[str]:
    """Of several devices: which, and what stands in for those that are not here."""
    if needs.devices == 1:
        return []
    lines = [f"mesh {needs.mesh}: {needs.devices} devices; all that follows is of one"]
    if needs.devices > needs.devices_here:
        lines.append(
            f"only {needs.devices_here} of them here: memory is this machine's, and the others are "
            "taken to be alike (python -m bailing_jax.plan knows other machines)"
        )
    return lines


def _places(needs: DryRun) -> str:
    """Slots and pages, and whether requests may have to give way to each other."""
    text = f"{needs.slots} slot{'s' * (needs.slots != 1)}, "
    text += f"{needs.pages} page{'s' * (needs.pages != 1)}"
    if needs.pages < needs.pages_wanted:
        text += f" of {needs.pages_wanted}: when they run out, the youngest request is put off"
    return text


def _row(what: str, size: int, remark: str = "") -> str:
    return f"  {what:<16}{size / _GIB:12.3f} GiB {remark}".rstrip()


def _what_helps(needs: DryRun) -> str:
    """The flags that make it smaller here, the most helpful first."""
    force, size = needs.in_force, needs.bytes
    least = size["weights"] // (2 if force["dtype"] == "float32" else 1)
    if needs.memory_bytes is not None and least > needs.memory_bytes:
        return "No flag makes the weights small enough for this machine."
    helps = {
        "--dtype bfloat16": force["dtype"] == "float32",
        f"--max-num-seqs (now {force['max_num_seqs']})": force["max_num_seqs"] != 1,
        f"--max-model-len (now {force['max_model_len']})": size["pages"] > 0,
        "--state-dtype bfloat16": force["state_dtype"] == "float32" and size["recurrent_state"] > 0,
        f"--prefill-chunk (now {force['prefill_chunk']})": force["prefill_chunk"] != 1,
    }
    smaller = ", ".join(flag for flag, does in helps.items() if does)
    share = f" Larger: --memory-fraction (now {force['memory_fraction']:g})."
    return f"Smaller: {smaller}.{share if force['memory_fraction'] != 1 else ''}"


def _read(model: str | Path, hf_overrides: Mapping[str, object]) -> tuple[ModelConfig, str]:
    """The config, and what is known about the weights; checks those that are there."""
    from bailing_jax.checkpoint.load import match_native, match_released
    from bailing_jax.config import ModelConfig
    from bailing_jax.presets import find_preset, preset_names
    from convert.native import is_native, open_native
    from convert.source import CONFIG_NAME, open_source, read_json

    folder = Path(model)
    if not folder.exists():
        preset = find_preset(str(model))
        if preset is None:
            names = ", ".join(preset_names())
            raise UserError(
                f"{model}: no such folder, and no preset of that name",
                f"Presets: {names}",
                EXIT_USAGE,
            )
        config = ModelConfig.from_hf(preset.hf_config, hf_overrides, where=preset.name)
        assumed = sorted(set(preset.assumed) - set(hf_overrides))
        remark = f"; assumed, not published: {', '.join(assumed)}" if assumed else ""
        return config, f"a preset, its weights are random{remark}"
    if is_native(folder):
        with open_native(folder) as native:
            config = native.model_config(hf_overrides)
            weights = match_native(config, native)
        return config, f"native, {weights.num_bytes / 1e6:,.1f} MB to read, complete"
    where = folder / CONFIG_NAME
    if where.exists() and not any(folder.glob("*.safetensors*")):
        values = read_json(where, "the model config")
        config = ModelConfig.from_hf(values, hf_overrides, where=str(where))
        return config, "only its config.json was read; the weights are not there to look at"
    with open_source(folder) as source:
        config = ModelConfig.from_hf(source.config, hf_overrides, where=str(where))
        weights = match_released(config, source)
    return config, f"{weights.num_bytes / 1e6:,.1f} MB to read, complete"


def _active_parameters(config: ModelConfig, params: Sequence[Param]) -> int:
    """All but the routed experts a token is not sent to."""
    moe = config.moe
    return sum(
        param.size * moe.num_experts_per_token // moe.num_experts
        if param.axes[0] == "experts"
        else param.size
        for param in params
    )
