"""The keys of a Hugging Face config.json: what each must be, and what is refused.

The only reader of these keys. It dispatches on `architectures`, because `model_type` is
ambiguous: it names two architectures twice. A key with a value this package does not implement
is refused by name; a key nobody has heard of is left for `Fields.unknown`.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

from bailing_jax.config import (
    LINEAR_V2,
    SUPPORTED,
    V2,
    V2_5,
    ConfigWarning,
    Gqa,
    Lightning,
    Mla,
    ModelConfig,
    Moe,
    Rope,
    Yarn,
)
from bailing_jax.config_fields import Fields

_V1 = "BailingMoeForCausalLM"
_V3 = "BailingMoeV3ForCausalLM"
_ALIASES = {"BailingMoELinearForCausalLM": LINEAR_V2, "BailingMoeLinearForCausalLM": LINEAR_V2}

_V3_KEYS = (
    "short_conv_kernel_size",
    "no_kda_lora",
    "use_kda_lora",
    "kda_safe_gate",
    "kda_lower_bound",
    "expert_swiglu_limit_list",
    "share_expert_swiglu_limit_list",
    "gated_attention_proj_granularity_type",
)
_NO_EFFECT = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "embedding_dropout",
    "hidden_dropout",
    "initializer_range",
    "max_window_layers",
    "model_type",
    "mtp_loss_scaling_factor",
    "output_dropout",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "seq_aux",
    "transformers_version",
    "use_cache",
)
_DTYPES = ("float32", "bfloat16", "float16")
# Far beyond every release (80 layers, 64 heads, 512 experts). Each of these makes objects or table
# rows before any weight is read, so a damaged file must not ask for billions of them.
_MAX_LAYERS = 4096
_MAX_HEADS = 2**16
_MAX_EXPERTS = 2**16


def _architecture(fields: Fields) -> str:
    """The architecture's canonical name; unsupported ones are refused by name."""
    names = fields.get("architectures")
    model_type = fields.get("model_type")
    if isinstance(names, list) and names and isinstance(names[0], str):
        name = _ALIASES.get(names[0], names[0])
    elif names is not None and names != []:
        raise fields.refuse("architectures", names, "a list with one name")
    elif any(key in fields.values for key in _V3_KEYS[:5]):
        name = _V3
    elif model_type == "bailing_hybrid":
        name = V2_5
    elif model_type == "bailing_moe_linear":
        name = LINEAR_V2
    elif model_type in ("bailing_moe", "bailing_moe_v2"):
        is_v2 = fields.has("moe_router_enable_expert_bias") or fields.has("n_group")
        name = V2 if is_v2 or model_type == "bailing_moe_v2" else _V1
    else:
        raise fields.refuse("model_type", model_type, "a Bailing model (architectures is absent)")
    if name in SUPPORTED:
        return name
    known = name in (_V1, _V3) or name.startswith("Bailing")
    raise fields.refuse(
        "architectures",
        name,
        ", ".join(SUPPORTED),
        f"{name} is recognised but not supported yet." if known else "Not a Bailing model.",
    )


def read(fields: Fields) -> ModelConfig:
    """The config these keys describe; see `ModelConfig.from_hf` for what is raised."""
    name = _architecture(fields)
    _refuse_unsupported(fields, name)
    num_layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    num_dense = fields.integer("first_k_dense_replace", 1, low=0)
    if num_dense > num_layers:
        raise fields.refuse("first_k_dense_replace", num_dense, f"0 to {num_layers} (the layers)")
    hybrid = name != V2
    if not hybrid:
        fields.ignored(("layer_group_size", "group_norm_size", "linear_silu", "use_linear_silu"))
    heads = _read_heads(fields)
    return ModelConfig(
        architecture=name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=num_layers,
        layer_group_size=fields.integer("layer_group_size") if hybrid else None,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_positions=fields.integer("max_position_embeddings", 32768),
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        num_dense_layers=num_dense,
        dense_width=_dense_width(fields, num_dense),
        moe=_read_moe(fields),
        lightning=_read_lightning(fields, heads) if hybrid else None,
        gqa=None if name == V2_5 else _read_gqa(fields, heads),
        mla=_read_mla(fields, heads) if name == V2_5 else None,
        num_mtp_layers=fields.integer("num_nextn_predict_layers", 0, low=0),
        decay_layer_offset=fields.integer("decay_layer_offset", 0, low=0, high=1),
        eos_token_ids=_eos_token_ids(fields),
        checkpoint_dtype=_checkpoint_dtype(fields),
    )


def _refuse_unsupported(fields: Fields, name: str) -> None:
    """Refuse what is recognised but means another computation than the one implemented."""
    fields.ignored(_NO_EFFECT)
    fields.fixed("quantization_config", (), "Quantised checkpoints can't be read yet.")
    fields.fixed("layers_block_type", (), "The layer kinds follow from layer_group_size.")
    fields.fixed("full_attention_type", ("mla",) if name == V2_5 else ())
    fields.fixed("lightning_layerwise_decay", (True,))
    for key in _V3_KEYS:
        fields.fixed(key, (), f"This key belongs to {_V3}, but architectures says {name}.")
    for key in ("score_function", "scoring_func"):
        fields.fixed(key, ("sigmoid",))
    fields.fixed("topk_method", ("noaux_tc",))
    fields.fixed("router_dtype", ("fp32", "float32"))
    fields.fixed("hidden_act", ("silu",))
    fields.fixed("rope_interleave", (True,) if name == V2_5 else (False,))
    for key in ("norm_topk_prob", "moe_router_enable_expert_bias", "use_rmsnorm"):
        fields.fixed(key, (True,))
    for key in (
        "multi_gate",
        "norm_head",
        "norm_softmax",
        "scale_router_input",
        "up_proj_norm",
        "use_mla_nope",
        "use_nGPT",
        "use_sliding_window",
        "value_norm",
    ):
        fields.fixed(key, (False,))
    # A width beside `use_sliding_window: false` is a leftover of the exporter.
    if fields.boolean("use_sliding_window", True):
        fields.fixed("sliding_window", ())
    else:
        fields.ignored(("sliding_window",))


def _dense_width(fields: Fields, num_dense: int) -> int:
    if num_dense:
        return fields.integer("intermediate_size")
    fields.ignored(("intermediate_size",))
    return 0


def _checkpoint_dtype(fields: Fields) -> str:
    """`dtype`, or `torch_dtype` in older files."""
    keys = [key for key in ("dtype", "torch_dtype") if fields.has(key)]
    if not keys:
        return "bfloat16"
    value = fields.get(keys[0])
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if not isinstance(name, str) or name not in _DTYPES:
        raise fields.refuse(keys[0], value, ", ".join(_DTYPES))
    return name


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    ids = tuple(i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
    if len(ids) != len(values):
        raise fields.refuse("eos_token_id", value, "a token id or a list of them")
    return ids


@dataclass(frozen=True)
class _Heads:
    """What the attention kinds of one model share."""

    num_heads: int
    head_dim: int
    use_qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    rope: Rope


def _read_heads(fields: Fields) -> _Heads:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads", high=_MAX_HEADS)
    head_dim = fields.integer("head_dim", 0, low=0)
    if head_dim == 0:
        if hidden_size % num_heads:
            raise fields.refuse("num_attention_heads", num_heads, f"a divisor of {hidden_size}")
        head_dim = hidden_size // num_heads
    return _Heads(
        num_heads=num_heads,
        head_dim=head_dim,
        use_qk_norm=fields.boolean("use_qk_norm", True),
        qkv_bias=fields.boolean("use_qkv_bias", False),
        output_bias=fields.boolean("use_bias", False),
        rope=_read_rope(fields, head_dim),
    )


def _read_gqa(fields: Fields, heads: _Heads) -> Gqa:
    num_kv_heads = fields.integer("num_key_value_heads")
    if heads.num_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", num_kv_heads, f"divisors of {heads.num_heads}")
    return Gqa(
        num_heads=heads.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=heads.head_dim,
        use_qk_norm=heads.use_qk_norm,
        rope=heads.rope,
        qkv_bias=heads.qkv_bias,
        output_bias=heads.output_bias,
    )


def _read_lightning(fields: Fields, heads: _Heads) -> Lightning:
    num_norm_groups = fields.integer("group_norm_size")
    width = heads.num_heads * heads.head_dim
    if width % num_norm_groups:
        raise fields.refuse(
            "group_norm_size", num_norm_groups, f"divisors of {width} (heads x head_dim)"
        )
    # Releases use either name for the same switch.
    use_silu = [fields.boolean(key, False) for key in ("linear_silu", "use_linear_silu")]
    return Lightning(
        num_heads=heads.num_heads,
        head_dim=heads.head_dim,
        num_norm_groups=num_norm_groups,
        use_silu=any(use_silu),
        use_qk_norm=heads.use_qk_norm,
        rope=heads.rope if fields.boolean("linear_rope", True) else None,
        qkv_bias=heads.qkv_bias,
        output_bias=heads.output_bias,
    )


def _read_mla(fields: Fields, heads: _Heads) -> Mla:
    fields.ignored(("num_key_value_heads",))
    nope_dim, rope_dim = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise fields.refuse("qk_rope_head_dim", rope_dim, "an even number")
    fields.fixed("qk_head_dim", (nope_dim + rope_dim,))
    return Mla(
        num_heads=heads.num_heads,
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=fields.integer("v_head_dim"),
        # partial_rotary_factor never applies here: all of rope_dim is rotated.
        rope=dataclasses.replace(heads.rope, num_dims=rope_dim),
        bias=heads.qkv_bias,
    )


def _read_moe(fields: Fields) -> Moe:
    num_experts = fields.integer("num_experts", high=_MAX_EXPERTS)
    stated_groups = fields.integer("n_group", 0, low=0)
    num_groups = stated_groups or 1
    if num_experts % num_groups or (num_groups > 1 and num_experts // num_groups < 2):
        raise fields.refuse(
            "n_group", num_groups, f"divisors of {num_experts} with two or more experts a group"
        )
    # Without n_group, topk_group has nothing to keep; with several groups it must be there.
    fields.ignored(("topk_group",))
    default = 1 if num_groups == 1 else None
    num_kept = fields.integer("topk_group", default, high=num_groups) if stated_groups else 1
    chosen = fields.integer("num_experts_per_tok")
    reachable = num_kept * (num_experts // num_groups)
    if chosen > reachable:
        raise fields.refuse("num_experts_per_tok", chosen, f"1 to {reachable} (kept experts)")
    expert_width = fields.integer("moe_intermediate_size")
    shared_width = fields.integer("moe_shared_expert_intermediate_size", 0, low=0) or expert_width
    return Moe(
        num_experts=num_experts,
        num_experts_per_token=chosen,
        num_groups=num_groups,
        num_kept_groups=num_kept,
        expert_width=expert_width,
        shared_width=shared_width * fields.integer("num_shared_experts", 0, low=0),
        scaling_factor=fields.number("routed_scaling_factor", 1.0),
    )


def _read_rope(fields: Fields, head_dim: int) -> Rope:
    """RoPE of the GQA and lightning heads, from the top level and both nested styles."""
    blocks: dict[str, object] = {}
    origin: dict[str, str] = {}
    for key in ("rope_scaling", "rope_parameters"):
        block = fields.get(key)
        if block is None:
            continue
        if not isinstance(block, dict):
            raise fields.refuse(key, block, "null or an object")
        for name, value in block.items():
            origin.setdefault(name, key)
            if blocks.setdefault(name, value) != value:
                raise fields.refuse(f"{key}.{name}", value, f"{blocks[name]!r}, as in rope_scaling")
    nested = Fields(blocks, f"{fields.where}: rope_scaling/rope_parameters")
    theta = _agreeing_number(fields, nested, "rope_theta")
    if theta is None or theta <= 1:
        raise fields.refuse("rope_theta", theta, "a number > 1 (no base is ever assumed)")
    factor = _agreeing_number(fields, nested, "partial_rotary_factor")
    rotary_dim = fields.optional_integer("rotary_dim")
    num_dims = rotary_dim or head_dim
    if factor is not None:
        num_dims = int(head_dim * factor)
    if num_dims < 2 or num_dims % 2 or num_dims > head_dim:
        key = "partial_rotary_factor" if factor is not None else "rotary_dim"
        raise fields.refuse(key, factor or rotary_dim, f"even, 2 to head_dim = {head_dim}")
    yarn = _read_yarn(nested, fields.integer("max_position_embeddings", 32768))
    fields.add_unknown(f"{origin[name]}.{name}" for name in nested.unknown())
    return Rope(theta=theta, num_dims=num_dims, yarn=yarn)


def _agreeing_number(fields: Fields, nested: Fields, key: str) -> float | None:
    outer, inner = fields.optional_number(key), nested.optional_number(key)
    if outer is not None and inner is not None and outer != inner:
        raise nested.refuse(key, inner, f"{outer}, as at the top level")
    return outer if inner is None else inner


def _read_yarn(nested: Fields, max_positions: int) -> Yarn | None:
    keys = [key for key in ("rope_type", "type") if nested.has(key)]
    kinds = [nested.get(key) for key in keys]
    if kinds[1:] and kinds[0] != kinds[1]:
        raise nested.refuse(keys[1], kinds[1], f"{kinds[0]!r}, as {keys[0]} says")
    if not kinds and nested.has("factor"):
        raise nested.refuse("rope_type", None, "default, yarn (there is a factor)")
    if not kinds or kinds[0] == "default":
        nested.ignored(("factor",))
        return None
    if kinds[0] != "yarn":
        raise nested.refuse(keys[0], kinds[0], "default, yarn")
    nested.fixed("truncate", (True,))
    factor = nested.number("factor")
    original = nested.integer("original_max_position_embeddings", max_positions)
    if nested.has("original_max_position_embeddings") and factor != max_positions / original:
        warnings.warn(
            f"{nested.where}: YaRN factor {factor} is used as given, though "
            f"max_position_embeddings / original_max_position_embeddings is "
            f"{max_positions / original:g}",
            ConfigWarning,
            stacklevel=2,
        )
    return Yarn(
        factor=factor,
        original_max_positions=original,
        beta_fast=nested.number("beta_fast", 32.0),
        beta_slow=nested.number("beta_slow", 1.0),
        mscale=nested.optional_number("mscale", zero=True),
        mscale_all_dim=nested.optional_number("mscale_all_dim", zero=True),
        attention_factor=nested.optional_number("attention_factor"),
    )
