"""What a config.json means: dispatch, defaults, spellings, overrides and warnings.

Rope keys have test_config_rope.py, refusals test_config_refusals.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_configs import ABSENT, BASES, LINEAR_V2, V2, V2_5, changed, read

from bailing_jax.config import ConfigWarning, ModelConfig, Rope
from bailing_jax.errors import EXIT_USAGE, UserError

# ---- dispatch


@pytest.mark.parametrize(
    ("name", "means"),
    [
        (V2, V2),
        (LINEAR_V2, LINEAR_V2),
        ("BailingMoELinearForCausalLM", LINEAR_V2),
        ("BailingMoeLinearForCausalLM", LINEAR_V2),
        (V2_5, V2_5),
    ],
)
# Trap T14: model_type is ambiguous, so it must not matter once architectures is there.
@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_hybrid", "llama", ABSENT])
def test_architectures_decide_whatever_model_type_says(
    name: str, means: str, model_type: object
) -> None:
    config = read(means, architectures=[name], model_type=model_type)
    assert config.architecture == means
    assert (config.mla is not None) == (means == V2_5)
    assert (config.gqa is not None) == (means != V2_5)
    assert (config.lightning is not None) == (means != V2)


@pytest.mark.parametrize("architectures", [ABSENT, None, []])
@pytest.mark.parametrize(
    ("means", "changes"),
    [
        (V2_5, {"model_type": "bailing_hybrid"}),
        (LINEAR_V2, {"model_type": "bailing_moe_linear"}),
        (V2, {"model_type": "bailing_moe_v2", "n_group": ABSENT, "topk_group": ABSENT}),
        (V2, {"model_type": "bailing_moe"}),
        (
            V2,
            {
                "model_type": "bailing_moe",
                "n_group": ABSENT,
                "topk_group": ABSENT,
                "moe_router_enable_expert_bias": True,
            },
        ),
    ],
)
def test_without_architectures_the_keys_decide(
    architectures: object, means: str, changes: dict[str, object]
) -> None:
    assert read(means, architectures=architectures, **changes).architecture == means


# ---- fields and defaults


def test_every_field_arrives() -> None:
    config = read(V2_5, num_nextn_predict_layers=1, decay_layer_offset=1, linear_silu=True)
    assert config.lightning is not None
    assert config.mla is not None
    got = {
        **{k: v for k, v in vars(config).items() if isinstance(v, int | float | str | tuple)},
        **{f"moe.{k}": v for k, v in vars(config.moe).items()},
        **{f"lightning.{k}": v for k, v in vars(config.lightning).items()},
        **{f"mla.{k}": v for k, v in vars(config.mla).items()},
    }
    assert config.gqa is None
    assert got == {
        "architecture": V2_5,
        "vocab_size": 97,
        "hidden_size": 56,
        "num_layers": 7,
        "layer_group_size": 3,
        "norm_eps": 1e-6,
        "max_positions": 4096,
        "tie_embeddings": False,
        "num_dense_layers": 1,
        "dense_width": 44,
        "num_mtp_layers": 1,
        "decay_layer_offset": 1,
        "eos_token_ids": (95,),
        "checkpoint_dtype": "bfloat16",
        "moe.num_experts": 12,
        "moe.num_experts_per_token": 5,
        "moe.num_groups": 4,
        "moe.num_kept_groups": 2,
        "moe.expert_width": 9,
        "moe.shared_width": 9,
        "moe.scaling_factor": 2.5,
        "lightning.num_heads": 6,
        "lightning.head_dim": 20,
        "lightning.num_norm_groups": 4,
        "lightning.use_silu": True,
        "lightning.use_qk_norm": True,
        "lightning.rope": Rope(600_000.0, 10, None),
        "lightning.qkv_bias": False,
        "lightning.output_bias": False,
        "mla.num_heads": 6,
        "mla.q_lora_rank": 23,
        "mla.kv_lora_rank": 31,
        "mla.nope_dim": 13,
        "mla.rope_dim": 8,
        "mla.value_dim": 11,
        "mla.rope": Rope(600_000.0, 8, None),
        "mla.bias": False,
    }


@pytest.mark.parametrize("absent", [ABSENT, None])
@pytest.mark.parametrize(
    ("key", "field", "default"),
    [
        ("tie_word_embeddings", "tie_embeddings", False),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ("max_position_embeddings", "max_positions", 32768),
        ("num_nextn_predict_layers", "num_mtp_layers", 0),
        ("decay_layer_offset", "decay_layer_offset", 0),
        ("first_k_dense_replace", "num_dense_layers", 1),
        ("eos_token_id", "eos_token_ids", ()),
    ],
)
def test_an_absent_key_and_null_take_the_default(
    absent: object, key: str, field: str, default: object
) -> None:
    assert getattr(read(V2_5, **{key: absent}), field) == default


@pytest.mark.parametrize("head_dim", [ABSENT, None, 0])
def test_t23_head_dim_absent_or_zero_is_hidden_over_heads(head_dim: object) -> None:
    config = read(V2, head_dim=head_dim, hidden_size=6 * 18)
    assert config.gqa is not None
    assert config.gqa.head_dim == 18


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({}, False),
        ({"linear_silu": False}, False),
        ({"linear_silu": True}, True),
        ({"use_linear_silu": True}, True),
        ({"use_linear_silu": False, "linear_silu": True}, True),
        ({"use_linear_silu": True, "linear_silu": False}, True),
    ],
)
def test_either_silu_key_switches_it_on(keys: dict[str, object], want: bool) -> None:
    lightning = read(LINEAR_V2, **keys).lightning
    assert lightning is not None
    assert lightning.use_silu is want


def test_linear_rope_false_takes_the_rope_of_lightning_layers_only() -> None:
    config = read(LINEAR_V2, linear_rope=False)
    assert config.lightning is not None
    assert config.lightning.rope is None
    assert config.gqa is not None
    assert config.gqa.rope == Rope(600_000.0, 10, None)


def test_a_dense_width_is_read_only_where_a_layer_is_dense() -> None:
    assert read(V2, first_k_dense_replace=0, intermediate_size=ABSENT).dense_width == 0
    assert read(V2, first_k_dense_replace=7).dense_width == 44


@pytest.mark.parametrize(
    ("shared", "each", "want"),
    [
        (1, ABSENT, 9),
        (3, ABSENT, 27),
        (3, 14, 42),
        (2, None, 18),
        (2, 0, 18),
        (0, 14, 0),
        (None, ABSENT, 0),
        (ABSENT, 14, 0),
    ],
)
def test_shared_width_is_experts_times_their_width(shared: object, each: object, want: int) -> None:
    config = read(V2, num_shared_experts=shared, moe_shared_expert_intermediate_size=each)
    assert config.moe.shared_width == want


@pytest.mark.parametrize("groups", [ABSENT, None, 0, 1])
def test_no_groups_means_one_group(groups: object) -> None:
    kept = 1 if groups == 1 else 2  # without n_group there is nothing for topk_group to keep
    moe = read(V2, n_group=groups, topk_group=kept, num_experts_per_tok=12).moe
    assert (moe.num_groups, moe.num_kept_groups, moe.num_experts_per_token) == (1, 1, 12)


def test_one_expert_a_token_is_allowed() -> None:
    assert read(V2, num_experts_per_tok=1).moe.num_experts_per_token == 1


@pytest.mark.parametrize(
    ("value", "want"), [(95, (95,)), ([92, 95], (92, 95)), ([], ()), (0, (0,))]
)
def test_t26_eos_is_one_id_or_several(value: object, want: tuple[int, ...]) -> None:
    assert read(V2, eos_token_id=value).eos_token_ids == want


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": ABSENT, "dtype": "float32"}, "float32"),
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, "float32"),
        ({"torch_dtype": ABSENT}, "bfloat16"),
    ],
)
def test_dtype_under_its_new_and_its_old_name(keys: dict[str, object], want: str) -> None:
    assert read(V2, **keys).checkpoint_dtype == want


def test_sizes_may_be_as_large_as_an_int32() -> None:
    assert read(V2, max_position_embeddings=2**31 - 1).max_positions == 2**31 - 1


# ---- overrides, unknown keys, files

OVERRIDES = {
    "vocab_size": 101,
    "hidden_size": 60,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 3,
    "intermediate_size": 45,
    "num_attention_heads": 4,
    "head_dim": 28,
    "use_qk_norm": False,
    "use_bias": True,
    "use_qkv_bias": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "rope_scaling": {"type": "yarn", "factor": 2.0},
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 4,
    "moe_intermediate_size": 10,
    "moe_shared_expert_intermediate_size": 7,
    "num_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [94, 95],
    "torch_dtype": "float32",
    "layer_group_size": 4,
    "group_norm_size": 2,
    "linear_silu": True,
    "linear_rope": False,
    "decay_layer_offset": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 33,
    "qk_nope_head_dim": 15,
    "qk_rope_head_dim": 10,
    "v_head_dim": 12,
}


@pytest.mark.parametrize(("key", "value"), OVERRIDES.items(), ids=list(OVERRIDES))
def test_an_override_replaces_the_files_key(key: str, value: object) -> None:
    plain = read(V2_5)
    overridden = ModelConfig.from_hf(BASES[V2_5], {key: value})
    assert overridden == read(V2_5, **{key: value})
    assert overridden != plain


def test_a_bad_override_is_not_blamed_on_the_file() -> None:
    with pytest.raises(UserError, match=r"^hf_overrides: head_dim = 'x'; allowed: ") as caught:
        ModelConfig.from_hf(BASES[V2_5], {"head_dim": "x"})
    assert caught.value.options == {"hf_overrides"}
    with pytest.raises(UserError, match=r"^config\.json: head_dim = 'x'; allowed: ") as caught:
        ModelConfig.from_hf({**BASES[V2_5], "head_dim": "x"}, {"hidden_size": 64})
    assert not caught.value.options


def test_an_override_may_name_another_architecture() -> None:
    assert ModelConfig.from_hf(BASES[V2_5], {"architectures": [V2_5]}) == read(V2_5)
    with pytest.raises(UserError, match="BailingMoeV3ForCausalLM"):
        ModelConfig.from_hf(BASES[V2_5], {"architectures": ["BailingMoeV3ForCausalLM"]})


@pytest.mark.parametrize("in_the_file_too", [False, True])
def test_unknown_overrides_are_refused_all_at_once(in_the_file_too: bool) -> None:
    overrides = {"num_layers": 3, "hidden_size": 60, "rope_base": 1e4}
    config = changed(V2, **({"num_layers": 4} if in_the_file_too else {}))
    with pytest.raises(UserError, match=r"hf_overrides: .*num_layers, rope_base") as caught:
        ModelConfig.from_hf(config, overrides)
    assert caught.value.exit_code == EXIT_USAGE
    assert "hidden_size" not in caught.value.message


def test_s08_unknown_keys_give_one_warning_that_lists_them_all() -> None:
    block = {"type": "yarn", "factor": 2.0, "extrapolation_factor": 1.0}
    config = changed(V2, zebra=1, aardvark=None, rope_scaling=block)
    with pytest.warns(ConfigWarning) as caught:
        read_config = ModelConfig.from_hf(config, where="here/config.json")
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "here/config.json: unknown keys, not used: aardvark, rope_scaling.extrapolation_factor, "
        "zebra"
    )
    del block["extrapolation_factor"]
    assert read_config == read(V2, rope_scaling=block)


def test_s08_remote_code_and_training_keys_change_nothing() -> None:
    inert = {
        "auto_map": {"AutoModel": "evil--module.Model"},
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "use_cache": False,
        "transformers_version": "9.9",
        "pad_token_id": 96,
        "seq_aux": True,
    }
    assert read(V2, **inert) == read(V2)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_file_or_its_folder_is_the_same_config(tmp_path: Path, as_folder: bool) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASES[V2_5]))
    assert ModelConfig.from_hf(tmp_path if as_folder else str(path)) == read(V2_5)


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b'"x"', b"\xff\xfe{}", b"[" * 200_000]
)
def test_s08_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(path)
    assert caught.value.exit_code == EXIT_USAGE
    assert str(path) in caught.value.message
