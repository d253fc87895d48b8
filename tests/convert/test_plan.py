"""Matching a checkpoint with a model: what pairs up, what is left aside, what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_configs import LINEAR_V2, V2, V2_5, changed, read
from random_checkpoints import tensor_shapes

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.params import describe
from convert.plan import Match, match
from convert.safetensors_file import TensorInfo

Tensors = dict[str, TensorInfo]
Shape = tuple[int, ...]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def info(name: str, shape: Shape, dtype: np.dtype = BFLOAT16) -> TensorInfo:
    return TensorInfo(
        name, dtype, shape, Path("a.safetensors"), 8, 8 + math.prod(shape) * dtype.itemsize
    )


def tensors_of(architecture: str, *, kv_a_bias: bool = False, **changes: object) -> Tensors:
    """The tensors of a release of this config, mtp layer included if it says so."""
    shapes = tensor_shapes(changed(architecture, **changes), kv_a_bias=kv_a_bias)
    return {name: info(name, shape) for name, shape in shapes.items()}


def refused(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The lines of the refusal, a problem each."""
    with pytest.raises(UserError) as caught:
        match(config, tensors, "some/folder")
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.hint
    first, *lines = caught.value.message.splitlines()
    assert first == f"some/folder: the tensors do not fit {config.architecture}:"
    return [line.strip() for line in lines]


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    """With `old` replaced in every name; at least one must hold it."""
    assert any(old in name for name in tensors)
    names = {name: name.replace(old, new) for name in tensors}
    return {names[n]: info(names[n], t.shape, t.dtype) for n, t in tensors.items()}


def filled(found: Match) -> dict[str, list[str | None]]:
    """Parameter path -> names of the tensors that fill it."""
    return {p.path: [t and t.name for _, t in pairs] for p, pairs in found.params}


def without(tensors: Tensors, pattern: str) -> Tensors:
    kept = {name: t for name, t in tensors.items() if not re.fullmatch(pattern, name)}
    assert len(kept) < len(tensors)
    return kept


def with_new(tensors: Tensors, shapes: Mapping[str, Shape] | Iterable[str]) -> Tensors:
    if not isinstance(shapes, Mapping):
        shapes = dict.fromkeys(shapes, (3,))
    assert not set(shapes) & set(tensors)
    return tensors | {name: info(name, shape) for name, shape in shapes.items()}


# ---- what fits


@pytest.mark.parametrize("architecture", [V2, LINEAR_V2, V2_5])
def test_every_parameter_gets_its_tensors(architecture: str) -> None:
    config, tensors = read(architecture), tensors_of(architecture)
    found = match(config, tensors, "")
    assert [param for param, _ in found.params] == list(describe(config))
    assert found.unused == {}
    used = {tensor.name for _, pairs in found.params for _, tensor in pairs if tensor is not None}
    assert used == set(tensors)
    for _, pairs in found.params:
        assert all(tensor is tensors[source.name] for source, tensor in pairs)


def test_num_bytes_counts_what_is_read() -> None:
    config, tensors = read(V2), tensors_of(V2, num_nextn_predict_layers=1)
    mtp = sum(t.nbytes for name, t in tensors.items() if name.startswith("model.layers.7."))
    assert match(config, tensors, "").num_bytes == sum(t.nbytes for t in tensors.values()) - mtp > 0


@pytest.mark.parametrize("alias", ["gate.e_score_correction_bias", "experts.expert_bias"])
def test_t21_the_routers_bias_has_three_names(alias: str) -> None:
    tensors = renamed(tensors_of(V2), "gate.expert_bias", alias)
    names = filled(match(read(V2), tensors, ""))
    assert names["model.layers.3.mlp.gate.expert_bias"] == [f"model.layers.3.mlp.{alias}"]


def test_latent_attention_may_call_its_output_o_proj() -> None:
    config = read(V2_5, use_qkv_bias=True)
    tensors = renamed(
        tensors_of(V2_5, use_qkv_bias=True), ".2.attention.dense.", ".2.attention.o_proj."
    )
    names = filled(match(config, tensors, ""))
    for part in ("weight", "bias"):
        path = f"model.layers.2.attention.dense.{part}"
        assert names[path] == [f"model.layers.2.attention.o_proj.{part}"]


@pytest.mark.parametrize(("architecture", "layer"), [(V2_5, 0), (LINEAR_V2, 2)])
def test_o_proj_means_something_else_in_other_attentions(architecture: str, layer: int) -> None:
    dense = f"model.layers.{layer}.attention.dense.weight"
    tensors = renamed(tensors_of(architecture), dense, dense.replace("dense", "o_proj"))
    assert [line.split()[0] for line in refused(read(architecture), tensors)] == [
        "missing:",
        "unexpected:",
    ]


def test_two_names_of_one_tensor_are_one_too_many() -> None:
    alias = "model.layers.4.mlp.gate.e_score_correction_bias"
    tensors = with_new(tensors_of(V2), {alias: (12,)})
    assert refused(read(V2), tensors) == [
        "unexpected: 1 x model.layers.*.mlp.gate.e_score_correction_bias, e.g. " + alias
    ]


@pytest.mark.parametrize("present", [True, False])
def test_a_biased_kv_a_proj_is_optional(present: bool) -> None:
    config = read(V2_5, use_qkv_bias=True)
    found = match(config, tensors_of(V2_5, use_qkv_bias=True, kv_a_bias=present), "")
    path = "model.layers.5.attention.kv_a_proj_with_mqa.bias"
    assert filled(found)[path] == [path if present else None]
    optional = [s.name for param, _ in found.params for s in param.sources if s.optional]
    assert optional == [path.replace("5", str(layer)) for layer in (2, 5, 6)]


# ---- what is left aside


@pytest.mark.parametrize("said", [0, 1])
@pytest.mark.parametrize("architecture", [V2, V2_5])
def test_t22_an_mtp_layer_is_not_used_whatever_the_config_says(
    architecture: str, said: int
) -> None:
    """num_nextn_predict_layers is overridden to 0 by many who serve without it."""
    tensors = tensors_of(architecture, num_nextn_predict_layers=1)
    tensors = with_new(tensors, ["model.mtp.norm.weight"])
    found = match(read(architecture, num_nextn_predict_layers=said), tensors, "")
    mtp = sorted(n for n in tensors if n.startswith(("model.layers.7.", "model.mtp")))
    assert found.unused == {"MTP (next-token prediction layers are not run)": tuple(mtp)}
    assert len(mtp) > 40
    plain = match(read(architecture), tensors_of(architecture), "")
    assert filled(found) == filled(plain)
    assert found.num_bytes == plain.num_bytes


def test_an_announced_mtp_layer_may_be_absent() -> None:
    assert match(read(V2, num_nextn_predict_layers=1), tensors_of(V2), "").unused == {}


def test_a_layer_too_many_is_no_mtp_layer() -> None:
    """A config with fewer layers than the checkpoint must not pass: only eh_proj makes it MTP."""
    tensors = tensors_of(V2, num_nextn_predict_layers=1)
    truncated = read(V2, num_hidden_layers=6)
    lines = refused(truncated, tensors)
    assert {line.split(" x ")[0].split(":")[0] for line in lines} == {"unexpected"}
    assert all("e.g. model.layers.6." in line for line in lines)
    without_eh_proj = without(tensors, r"model\.layers\.7\.eh_proj\.weight")
    assert all("e.g. model.layers.7." in line for line in refused(read(V2), without_eh_proj))


def test_eh_proj_inside_the_model_is_a_stranger() -> None:
    tensors = with_new(tensors_of(V2), {"model.layers.3.eh_proj.weight": (56, 112)})
    assert refused(read(V2), tensors) == [
        "unexpected: 1 x model.layers.*.eh_proj.weight, e.g. model.layers.3.eh_proj.weight"
    ]


def test_a_tied_head_stored_all_the_same_is_not_used() -> None:
    tensors = tensors_of(V2)
    found = match(read(V2, tie_word_embeddings=True), tensors, "")
    assert found.unused == {"head (tied to model.word_embeddings)": ("lm_head.weight",)}
    assert "lm_head.weight" not in filled(found)
    untied = without(tensors, "lm_head.weight")
    assert refused(read(V2), untied) == ["missing: 1 x lm_head.weight, e.g. lm_head.weight"]


def test_stored_buffers_are_not_used() -> None:
    buffers = [
        "model.layers.0.attention.rotary_emb.inv_freq",
        "model.layers.0.attention.slope",
        "model.rotary_emb.inv_freq",
    ]
    found = match(read(V2_5), with_new(tensors_of(V2_5), buffers), "")
    assert found.unused == {"buffers (computed from the config)": tuple(buffers)}


# ---- what is refused


@pytest.mark.parametrize("architecture", [V2, LINEAR_V2, V2_5])
def test_r110_no_tensor_may_be_missing(architecture: str) -> None:
    config, tensors = read(architecture), tensors_of(architecture)
    for name in tensors:
        pattern = re.sub(r"\d+", "*", name)
        rest = {other: t for other, t in tensors.items() if other != name}
        assert refused(config, rest) == [f"missing: 1 x {pattern}, e.g. {name}"]


def test_problems_are_grouped_with_a_count_and_one_example() -> None:
    tensors = without(tensors_of(V2_5), r".*\.experts\.\d+\.up_proj\.weight|.*kv_b_proj\.weight")
    assert refused(read(V2_5), tensors) == [
        "missing: 72 x model.layers.*.mlp.experts.*.up_proj.weight, "
        "e.g. model.layers.1.mlp.experts.0.up_proj.weight",
        # A tensor that fills two parameters is one tensor.
        "missing: 3 x model.layers.*.attention.kv_b_proj.weight, "
        "e.g. model.layers.2.attention.kv_b_proj.weight",
    ]


def test_every_kind_of_problem_is_in_one_message() -> None:
    tensors = without(tensors_of(V2), r"model\.norm\.weight")
    tensors = with_new(
        tensors, ["model.layers.1.attention.extra", "model.layers.2.attention.extra"]
    )
    for layer in (1, 4):
        name = f"model.layers.{layer}.mlp.gate.weight"
        tensors[name] = info(name, (56, 12))
    name = "model.layers.5.input_layernorm.weight"
    tensors[name] = info(name, (56,), np.dtype(np.float64))
    assert refused(read(V2), tensors) == [
        "wrong shape (got [56, 12], want [12, 56]): 2 x model.layers.*.mlp.gate.weight, "
        "e.g. model.layers.1.mlp.gate.weight",
        "dtype float64 (readable: float32, bfloat16, float16): 1 x "
        "model.layers.*.input_layernorm.weight, e.g. model.layers.5.input_layernorm.weight",
        "missing: 1 x model.norm.weight, e.g. model.norm.weight",
        "unexpected: 2 x model.layers.*.attention.extra, e.g. model.layers.1.attention.extra",
    ]


@pytest.mark.parametrize("architecture", [V2, LINEAR_V2, V2_5])
def test_every_transposed_or_flat_tensor_is_noticed(architecture: str) -> None:
    config, tensors = read(architecture), tensors_of(architecture)
    one_of_each = {re.sub(r"\d+", "*", name): tensor for name, tensor in tensors.items()}
    for pattern, right in one_of_each.items():
        name = right.name
        for shape in ((*right.shape[::-1],), (*right.shape, 1), (math.prod(right.shape),)):
            if shape == right.shape:
                continue
            (line,) = refused(config, tensors | {name: info(name, shape)})
            wrong = f"wrong shape (got {list(shape)}, want {list(right.shape)})"
            assert line == f"{wrong}: 1 x {pattern}, e.g. {name}"


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "int32", "float64", "bool"]
)
def test_unreadable_dtypes_are_named(dtype: str) -> None:
    tensors = tensors_of(V2)
    name = "model.layers.2.attention.dense.weight"
    tensors[name] = info(name, (56, 120), np.dtype(getattr(ml_dtypes, dtype, dtype)))
    (line,) = refused(read(V2), tensors)
    assert line.startswith(f"dtype {dtype} (readable: float32, bfloat16, float16): 1 x ")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_may_be_mixed(dtype: type) -> None:
    tensors = tensors_of(V2)
    name = "model.layers.2.mlp.gate.expert_bias"
    tensors[name] = info(name, (12,), np.dtype(dtype))
    assert name in filled(match(read(V2), tensors, ""))


def test_t24_scales_of_a_quantised_release_are_strangers() -> None:
    name = "model.layers.2.attention.dense.weight"
    tensors = with_new(tensors_of(V2), {f"{name}_scale_inv": (1, 1)})
    tensors[name] = info(name, (56, 120), np.dtype(ml_dtypes.float8_e4m3fn))
    kinds = [line.split(": ")[0].split(" (")[0] for line in refused(read(V2), tensors)]
    assert kinds == ["dtype float8_e4m3fn", "unexpected"]


def test_a_bias_the_config_does_not_know_is_a_stranger() -> None:
    tensors = tensors_of(LINEAR_V2, use_bias=True, use_qkv_bias=True)
    lines = refused(read(LINEAR_V2), tensors)
    assert [line.split(", e.g.")[0] for line in lines] == [
        "unexpected: 7 x model.layers.*.attention.dense.bias",
        "unexpected: 7 x model.layers.*.attention.query_key_value.bias",
    ]
