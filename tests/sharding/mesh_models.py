"""Tiny models that divide over many devices, and one schedule of steps for any number of shards.

Heads, groups and experts are of many sizes on purpose: eight heads of which two or four key-value
heads, two groups of the norm, experts that divide by number or by width. Every head has a magnitude
of its own, so that a wrong head or group shows; every shard has work of its own, some have none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from random_checkpoints import INERT, LINEAR_V2, V2, V2_5, random_tensors

from bailing_jax.batch import BatchLayout, pack, stack
from bailing_jax.config import ModelConfig
from bailing_jax.engine import sampler
from bailing_jax.engine.programs import Programs, no_ends
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.layers.parallel import Parallel
from bailing_jax.mesh import MeshShape
from bailing_jax.model import build
from bailing_jax.params import Param, describe
from bailing_jax.placement import Placement
from bailing_jax.row import Row
from bailing_jax.state import DecodeState, StateSpec, leaf_shapes
from convert.mapping import place

_COMMON: dict[str, Any] = {
    **INERT,
    "vocab_size": 208,
    "pad_token_id": 207,
    "eos_token_id": 207,
    "max_position_embeddings": 512,
    "num_hidden_layers": 3,
    "layer_group_size": 3,
    "first_k_dense_replace": 1,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "use_bias": True,
    "use_qkv_bias": True,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "partial_rotary_factor": 0.6,
    "group_norm_size": 2,
    "linear_silu": False,
}
_OF_LIGHTNING = ("layer_group_size", "group_norm_size", "linear_silu")
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {**_COMMON, "architectures": [LINEAR_V2], "model_type": "bailing_moe_linear"},
    "latent": {
        **_COMMON,
        "architectures": [V2_5],
        "model_type": "bailing_hybrid",
        "group_norm_size": 4,
        "q_lora_rank": 26,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8,
        "qk_head_dim": 18,
        "v_head_dim": 12,
        "rope_interleave": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "seq_aux": True,
    },
    "softmax": {
        **{k: v for k, v in _COMMON.items() if k not in _OF_LIGHTNING},
        "architectures": [V2],
        "model_type": "bailing_moe_v2",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "num_experts": 6,
        "n_group": 1,
        "topk_group": 1,
    },
}

ROWS, PREFILL, SEGMENTS, PAGE, WIDTH = 3, 10, 2, 4, 6
SPEC = StateSpec(num_slots=6, num_pages=25, page_dtype="float32", page_size=PAGE)


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hf(CONFIGS[name], {}, where=name)


@functools.cache
def weights(name: str) -> Mapping[str, np.ndarray]:
    """Every parameter by path, float32."""
    tensors = random_tensors(CONFIGS[name], 11, kv_a_bias="kv_lora_rank" in CONFIGS[name])
    for path, tensor in tensors.items():
        heads = CONFIGS[name]["num_attention_heads"]
        if "query_key_value" in path or "kv_b_proj" in path:
            size = CONFIGS[name]["head_dim"] if "query_key_value" in path else len(tensor) // heads
            scale = np.geomspace(0.3, 3, len(tensor) // size).astype(np.float32)
            tensor *= np.repeat(scale, size).reshape(-1, *(1,) * (tensor.ndim - 1))
    made = {}
    for param in describe(config_of(name)):
        made[param.path] = np.zeros(param.shape, np.float32)
        for source in param.sources:
            found = next(n for n in (source.name, *source.aliases) if n in tensors)
            place(source, tensors[found], made[param.path])
    return made


def programs(name: str, mesh: MeshShape | None = None, *, exact: bool = False) -> Programs:
    """The model on a mesh, or on one device without any."""
    config, arrays = config_of(name), weights(name)
    if mesh is None:
        options = RuntimeOptions("float32", exact=exact)
        return Programs(build(config, options, lambda p: jax.device_put(arrays[p.path])))
    placement = Placement(config, mesh)
    options = RuntimeOptions(
        "float32", exact=exact, parallel=Parallel.of(config, mesh, ordered=exact)
    )

    def make(param: Param) -> jax.Array:
        array = arrays[param.path]
        return placement.make(param, lambda box: array[tuple(slice(*part) for part in box)])

    return Programs(build(config, options, make), placement)


@dataclass
class Call:
    """One call of a shard: its rows, and for a call that only decodes what may still come."""

    decodes: Sequence[Row]
    segments: Sequence[Row] = ()
    room: Sequence[int] | None = None

    def layout(self) -> BatchLayout:
        is_decode = self.room is not None
        return pack(
            self.decodes,
            self.segments,
            num_decode=ROWS,
            num_prefill=0 if is_decode else PREFILL,
            num_segments=0 if is_decode else SEGMENTS,
            page_size=PAGE,
            pages_a_sequence=WIDTH,
        )

    def ends(self):
        ends = no_ends(ROWS)
        ends.room[: len(self.decodes)] = self.room
        return ends


STEPS = 4


def schedule(shard: int) -> list[Call]:
    """Prefill, a mixed step and a decode call of several steps; each shard's own."""
    rng = np.random.default_rng(shard)
    words = rng.integers(0, 200, (3, 12)).tolist()
    slots = (1 + rng.permutation(5)[:3]).tolist()
    pages = (1 + rng.permutation(24)).reshape(3, 8)[:, :WIDTH].tolist()

    def row(sequence: int, start: int, stop: int) -> Row:
        return Row(words[sequence][start:stop], slots[sequence], pages[sequence], start)

    if shard % 4 == 1:  # one sequence, then nobody
        return [
            Call([], [row(0, 0, 7)]),
            Call([row(0, 7, 8)], []),
            Call([], room=[]),
        ]
    if shard % 4 == 2:  # nobody at first
        return [
            Call([], []),
            Call([], [row(1, 0, 3), row(2, 0, 1)]),
            Call([row(1, 3, 4), row(2, 1, 2)], room=[4, 1]),
        ]
    return [
        Call([], [row(0, 0, 5), row(1, 0, 4)]),
        Call([row(0, 5, 6)], [row(1, 4, 6), row(2, 0, 7)]),
        Call([row(2, 7, 8), row(0, 6, 7), row(1, 6, 7)], room=[2, 3, 1 + shard % 3]),
    ]


@dataclass
class Seen:
    """What a run of the schedules left, shard by shard: per call tokens and logits, and the state.

    `state` has a shard's leaves [slots or pages, ...] as one device would hold them.
    """

    tokens: list[np.ndarray]
    logits: list[np.ndarray]
    state: list[np.ndarray]


def poisoned(leaf: Any) -> np.ndarray:
    """NaN with a payload everywhere but in NULL, of a shard's leaf."""
    bits = np.full(leaf.shape, 0x7FC00000, np.uint32) + np.arange(
        int(np.prod(leaf.shape)), dtype=np.uint32
    ).reshape(leaf.shape)
    array = bits.view(np.float32).copy()
    array[0] = 0
    return array


def run_alone(programs: Programs, shard: int) -> Seen:
    """A shard's schedule on one device."""
    state = programs.new_state(SPEC)
    state = DecodeState(tuple(jax.device_put(poisoned(leaf)) for leaf in state.layers))
    tokens, logits = [], []
    for call in schedule(shard):
        layout = call.layout()
        knobs = sampler.knobs(layout.logit_rows.shape[0], (), ())
        ends = None if call.room is None else call.ends()
        result = programs.step(state, layout, knobs, ends, 1 if ends is None else STEPS)
        state = result.state
        tokens.append(np.asarray(result.tokens))
        logits.append(np.asarray(result.logits))
    return Seen(tokens, logits, [np.asarray(leaf) for leaf in state.layers])


def run_on(programs: Programs, name: str, mesh: MeshShape) -> list[Seen]:
    """All shards' schedules at once, on a mesh."""
    shards = mesh.num_shards
    calls = [schedule(shard) for shard in range(shards)]
    config = config_of(name)
    alone = leaf_shapes(config, SPEC)
    # What pages hold of a key-value head, of which devices may have copies.
    head = 2 * config.gqa.head_dim if config.gqa else 1
    state = programs.new_state(SPEC)
    state = DecodeState(
        tuple(
            jax.device_put(_spread_leaf(poisoned(shape), leaf, mesh, head), leaf.sharding)
            for shape, leaf in zip(alone, state.layers, strict=True)
        )
    )
    seen = [Seen([], [], []) for _ in range(shards)]
    for parts in zip(*calls, strict=True):
        layouts = [call.layout() for call in parts]
        decodes = parts[0].room is not None
        each = [call.ends() for call in parts] if decodes else []
        knobs = sampler.knobs(layouts[0].logit_rows.shape[0], (), ())
        if shards == 1:
            layout, ends = layouts[0], each[0] if each else None
        else:
            layout = stack(layouts)
            knobs = jax.tree.map(lambda k: np.stack([k] * shards), knobs)
            ends = jax.tree.map(lambda *e: np.stack(e), *each) if each else None
        result = programs.step(state, layout, knobs, ends, STEPS if decodes else 1)
        state = result.state
        for shard in range(shards):
            tokens, logits = np.asarray(result.tokens), np.asarray(result.logits)
            seen[shard].tokens.append(tokens if shards == 1 else tokens[shard])
            seen[shard].logits.append(logits if shards == 1 else logits[shard])
    for shard in range(shards):
        for shape, leaf in zip(alone, state.layers, strict=True):
            seen[shard].state.append(_gathered_leaf(np.asarray(leaf), shape, shard, shards, head))
    return seen


def _spread_leaf(alone: np.ndarray, leaf: jax.Array, mesh: MeshShape, head: int) -> np.ndarray:
    """The same content for every shard, heads repeated where devices hold copies."""
    return np.concatenate([_repeated(alone, leaf.shape, head)] * mesh.num_shards)


def _gathered_leaf(leaf: np.ndarray, shape, shard: int, shards: int, head: int) -> np.ndarray:
    """A shard's part; of copies the first, which the others must equal."""
    mine = np.split(leaf, shards)[shard]
    # Where each number of the first copies lies: numbers are repeated like what they number.
    places = _repeated(np.arange(math.prod(shape.shape)).reshape(shape.shape), mine.shape, head)
    first = mine.reshape(-1)[np.unique(places, return_index=True)[1]].reshape(shape.shape)
    again = _repeated(first, mine.shape, head)
    assert np.array_equal(again.view(np.uint32), mine.view(np.uint32)), "copies differ"
    return first


def _repeated(alone: np.ndarray, shape: tuple[int, ...], head: int) -> np.ndarray:
    """Along the last axis each `head` numbers so often that it gets the size in `shape`.

    The other axes have it already.
    """
    heads = alone.reshape(*alone.shape[:-1], -1, min(head, alone.shape[-1]))
    copies = shape[-1] // alone.shape[-1]
    return np.repeat(heads, copies, axis=-2).reshape(*alone.shape[:-1], -1)
