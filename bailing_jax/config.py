"""ModelConfig: what a checkpoint's config.json says, typed, checked and in plain words.

`ModelConfig.from_hf` is the way in; `hf_config.py` knows the Hugging Face keys and what each
must be. Sizes are counts of elements, `*_dim` is per head, `*_width` is of a feed-forward layer.
Knows nothing of arrays or devices.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bailing_jax.errors import EXIT_USAGE, UserError

V2 = "BailingMoeV2ForCausalLM"
LINEAR_V2 = "BailingMoeLinearV2ForCausalLM"
V2_5 = "BailingMoeV2_5ForCausalLM"
SUPPORTED = (V2, LINEAR_V2, V2_5)
_LANES = 128  # of a row of a TPU's memory


class ConfigWarning(UserWarning):
    """A config that runs, with something a reader of the log should know."""


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (spec of the `rope_scaling` block)."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `num_dims` channels of a head, with base `theta`."""

    theta: float
    num_dims: int
    yarn: Yarn | None


@dataclass(frozen=True)
class Lightning:
    """Lightning linear attention: every head has its own key and value head."""

    num_heads: int
    head_dim: int
    num_norm_groups: int
    use_silu: bool
    use_qk_norm: bool
    rope: Rope | None
    qkv_bias: bool
    output_bias: bool

    @property
    def state_width(self) -> int:
        """Columns a TPU's slots hold of a head's state: V, and zeros up to whole lanes.

        As of `Mla.page_width`: with other columns XLA puts K or the slots along the lanes, which
        the kernels can't read.
        """
        return -(-self.head_dim // _LANES) * _LANES


@dataclass(frozen=True)
class Gqa:
    """Grouped-query softmax attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    use_qk_norm: bool
    rope: Rope
    qkv_bias: bool
    output_bias: bool


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention; `rope` rotates the separate `rope_dim` channels."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    bias: bool

    @property
    def page_width(self) -> int:
        """Channels a TPU's pages hold of a token: latent and RoPE, and zeros up to whole lanes.

        Its memory has rows of 128 lanes. For another width the compiler would rather put the pages
        along them, and lay out the whole pool anew for each step.
        """
        return -(-(self.kv_lora_rank + self.rope_dim) // _LANES) * _LANES


@dataclass(frozen=True)
class Moe:
    """Routed experts; `num_groups` is 1 when routing is not limited to groups."""

    num_experts: int
    num_experts_per_token: int
    num_groups: int
    num_kept_groups: int
    expert_width: int
    shared_width: int
    scaling_factor: float


@dataclass(frozen=True)
class ModelConfig:
    """One model. Exactly one of `gqa` and `mla` is set; `lightning` is None for V2."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    layer_group_size: int | None
    norm_eps: float
    max_positions: int
    tie_embeddings: bool
    num_dense_layers: int
    dense_width: int
    moe: Moe
    lightning: Lightning | None
    gqa: Gqa | None
    mla: Mla | None
    num_mtp_layers: int
    decay_layer_offset: int
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str

    @classmethod
    def from_hf(
        cls,
        source: Mapping[str, object] | str | Path,
        overrides: Mapping[str, object] | None = None,
        *,
        where: str = "config.json",
    ) -> ModelConfig:
        """Read config.json: its content, its path or the folder it lies in.

        Args:
            source: the parsed object, or where it is.
            overrides: keys of config.json (and `decay_layer_offset`) that replace the file's.
            where: what messages call a parsed object.

        Raises:
            UserError: unsupported architecture, missing key, or a value that is wrong,
                contradictory or not implemented; names key, value and what is allowed.
        """
        from bailing_jax.config_fields import Fields
        from bailing_jax.hf_config import read

        values = source if isinstance(source, Mapping) else _read_json(Path(source))
        where = where if isinstance(source, Mapping) else str(source)
        fields = Fields({**values, **(overrides or {})}, where, (overrides or {}).keys())
        config = read(fields)
        unknown = fields.unknown()
        strangers = sorted(set(unknown) & set(overrides or {}))
        if strangers:
            raise UserError(
                f"hf_overrides: unknown name {', '.join(strangers)}",
                "Use config.json's own names (or decay_layer_offset).",
                EXIT_USAGE,
                options=("hf_overrides",),
            )
        if unknown:
            warnings.warn(
                f"{where}: unknown keys, not used: {', '.join(unknown)}",
                ConfigWarning,
                stacklevel=2,
            )
        return config


def _read_json(path: Path) -> Mapping[str, object]:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON: {error}", exit_code=EXIT_USAGE
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object", exit_code=EXIT_USAGE)
    return values
