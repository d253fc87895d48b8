"""The model a plan is for: its config, and its parameters counted by kind.

A folder's config.json or a preset is all that is read. Layers of a kind have equal parameters, so
one of each kind and their number stand for all: 80 layers of 256 experts take no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.params import Param, describe
from bailing_jax.presets import find_preset, preset_names

Role = Literal["expert", "lookup", "head", "other"]
_EMBEDDING = "model.word_embeddings.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Kind:
    """Parameters that are alike.

    Attributes:
        param: one of them.
        count: how many there are.
        role: "expert": a stack of routed experts; "lookup": a table of which a step reads the rows
            of its tokens; "head": multiplied by the rows with logits only.
    """

    param: Param
    count: int
    role: Role


@dataclass(frozen=True)
class PlannedModel:
    """A model without weights.

    Attributes:
        name: folder or preset.
        remark: where the config is from and what of it is assumed.
        config: what it says.
        kinds: its parameters.
    """

    name: str
    remark: str
    config: ModelConfig
    kinds: tuple[Kind, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(kind.count * kind.param.size for kind in self.kinds)

    @property
    def num_active(self) -> int:
        """Elements that one token meets: all but the experts it is not sent to."""
        moe = self.config.moe
        return sum(
            kind.count * kind.param.size * moe.num_experts_per_token // moe.num_experts
            if kind.role == "expert"
            else kind.count * kind.param.size
            for kind in self.kinds
        )


def planned(name: str, config: ModelConfig, remark: str = "") -> PlannedModel:
    """A model of that config."""
    kinds: dict[object, Kind] = {}
    for param in describe(config):
        role = _role(config, param)
        source = param.sources[0]
        key = (param.shape, param.axes, param.dtype, role, source.order, source.index is None)
        found = kinds.get(key)
        # The sources of the other experts are of no interest here.
        kinds[key] = (
            Kind(replace(param, sources=(source,)), 1, role)
            if found is None
            else replace(found, count=found.count + 1)
        )
    return PlannedModel(name, remark, config, tuple(kinds.values()))


def _role(config: ModelConfig, param: Param) -> Role:
    if param.axes[0] == "experts":
        return "expert"
    if param.path == _EMBEDDING:
        return "head" if config.tie_embeddings else "lookup"
    return "head" if param.path == _HEAD else "other"


def read(model: str, hf_overrides: Mapping[str, object] | None = None) -> PlannedModel:
    """A folder with a config.json, or a preset.

    Raises:
        UserError: neither is there, or the config is refused.
    """
    overrides = hf_overrides or {}
    folder = Path(model)
    if folder.exists():
        where = folder / "config.json" if folder.is_dir() else folder
        if not where.is_file():
            raise UserError(
                f"{folder}: no config.json",
                "Give a checkpoint's folder; only its config.json is read.",
                EXIT_USAGE,
            )
        return planned(model, ModelConfig.from_hf(where, overrides), "config.json of a folder")
    preset = find_preset(model)
    if preset is None:
        raise UserError(
            f"{model}: no such folder, and no preset of that name",
            f"Presets: {', '.join(preset_names())}",
            EXIT_USAGE,
        )
    config = ModelConfig.from_hf(preset.hf_config, overrides, where=preset.name)
    assumed = sorted(set(preset.assumed) - set(overrides))
    remark = f"a preset; assumed, not published: {', '.join(assumed)}" if assumed else "a preset"
    return planned(preset.name, config, remark)
