"""The parameter description: every array of a model, before any array exists.

One `Param` an array: its path (the checkpoint's name, experts stacked under `mlp.experts`), its
shape and order of axes as the model uses it, and the checkpoint tensors it is made of. Modules,
loader, converter, planner and random initialisation all read this one list. Weights of linear
layers are stored [in, out] (the checkpoint has [out, in]) and experts [experts, in, out].
Sizes come from the config only; no device, no jax.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from bailing_jax import plugins
from bailing_jax.config import Gqa, Lightning, Mla, ModelConfig
from bailing_jax.layer_plan import layer_plan

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor and the part of it that goes into a parameter.

    The tensor of shape `shape` is viewed as `view`, cut to `take` = (axis, start, stop), its axes
    put in `order`, and written to the whole parameter or to its `index`-th entry.
    """

    name: str
    shape: Shape
    view: Shape
    order: tuple[int, ...]
    take: tuple[int, int, int] | None = None
    index: int | None = None
    aliases: tuple[str, ...] = ()
    # A tensor some exporters leave out; the parameter is zero then.
    optional: bool = False


@dataclass(frozen=True)
class Param:
    """One array of the model.

    `axes` are logical names, one a dimension. `dtype` "model" follows the engine's dtype,
    "float32" never does. `init` is for random weights: normal with standard deviation
    `fan_in ** -0.5` (the last dimension of the checkpoint tensor), ones or zeros.
    """

    path: str
    shape: Shape
    axes: tuple[str, ...]
    sources: tuple[Source, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    dtype: Literal["model", "float32"] = "model"

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for dim in self.shape:
            size *= dim
        return size


def describe(config: ModelConfig) -> tuple[Param, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    d, v = config.hidden_size, config.vocab_size
    params = [_as_is("model.word_embeddings.weight", (v, d), ("vocab", "embed"))]
    for layer, spec in enumerate(layer_plan(config)):
        prefix = f"model.layers.{layer}"
        params.append(_norm(f"{prefix}.input_layernorm", d))
        params += attention_parameters(spec.attention, config, f"{prefix}.attention")
        params.append(_norm(f"{prefix}.post_attention_layernorm", d))
        mlp = _swiglu if spec.mlp == "dense" else _moe
        params += mlp(config, f"{prefix}.mlp")
    params.append(_norm("model.norm", d))
    if not config.tie_embeddings:
        params.append(_linear("lm_head", d, v, ("embed", "vocab")))
    return tuple(params)


def attention_parameters(kind: str, config: ModelConfig, path: str) -> tuple[Param, ...]:
    """The parameters of an attention layer at `path`, as whoever replaces it declares them."""
    replaced = plugins.layer(kind)
    declare = replaced.parameters if replaced else _ATTENTION[kind]
    return tuple(declare(config, path))


def built_in_parameters(kind: str, config: ModelConfig, path: str) -> tuple[Param, ...]:
    """Those of the built-in layer of that kind."""
    return tuple(_ATTENTION[kind](config, path))


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def unused_reason(config: ModelConfig, name: str, mtp_layers: Collection[int]) -> str | None:
    """Why a checkpoint tensor is recognised and yet not read, or None when it is a stranger.

    Args:
        config: the model.
        name: the tensor.
        mtp_layers: layers beyond the model's own that hold next-token prediction weights.
    """
    layer = _LAYER.match(name)
    if name.startswith("model.mtp") or (layer is not None and int(layer[1]) in mtp_layers):
        return "MTP (next-token prediction layers are not run)"
    if name.endswith("rotary_emb.inv_freq") or name.endswith(".slope"):
        return "buffers (computed from the config)"
    if config.tie_embeddings and name == "lm_head.weight":
        return "head (tied to model.word_embeddings)"
    return None


def _as_is(path: str, shape: Shape, axes: tuple[str, ...], **kwargs) -> Param:
    source = Source(path, shape, shape, tuple(range(len(shape))))
    return Param(path, shape, axes, (source,), **kwargs)


def _norm(path: str, size: int, axis: str = "embed") -> Param:
    return _as_is(f"{path}.weight", (size,), (axis,), init="ones")


def _bias(path: str, size: int, axis: str, *, optional: bool = False) -> Param:
    param = _as_is(f"{path}.bias", (size,), (axis,), init="zeros")
    source = dataclasses.replace(param.sources[0], optional=optional)
    return dataclasses.replace(param, sources=(source,))


def _linear(
    path: str, size_in: int, size_out: int, axes: tuple[str, str], *, alias: str = ""
) -> Param:
    name = f"{path}.weight"
    shape = (size_out, size_in)
    aliases = (f"{alias}.weight",) if alias else ()
    source = Source(name, shape, shape, (1, 0), aliases=aliases)
    return Param(name, (size_in, size_out), axes, (source,))


def _swiglu(config: ModelConfig, path: str) -> Iterator[Param]:
    yield from _swiglu_of(path, config.hidden_size, config.dense_width)


def _swiglu_of(path: str, d: int, f: int) -> Iterator[Param]:
    yield _linear(f"{path}.gate_proj", d, f, ("embed", "ffn"))
    yield _linear(f"{path}.up_proj", d, f, ("embed", "ffn"))
    yield _linear(f"{path}.down_proj", f, d, ("ffn", "embed"))


def _moe(config: ModelConfig, path: str) -> Iterator[Param]:
    moe, d = config.moe, config.hidden_size
    e, f = moe.num_experts, moe.expert_width
    # The router runs in float32 whatever the model dtype: near ties decide whole experts.
    router = _linear(f"{path}.gate", d, e, ("embed", "router_experts"))
    yield dataclasses.replace(router, dtype="float32")
    bias = _as_is(
        f"{path}.gate.expert_bias", (e,), ("router_experts",), init="zeros", dtype="float32"
    )
    aliases = (f"{path}.gate.e_score_correction_bias", f"{path}.experts.expert_bias")
    source = dataclasses.replace(bias.sources[0], aliases=aliases)
    yield dataclasses.replace(bias, sources=(source,))
    for name, size_in, size_out, axes in (
        ("gate_proj", d, f, ("experts", "embed", "expert_ffn")),
        ("up_proj", d, f, ("experts", "embed", "expert_ffn")),
        ("down_proj", f, d, ("experts", "expert_ffn", "embed")),
    ):
        shape = (size_out, size_in)
        sources = tuple(
            Source(f"{path}.experts.{i}.{name}.weight", shape, shape, (1, 0), index=i)
            for i in range(e)
        )
        yield Param(f"{path}.experts.{name}.weight", (e, size_in, size_out), axes, sources)
    if moe.shared_width:
        yield from _swiglu_of(f"{path}.shared_experts", d, moe.shared_width)


def _lightning(config: ModelConfig, path: str) -> Iterator[Param]:
    att, d = present(config.lightning), config.hidden_size
    width = att.num_heads * att.head_dim
    yield _linear(f"{path}.query_key_value", d, 3 * width, ("embed", "qkv"))
    if att.qkv_bias:
        yield _bias(f"{path}.query_key_value", 3 * width, "qkv")
    yield from _qk_norms(att, path)
    yield _linear(f"{path}.g_proj", d, width, ("embed", "heads"))
    yield _norm(f"{path}.g_norm", width, "heads")
    yield _linear(f"{path}.dense", width, d, ("heads", "embed"))
    if att.output_bias:
        yield _bias(f"{path}.dense", d, "embed")


def _gqa(config: ModelConfig, path: str) -> Iterator[Param]:
    att, d = present(config.gqa), config.hidden_size
    qkv = (att.num_heads + 2 * att.num_kv_heads) * att.head_dim
    yield _linear(f"{path}.query_key_value", d, qkv, ("embed", "grouped_qkv"))
    if att.qkv_bias:
        yield _bias(f"{path}.query_key_value", qkv, "grouped_qkv")
    yield from _qk_norms(att, path)
    yield _linear(f"{path}.dense", att.num_heads * att.head_dim, d, ("heads", "embed"))
    if att.output_bias:
        yield _bias(f"{path}.dense", d, "embed")


def _qk_norms(att: Lightning | Gqa, path: str) -> Iterator[Param]:
    if att.use_qk_norm:
        yield _norm(f"{path}.query_layernorm", att.head_dim, "head_dim")
        yield _norm(f"{path}.key_layernorm", att.head_dim, "head_dim")


def _mla(config: ModelConfig, path: str) -> Iterator[Param]:
    att, d = present(config.mla), config.hidden_size
    n, r = att.num_heads, att.kv_lora_rank
    query = n * (att.nope_dim + att.rope_dim)
    if att.q_lora_rank is None:
        yield _linear(f"{path}.q_proj", d, query, ("embed", "heads"))
    else:
        yield _linear(f"{path}.q_a_proj", d, att.q_lora_rank, ("embed", "q_rank"))
        if att.bias:
            yield _bias(f"{path}.q_a_proj", att.q_lora_rank, "q_rank")
        yield _norm(f"{path}.q_a_layernorm", att.q_lora_rank, "q_rank")
        yield _linear(f"{path}.q_b_proj", att.q_lora_rank, query, ("q_rank", "heads"))
    latent = r + att.rope_dim
    yield _linear(f"{path}.kv_a_proj_with_mqa", d, latent, ("embed", "latent"))
    if att.bias:
        # Not every exporter of a biased model writes this one.
        yield _bias(f"{path}.kv_a_proj_with_mqa", latent, "latent", optional=True)
    yield _norm(f"{path}.kv_a_layernorm", r, "kv_rank")
    yield from _kv_b(att, f"{path}.kv_b_proj")
    yield _linear(
        f"{path}.dense", n * att.value_dim, d, ("heads", "embed"), alias=f"{path}.o_proj"
    )
    if att.bias:
        bias = _bias(f"{path}.dense", d, "embed")
        source = dataclasses.replace(bias.sources[0], aliases=(f"{path}.o_proj.bias",))
        yield dataclasses.replace(bias, sources=(source,))


def _kv_b(att: Mla, path: str) -> Iterator[Param]:
    """Absorbed attention multiplies by the key and the value half apart, so they are stored so."""
    n, r, h, j = att.num_heads, att.kv_lora_rank, att.nope_dim, att.value_dim
    name, shape, view = f"{path}.weight", (n * (h + j), r), (n, h + j, r)
    key = Source(name, shape, view, (0, 1, 2), take=(1, 0, h))
    value = Source(name, shape, view, (0, 2, 1), take=(1, h, h + j))
    yield Param(f"{path}.key_weight", (n, h, r), ("heads", "head_dim", "kv_rank"), (key,))
    yield Param(f"{path}.value_weight", (n, r, j), ("heads", "kv_rank", "head_dim"), (value,))


T = TypeVar("T")


def present(value: T | None) -> T:
    """A part of the config that the layer plan says is there."""
    if value is None:
        raise ValueError("the layer plan names an attention kind the config does not have")
    return value


_ATTENTION = {"lightning": _lightning, "gqa": _gqa, "mla": _mla}
