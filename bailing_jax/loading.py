"""From a name or a folder to a model in memory, everything checked on the way.

Order matters: config, then names and shapes, then memory, then data. Whatever is wrong is said
before the first long wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from bailing_jax import agreement, hub, plugins, runtime, small_model
from bailing_jax.checkpoint.load import Weights, load_model, match_native, match_released
from bailing_jax.checkpoint.random_weights import random_model
from bailing_jax.config import SUPPORTED, ModelConfig
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine_options import EngineOptions
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.layers import expert_exchange
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.memory import MemoryPlan, plan_memory
from bailing_jax.model import BailingForCausalLM
from bailing_jax.params import describe
from bailing_jax.placement import Placement
from bailing_jax.presets import find_preset, preset_names
from bailing_jax.state import StateSpec
from bailing_jax.text.chat import ChatTemplate, load_chat_template
from bailing_jax.text.tokenizer import Tokenizer, load_tokenizer
from convert.native import is_native, open_native
from convert.source import open_source, read_json

_LIKE_HOSTS = (
    "Give all processes the same installation, arguments and model. How many pages fit follows "
    "from each host's memory: smaller max_num_seqs or max_model_len leave room everywhere."
)

Report = Callable[[str], None]
CheckLimits = Callable[[EngineLimits], object]


@dataclass(frozen=True)
class LoadedModel:
    """A model and everything that came with it.

    Attributes:
        config: what it is.
        runtime: dtypes and kernels in force.
        limits: static sizes in force.
        state_spec: the state those sizes need.
        model: the parameters.
        placement: where they lie on a mesh; None on one device.
        tokenizer: None when the checkpoint has none.
        chat_template: None when the checkpoint has none.
        generation_config: the checkpoint's sampling defaults.
        name: where it came from.
    """

    config: ModelConfig
    runtime: RuntimeOptions
    limits: EngineLimits
    state_spec: StateSpec
    model: BailingForCausalLM
    placement: Placement | None
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation_config: Mapping[str, object]
    name: str


def load(
    model: str | Path | None,
    options: EngineOptions,
    hf_overrides: Mapping[str, object],
    seed: int,
    report: Report,
    *,
    download: bool = False,
    check_limits: CheckLimits | None = None,
) -> LoadedModel:
    """Load a checkpoint folder, or make random weights for a preset name.

    Args:
        model: a folder, a preset's name, or org/name on the Hugging Face hub; None: the small model
            that ships with the package.
        options: the engine's.
        hf_overrides: config.json keys that replace the file's.
        seed: of a preset's random weights.
        report: called with each line about what is loaded.
        download: fetch org/name if it is not in the cache.
        check_limits: called with the sizes in force before any weight is read or drawn; None:
            under jax.distributed all processes see there that they load alike.

    Raises:
        UserError: anything wrong with name, folder, config, tensors, options or memory.
    """
    # First of all: what a plugin replaces decides which parameters there are.
    for line in plugins.load():
        report(f"plugin: {line}")
    folder = find_folder(model, download=download)
    if check_limits is None:
        check_limits = _agree(folder, options, hf_overrides, seed)
    name = str(folder)
    if model is None:
        name = small_model.NAME
        report(f"no model was named: this is {name}")
    preset = None if folder.exists() else find_preset(str(model))
    if preset is not None:
        config = ModelConfig.from_hf(preset.hf_config, hf_overrides, where=preset.name)
        assumed = sorted(set(preset.assumed) - set(hf_overrides))
        if assumed:
            report(f"{preset.name}: assumed, not published: {', '.join(assumed)}")
        runtime_options, limits, spec, placement = _checked(config, options, report, check_limits)
        report(f"{preset.name}: random weights from seed {seed}")
        made = random_model(config, runtime_options, seed, placement)
        return LoadedModel(
            config, runtime_options, limits, spec, made, placement, None, None, {}, preset.name
        )
    if is_native(folder):
        with open_native(folder) as native:
            config = native.model_config(hf_overrides)
            weights = match_native(config, native)
            return _load_folder(folder, name, config, weights, options, report, check_limits)
    with open_source(folder) as source:
        where = str(folder / "config.json")
        config = ModelConfig.from_hf(source.config, hf_overrides, where=where)
        weights = match_released(config, source)
        return _load_folder(folder, name, config, weights, options, report, check_limits)


def _agree(
    folder: Path, options: EngineOptions, hf_overrides: Mapping[str, object], seed: int
) -> CheckLimits:
    """A check that all processes, if there are several, load the same model in the same sizes."""

    def check(limits: EngineLimits) -> None:
        if jax.process_count() == 1:
            return
        asked = {**asdict(options), "hf_overrides": dict(hf_overrides), "seed": seed}
        facts = agreement.facts_of_engine(asked, folder)
        facts |= agreement.facts_of_values(asdict(limits), "engine ")
        agreement.agree_without_group(facts, _LIKE_HOSTS)

    return check


def find_folder(model: str | Path | None, *, download: bool) -> Path:
    """The folder of a model, None being the shipped one; of a preset, one that does not exist.

    Raises:
        UserError: there is none of that name.
    """
    if model is None:
        return small_model.folder()
    folder = Path(model)
    if folder.exists() or find_preset(str(model)) is not None:
        return folder
    if hub.is_hub_name(str(model)):
        return hub.find(str(model), download=download)
    raise UserError(
        f"{model}: no such folder, and no preset of that name",
        f"Presets: {_preset_list()}",
        EXIT_USAGE,
    )


def _preset_list() -> str:
    """Every preset, those of architectures that can't run yet marked."""
    names = []
    for name in preset_names():
        preset = find_preset(name)
        architectures = preset.hf_config["architectures"] if preset else None
        runs = isinstance(architectures, list) and architectures[0] in SUPPORTED
        names.append(name if runs else f"{name} (not supported yet)")
    return ", ".join(names)


def _load_folder(
    folder: Path,
    name: str,
    config: ModelConfig,
    weights: Weights,
    options: EngineOptions,
    report: Report,
    check_limits: CheckLimits,
) -> LoadedModel:
    for group, names in weights.unused.items():
        report(f"not used: {len(names)} tensors, {group}, e.g. {names[0]}")
    tokenizer = load_tokenizer(folder, config.vocab_size)
    chat_template = load_chat_template(folder)
    generation = folder / "generation_config.json"
    generation_config = read_json(generation, "generation_config") if generation.exists() else {}
    runtime_options, limits, spec, placement = _checked(config, options, report, check_limits)
    report(f"reading {weights.num_bytes / 1e6:,.1f} MB from {name}")
    return LoadedModel(
        config=config,
        runtime=runtime_options,
        limits=limits,
        state_spec=spec,
        model=load_model(config, runtime_options, weights, lambda _done, _total: None, placement),
        placement=placement,
        tokenizer=tokenizer,
        chat_template=chat_template,
        generation_config=generation_config,
        name=name,
    )


def _checked(
    config: ModelConfig, options: EngineOptions, report: Report, check_limits: CheckLimits
) -> tuple[RuntimeOptions, EngineLimits, StateSpec, Placement | None]:
    """The choices in force, reported, after checking that they fit into memory."""
    processes = jax.process_count()
    options = options.resolved(config, jax.device_count(), processes)
    mesh = options.mesh_shape
    placement = Placement(config, mesh) if max(mesh.num_devices, processes) > 1 else None
    runtime_options = options.runtime(config, runtime.platform())
    plan = plan_memory(config, runtime_options, options)
    runtime.check_fits(plan.needs, options.memory_fraction, mesh.num_devices)
    for line in _in_words(config, runtime_options, plan.limits, options):
        report(line)
    if placement is not None:
        choices = config.moe.num_experts_per_token
        how = expert_exchange.in_words(runtime_options.parallel, choices, runtime.platform())
        where = f"{mesh.num_devices} of {jax.device_count()} devices"
        where += f" in {processes} processes" * (processes > 1)
        report(f"mesh {mesh}: {where}; {how}; each has")
    report(_memory_in_words(plan))
    check_limits(plan.limits)
    return runtime_options, plan.limits, plan.spec, placement


def _in_words(
    config: ModelConfig,
    runtime_options: RuntimeOptions,
    limits: EngineLimits,
    options: EngineOptions,
) -> tuple[str, str]:
    """The model and its numbers; the engine and its sizes."""
    sequences = f"{limits.max_num_seqs} sequence{'s' * (limits.max_num_seqs != 1)}"
    tokens = f"{limits.max_model_len} token{'s' * (limits.max_model_len != 1)}"
    decay = "" if config.lightning is None else f", decay layer offset {config.decay_layer_offset}"
    return (
        f"{config.architecture}: {sum(p.size for p in describe(config)) / 1e6:.1f} M parameters, "
        f"{runtime_options.dtype}, state {options.state_dtype}, "
        f"rope {runtime_options.rotated_dtype}",
        f"{sequences} of {tokens}, prefill chunk {limits.prefill_chunk}{decay}, "
        f"kernels {options.kernels} on {runtime.platform()}",
    )


def _memory_in_words(plan: MemoryPlan) -> str:
    """What is about to be allocated: bytes, slots and pages."""
    limits = plan.limits
    full = limits.max_num_seqs * limits.pages_a_sequence
    slots = f"{limits.max_num_seqs} slot{'s' * (limits.max_num_seqs != 1)}"
    pages = f"{limits.num_pages} page{'s' * (limits.num_pages != 1)}"
    pages += f" of {full}" * (limits.num_pages < full)
    weights, recurrent, cache, temporaries = (
        f"{size / 1e6:,.1f} MB" for size in plan.needs.values()
    )
    return f"weights {weights}, {slots} {recurrent}, {pages} {cache}, temporaries ~{temporaries}"
