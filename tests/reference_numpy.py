"""An independent float64 model of Bailing V2, LinearV2 and V2.5: the second opinion on every run.

One request, no cache, no batch, no chunks: the formulas one after the other, on the Hugging Face
config and the checkpoint's own tensors ([out, in], any dtype). Lightning layers are the recurrence
S_t = decay * S_{t-1} + k_t v_t^T; MLA is materialised, never absorbed; softmax is dense.
    x_0 = E[ids];  h = x + attention(norm(x));  x' = h + mlp(norm(h));  logits = norm(x_L) head^T
It must know nothing of the engine, so that a shared misreading cannot hide. Letters: t tokens,
s earlier tokens, d model width, n query heads, k kv heads, h key dim, j value dim, p rope dims,
e experts, x chosen experts, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Config = Mapping[str, Any]
Array = NDArray[np.float64]
Integers = NDArray[np.int64]

SOFTMAX_KIND = {
    "BailingMoeV2ForCausalLM": "gqa",
    "BailingMoeLinearV2ForCausalLM": "gqa",
    "BailingMoELinearForCausalLM": "gqa",  # this and the next: names some loaders know LinearV2 by
    "BailingMoeLinearForCausalLM": "gqa",
    "BailingMoeV2_5ForCausalLM": "mla",
}

# The publishers build MLA's two low-rank norms without passing rms_norm_eps.
MLA_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Reference:
    """What one prompt gives: every array a test may want to hold against the engine's.

    `router[layer]` is (expert ids [t,x] in ascending order, their final combine weights [t,x]);
    `router_margin` is the smallest gap between a kept and a dropped group or expert score.
    """

    logits: Array  # [t, v]
    hidden: Array  # [layers + 1, t, d]: embedding, then the residual stream after each layer
    final_norm: Array  # [t, d]
    states: dict[int, Array]  # lightning layer -> [n, h, j] after the last token
    router: dict[int, tuple[Integers, Array]]
    router_margin: float


@dataclass(frozen=True)
class Weights:
    """Checkpoint tensors under one name prefix, read as float64."""

    tensors: Mapping[str, np.ndarray]
    prefix: str = ""

    def under(self, prefix: str) -> Weights:
        """The tensors below `prefix`."""
        return Weights(self.tensors, f"{self.prefix}{prefix}.")

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds this tensor."""
        return self.prefix + name in self.tensors

    def get(self, *names: str) -> Array:
        """The first of these aliases that the checkpoint holds."""
        for name in names:
            if self.has(name):
                return np.asarray(self.tensors[self.prefix + name]).astype(np.float64)
        raise KeyError(f"none of {[self.prefix + name for name in names]} in the checkpoint")

    def linear(self, x: Array, name: str, *, bias: bool = False) -> Array:
        """x W^T, plus the bias where the config says there is one."""
        y = x @ self.get(f"{name}.weight").T
        return y + self.get(f"{name}.bias") if bias else y


def layer_kinds(config: Config) -> list[str]:
    """Attention of each layer: "gqa", "mla" or "lightning"."""
    architecture, layers = config["architectures"][0], config["num_hidden_layers"]
    if architecture not in SOFTMAX_KIND:
        raise ValueError(f"no reference for {architecture}")
    softmax = SOFTMAX_KIND[architecture]
    if architecture == "BailingMoeV2ForCausalLM":
        return [softmax] * layers
    group = config["layer_group_size"]
    # An incomplete last group has no softmax layer to end it, so all of it is softmax.
    tail = layers // group * group
    return [softmax if (i + 1) % group == 0 or i >= tail else "lightning" for i in range(layers)]


def head_dim(config: Config) -> int:
    """Width of a GQA or lightning head; absent, null or 0 means hidden / heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotary_dim(config: Config) -> int:
    """Rotated channels of a GQA or lightning head (MLA rotates all of its own rope channels)."""
    inside = config.get("rope_parameters") or {}
    factor = config.get("partial_rotary_factor", inside.get("partial_rotary_factor"))
    if factor is not None:
        return int(head_dim(config) * factor)
    return config.get("rotary_dim") or head_dim(config)


def rope_theta(config: Config) -> float:
    """The rope base: Transformers 5 keeps it in rope_parameters, older files at top level."""
    inside = config.get("rope_parameters") or {}
    theta = inside.get("rope_theta")
    return float(config["rope_theta"] if theta is None else theta)


def yarn_settings(config: Config) -> Mapping[str, Any] | None:
    """The YaRN block of rope_scaling or rope_parameters; None where positions are not scaled."""
    for key in ("rope_scaling", "rope_parameters"):
        block = config.get(key) or {}
        kind = block.get("rope_type") or block.get("type") or "default"
        if kind == "yarn":
            return block
        if kind != "default":
            raise ValueError(f"no reference for {key} of type {kind!r}")
    return None


def _refuse_unknown(config: Config) -> None:
    """Raise for settings that would change the result and are not modelled here."""
    expected = {"full_attention_type": "mla", "rope_interleave": True, "layers_block_type": None}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"no reference for {key} = {config[key]!r}")


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that a large -x cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def group_rms_norm(x: Array, weight: Array, num_groups: int, eps: float) -> Array:
    """[t, D] with one rms for each of `num_groups` contiguous runs of channels; weight [D]."""
    grouped = x.reshape(len(x), num_groups, -1)
    return rms_norm(grouped, np.ones(()), eps).reshape(x.shape) * weight


def yarn_mscale(factor: float, weight: float) -> float:
    """YaRN's m(s, a): 1 for s <= 1, else 0.1 a ln s + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_frequencies(config: Config, dims: int) -> tuple[Array, float]:
    """Angular frequencies [dims/2] and the factor on cos and sin, for a rope of `dims` channels."""
    if dims % 2:
        raise ValueError(f"channels turn in pairs, so {dims} cannot all be rotated")
    theta, yarn = rope_theta(config), yarn_settings(config)
    plain = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if yarn is None:
        return plain, 1.0
    factor = yarn["factor"]
    trained = yarn.get("original_max_position_embeddings") or config["max_position_embeddings"]

    def channel_turning(turns: float) -> float:
        """The (fractional) channel that makes `turns` turns over the trained length."""
        return dims * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(channel_turning(yarn.get("beta_fast") or 32)), 0)
    high: float = min(math.ceil(channel_turning(yarn.get("beta_slow") or 1)), dims - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    mscale, all_dim = yarn.get("mscale"), yarn.get("mscale_all_dim")
    if yarn.get("attention_factor") is not None:
        return frequencies, float(yarn["attention_factor"])
    if mscale and all_dim:
        return frequencies, yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return frequencies, yarn_mscale(factor, 1.0)


def rotation(config: Config, dims: int, tokens: int) -> NDArray[np.complex128]:
    """The turn of each pair of channels at positions 0 .. tokens-1, [t, 1, p/2]."""
    frequencies, attention_factor = rope_frequencies(config, dims)
    angle = np.arange(tokens)[:, None, None] * frequencies
    return np.asarray(attention_factor * np.exp(1j * angle), dtype=np.complex128)


def rotate_half_split(x: Array, turn: NDArray[np.complex128]) -> Array:
    """Turn channels (i, i + p/2) of the first p of x [t, n, h]; the others pass."""
    half = turn.shape[-1]
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


def rotate_interleaved(x: Array, turn: NDArray[np.complex128]) -> Array:
    """Turn channels (2i, 2i + 1) of all of x [t, n, p]."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Dense causal softmax attention; q [t,n,h], k [t,n,h], v [t,n,j] -> [t,n,j]."""
    scores = np.einsum("tnh,snh->nts", q, k, optimize=True) * scale
    tokens = len(q)
    scores[:, np.triu(np.ones((tokens, tokens), dtype=bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("nts,snj->tnj", weights, v, optimize=True)


def lightning_slopes(heads: int) -> Array:
    """Base decay slope of each head; other counts than powers of two borrow from the next power."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return np.array(slopes + between[: heads - power])


def lightning_log_decay(config: Config, layer: int, offset: int) -> Array:
    """Log decay of each head [n]: -slope * (1 - (layer - offset) / (layers - 1) + 1e-5)."""
    layers = config["num_hidden_layers"]
    factor = 1 - (layer - offset) / (layers - 1) + 1e-5 if layers > 1 else 1 + 1e-5
    if config.get("lightning_layerwise_decay", True) is False:
        factor = 1.0
    return -lightning_slopes(config["num_attention_heads"]) * factor


def lightning(q: Array, k: Array, v: Array, log_decay: Array, scale: float) -> tuple[Array, Array]:
    """The recurrence; q,k [t,n,h], v [t,n,j], log_decay [n] -> o [t,n,j], state [n,h,j]."""
    decay = np.exp(log_decay)[:, None, None]
    state = np.zeros((q.shape[1], q.shape[2], v.shape[2]))
    outputs = np.empty(v.shape)
    for t in range(len(q)):
        state = decay * state + k[t][:, :, None] * v[t][:, None, :]
        outputs[t] = scale * (q[t][:, None, :] @ state)[:, 0]
    return outputs, state


class Routing(NamedTuple):
    """Chosen experts [t,x] in ascending order, their combine weights [t,x], the smallest gap."""

    ids: Integers
    weights: Array
    margin: float


def _top(scores: Array, count: int) -> tuple[Integers, float]:
    """Indices of the `count` largest of a vector (ties: lowest first) and the gap to the next."""
    order = np.argsort(-scores, kind="stable")
    gap = scores[order[count - 1]] - scores[order[count]] if count < len(scores) else np.inf
    return order[:count], float(gap)


def route(logits: Array, bias: Array, config: Config) -> Routing:
    """Group-limited sigmoid routing of logits [t, e]; the bias takes part in the choice only."""
    experts, chosen = logits.shape[1], config["num_experts_per_tok"]
    groups = config.get("n_group") or 1
    kept_groups = config["topk_group"] if groups > 1 else 1
    scores = sigmoid(logits)
    ids = np.empty((len(logits), chosen), dtype=np.int64)
    margin = math.inf
    for t, biased in enumerate(scores + bias):
        grouped = biased.reshape(groups, experts // groups)
        if groups > 1:
            best_two = np.sort(grouped, axis=1)[:, -2:].sum(axis=1)
            keep, group_gap = _top(best_two, kept_groups)
            margin = min(margin, group_gap)
        else:
            keep = np.zeros(1, dtype=np.int64)
        allowed = np.full_like(grouped, -np.inf)
        allowed[keep] = grouped[keep]
        ids[t], gap = _top(allowed.reshape(-1), chosen)
        margin = min(margin, gap)
    ids.sort(axis=1)
    weights = np.take_along_axis(scores, ids, axis=1)
    if chosen > 1:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(ids, weights * config["routed_scaling_factor"], margin)


def swiglu(x: Array, w: Weights) -> Array:
    """down(silu(gate x) * up x)."""
    hidden = silu(w.linear(x, "gate_proj")) * w.linear(x, "up_proj")
    return w.linear(hidden, "down_proj")


def moe(x: Array, w: Weights, config: Config) -> tuple[Array, Routing]:
    """Weighted sum of the chosen experts plus the shared ones, which have no gate or scale."""
    bias = w.get("gate.expert_bias", "gate.e_score_correction_bias", "experts.expert_bias")
    routing = route(w.linear(x, "gate"), bias, config)
    out = np.zeros_like(x)
    for expert in range(config["num_experts"]):
        rows, slots = np.nonzero(routing.ids == expert)
        if len(rows):
            share = routing.weights[rows, slots][:, None]
            out[rows] += share * swiglu(x[rows], w.under(f"experts.{expert}"))
    if config.get("num_shared_experts"):
        out += swiglu(x, w.under("shared_experts"))
    return out, routing


def _qkv(
    x: Array, w: Weights, config: Config, kv_heads: int, *, activate: bool, rope: bool
) -> tuple[Array, Array, Array]:
    """Project, activate, normalise, rotate: q [t,n,h], k and v [t,k,h]."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    qkv = w.linear(x, "query_key_value", bias=config.get("use_qkv_bias", False))
    qkv = qkv.reshape(len(x), heads + 2 * kv_heads, head_dim(config))
    qkv = silu(qkv) if activate else qkv
    # All q heads, then all k heads, then all v heads.
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    if config.get("use_qk_norm", True):
        q = rms_norm(q, w.get("query_layernorm.weight"), eps)
        k = rms_norm(k, w.get("key_layernorm.weight"), eps)
    if rope:
        turn = rotation(config, rotary_dim(config), len(x))
        q, k = rotate_half_split(q, turn), rotate_half_split(k, turn)
    return q, k, v


def gqa(x: Array, w: Weights, config: Config) -> Array:
    """Grouped-query softmax attention; each kv head serves consecutive query heads."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = _qkv(x, w, config, kv_heads, activate=False, rope=True)
    serves = np.arange(heads) * kv_heads // heads
    o = causal_attention(q, k[:, serves], v[:, serves], head_dim(config) ** -0.5)
    return w.linear(o.reshape(len(x), -1), "dense", bias=config.get("use_bias", False))


def lightning_attention(
    x: Array, w: Weights, config: Config, log_decay: Array
) -> tuple[Array, Array]:
    """Linear attention, every query head with its own kv head; also the last state [n,h,j]."""
    activate = bool(config.get("linear_silu") or config.get("use_linear_silu"))
    rope = config.get("linear_rope", True)
    q, k, v = _qkv(x, w, config, config["num_attention_heads"], activate=activate, rope=rope)
    o, state = lightning(q, k, v, log_decay, head_dim(config) ** -0.5)
    # group_norm_size counts the groups. Norm first; the gate comes from x and is not normalised.
    groups, eps = config["group_norm_size"], config["rms_norm_eps"]
    o = group_rms_norm(o.reshape(len(x), -1), w.get("g_norm.weight"), groups, eps)
    o = o * sigmoid(w.linear(x, "g_proj"))
    return w.linear(o, "dense", bias=config.get("use_bias", False)), state


def mla_scale(config: Config) -> float:
    """Softmax scale of MLA, with YaRN's m(factor, mscale_all_dim) squared where it is set."""
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = yarn_settings(config)
    if yarn is None or not yarn.get("mscale_all_dim"):
        return scale
    return scale * yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2


def mla(x: Array, w: Weights, config: Config) -> Array:
    """Multi-head latent attention with k and v written out for every head; nkv is ignored."""
    tokens, heads, bias = len(x), config["num_attention_heads"], config.get("use_qkv_bias", False)
    nope, rope, rank = (
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
        config["kv_lora_rank"],
    )
    if config.get("q_lora_rank"):
        low = w.linear(x, "q_a_proj", bias=bias)
        q = w.linear(rms_norm(low, w.get("q_a_layernorm.weight"), MLA_NORM_EPS), "q_b_proj")
    else:
        q = w.linear(x, "q_proj")
    q = q.reshape(tokens, heads, nope + rope)
    latent = w.linear(x, "kv_a_proj_with_mqa", bias=w.has("kv_a_proj_with_mqa.bias"))
    k_rope = latent[:, None, rank:]  # one head for all, not normalised
    compressed = rms_norm(latent[:, :rank], w.get("kv_a_layernorm.weight"), MLA_NORM_EPS)
    kv = w.linear(compressed, "kv_b_proj").reshape(tokens, heads, nope + config["v_head_dim"])
    # All of these rope channels turn: partial_rotary_factor speaks of the other heads only.
    turn = rotation(config, rope, tokens)
    q = np.concatenate([q[..., :nope], rotate_interleaved(q[..., nope:], turn)], axis=-1)
    k_rope = np.broadcast_to(rotate_interleaved(k_rope, turn), (tokens, heads, rope))
    k = np.concatenate([kv[..., :nope], k_rope], axis=-1)
    o = causal_attention(q, k, kv[..., nope:], mla_scale(config))
    return w.linear(
        o.reshape(tokens, -1), "dense" if w.has("dense.weight") else "o_proj", bias=bias
    )


def reference_forward(
    config: Config,
    tensors: Mapping[str, np.ndarray],
    token_ids: Sequence[int] | np.ndarray,
    *,
    decay_layer_offset: int | None = None,
) -> Reference:
    """Run one prompt; an offset of None means the config's own, or 0."""
    _refuse_unknown(config)
    offset = (
        config.get("decay_layer_offset", 0) if decay_layer_offset is None else decay_layer_offset
    )
    w, eps = Weights(tensors), config["rms_norm_eps"]
    embedding = w.get("model.word_embeddings.weight")
    hidden = [embedding[np.asarray(token_ids, dtype=np.int64)]]
    states: dict[int, Array] = {}
    router: dict[int, tuple[Integers, Array]] = {}
    margin = math.inf
    for i, kind in enumerate(layer_kinds(config)):
        layer = w.under(f"model.layers.{i}")
        attention = layer.under("attention")
        x = rms_norm(hidden[i], layer.get("input_layernorm.weight"), eps)
        if kind == "lightning":
            log_decay = lightning_log_decay(config, i, offset or 0)
            y, states[i] = lightning_attention(x, attention, config, log_decay)
        else:
            y = gqa(x, attention, config) if kind == "gqa" else mla(x, attention, config)
        h = hidden[i] + y
        x = rms_norm(h, layer.get("post_attention_layernorm.weight"), eps)
        if i < (config.get("first_k_dense_replace") or 0):
            y = swiglu(x, layer.under("mlp"))
        else:
            y, routing = moe(x, layer.under("mlp"), config)
            router[i] = (routing.ids, routing.weights)
            margin = min(margin, routing.margin)
        hidden.append(h + y)
    final_norm = rms_norm(hidden[-1], w.get("model.norm.weight"), eps)
    head = embedding if config.get("tie_word_embeddings") else w.get("lm_head.weight")
    return Reference(final_norm @ head.T, np.stack(hidden), final_norm, states, router, margin)


def greedy(
    config: Config, tensors: Mapping[str, np.ndarray], prompt: Sequence[int], n: int
) -> tuple[list[int], float]:
    """The next `n` argmax tokens and the smallest gap of any choice on the way: token or expert."""
    # Converted once: the whole prompt runs again for every token.
    exact = {name: np.asarray(value).astype(np.float64) for name, value in tensors.items()}
    tokens, margin = [int(i) for i in prompt], math.inf
    for _ in range(n):
        result = reference_forward(config, exact, tokens)
        (best,), gap = _top(result.logits[-1], 1)
        margin = min(margin, gap, result.router_margin)
        tokens.append(int(best))
    return tokens[len(prompt) :], margin
