"""The least time a step can take on a mesh: bytes, products and messages over the chips' rates.

    memory        weights read once (of the experts, those that the step's rows are expected to
                  choose), state in and out, pages read, over the HBM rate
    compute       two FLOPs a weight and row, and attention's own, over the bfloat16 rate
    interconnect  two sums over `tensor` a layer, in float32; every row to all shards that share
                  its experts and back as a sum, or, where those are many, each choice to its
                  expert and back; the logits over `tensor`

Experts are taken to be chosen evenly and independently, activations to stay on the chip, kernels
to start in no time: what comes out is a bound and no forecast. `bound_seconds` lets all three
overlap; `in_turns_seconds` lets messages and products take turns, as in a step that works on one
batch: each layer's sums wait for its products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bailing_jax.config import ModelConfig
from bailing_jax.layer_plan import layer_plan
from bailing_jax.mesh import MeshShape, tensor_axes
from bailing_jax.planning import footprint
from bailing_jax.planning.chips import Chip
from bailing_jax.planning.model import PlannedModel
from bailing_jax.planning.topology import Topology
from bailing_jax.planning.workload import ITEM_BYTES, Workload
from bailing_jax.sharding import local_shape, norm_parts

# Rows of a block of the chunked recurrence.
_CHUNK = 64
_FLOAT32 = 4


@dataclass(frozen=True)
class Rows:
    """What a shard works on in a step.

    Attributes:
        count: token rows of the shard.
        with_experts: rows of all shards that share its experts.
        sequences: whose state goes in and out.
        pages_read: tokens read from pages, of all its sequences.
        pairs: (row, earlier token) pairs that softmax attention looks at.
        is_decode: one row a sequence.
    """

    count: int
    with_experts: int
    sequences: int
    pages_read: int
    pairs: int
    is_decode: bool


@dataclass(frozen=True)
class Phase:
    """The least seconds of a step, by what limits it."""

    memory: float
    compute: float
    interconnect: float

    @property
    def bound_seconds(self) -> float:
        """Everything overlaps."""
        return max(self.memory, self.compute, self.interconnect)

    @property
    def in_turns_seconds(self) -> float:
        """Messages wait for products and products for messages."""
        return max(self.memory, self.compute) + self.interconnect

    @property
    def binds(self) -> str:
        """What limits it."""
        seconds = {name: getattr(self, name) for name in ("memory", "compute", "interconnect")}
        return max(seconds, key=seconds.__getitem__)


@dataclass(frozen=True)
class Roofline:
    """Bounds of a mesh under a load.

    Attributes:
        decode: a step in which every sequence decodes a token, `prompt_tokens` behind it.
        decode_rate: tokens/s of all sequences together, at best.
        decode_in_turns: the same where messages and products take turns.
        prefill: a step in which every shard takes in a chunk from the middle of a prompt.
        prefill_rate: prompt tokens/s of all shards together, at best.
        first_token_seconds: the least time to the first token of one prompt, alone on the mesh.
        first_token_binds: what limits most of it.
    """

    decode: Phase
    decode_rate: float
    decode_in_turns: float
    prefill: Phase
    prefill_rate: float
    first_token_seconds: float
    first_token_binds: str


def roofline(model: PlannedModel, topology: Topology, mesh: MeshShape, load: Workload) -> Roofline:
    """The bounds of a mesh on a topology."""
    config, weights = model.config, Weights.of(model, mesh, load)

    def timed(rows: Rows) -> Phase:
        return phase(config, topology, mesh, load, weights, rows)

    decode = timed(decode_rows(mesh, load))
    chunk = min(load.prefill_chunk, load.prompt_tokens)
    middle = (load.prompt_tokens - chunk) // 2
    prefill = timed(prefill_rows(middle, chunk, chunk * mesh.expert))
    alone = [
        timed(prefill_rows(start, rows, rows))
        for start in range(0, load.prompt_tokens, load.prefill_chunk)
        for rows in [min(load.prefill_chunk, load.prompt_tokens - start)]
    ]
    first = max(alone, key=lambda step: step.bound_seconds)
    return Roofline(
        decode=decode,
        decode_rate=load.max_num_seqs / decode.bound_seconds,
        decode_in_turns=load.max_num_seqs / decode.in_turns_seconds,
        prefill=prefill,
        prefill_rate=mesh.num_shards * chunk / prefill.bound_seconds,
        first_token_seconds=sum(step.bound_seconds for step in alone),
        first_token_binds=first.binds,
    )


def decode_rows(mesh: MeshShape, load: Workload) -> Rows:
    """Every sequence decodes: the rows of the fullest shard."""
    rows = load.decode_rows(mesh)
    tokens = rows * load.prompt_tokens
    # Shards that share experts, all but the last of them as full as this one.
    shared = min(rows * mesh.expert, load.max_num_seqs)
    return Rows(rows, shared, rows, tokens, tokens, is_decode=True)


def prefill_rows(start: int, count: int, with_experts: int) -> Rows:
    """One prompt's `count` tokens behind `start` others."""
    pairs = count * start + count * (count + 1) // 2
    return Rows(count, with_experts, 1, start + count, pairs, is_decode=False)


@dataclass(frozen=True)
class Weights:
    """What a device holds of the weights that every row meets, and of the experts.

    Attributes:
        shared_bytes: read in every step.
        shared_size: elements that every row is multiplied by.
        head_size: elements that rows with logits are multiplied by.
        expert_bytes: of all experts of the device.
        expert_size: elements of all experts of the device.
    """

    shared_bytes: int
    shared_size: int
    head_size: int
    expert_bytes: int
    expert_size: int

    @classmethod
    def of(cls, model: PlannedModel, mesh: MeshShape, load: Workload) -> Weights:
        """Added up over the kinds of parameters."""
        config = model.config

        def size(*roles: str) -> int:
            return sum(
                kind.count * math.prod(local_shape(config, kind.param, mesh))
                for kind in model.kinds
                if kind.role in roles and len(kind.param.shape) > 1
            )

        def num_bytes(*roles: str) -> int:
            return sum(
                kind.count * footprint.param_bytes(config, kind.param, mesh, load)
                for kind in model.kinds
                if kind.role in roles
            )

        # Of a table of tokens only the rows of the step's own are read.
        return cls(
            shared_bytes=num_bytes("other", "head"),
            shared_size=size("other"),
            head_size=size("head"),
            expert_bytes=num_bytes("expert"),
            expert_size=size("expert"),
        )


def phase(
    config: ModelConfig,
    topology: Topology,
    mesh: MeshShape,
    load: Workload,
    weights: Weights,
    rows: Rows,
) -> Phase:
    """The least seconds of a step of a device."""
    chip = topology.chip
    return Phase(
        memory=memory_bytes(config, chip, mesh, load, weights, rows) / chip.hbm_rate,
        compute=flops(config, mesh, weights, rows) / chip.bf16_rate,
        interconnect=interconnect_seconds(config, topology, mesh, load, rows),
    )


def memory_bytes(
    config: ModelConfig,
    chip: Chip,
    mesh: MeshShape,
    load: Workload,
    weights: Weights,
    rows: Rows,
) -> float:
    """Bytes a device reads and writes."""
    touched = weights.expert_bytes * share_of_experts(config, rows.with_experts)
    state = 2 * rows.sequences * footprint.slot_bytes(config, chip, mesh, load)
    pages = (rows.pages_read + rows.count) * footprint.token_bytes(config, chip, mesh, load)
    return weights.shared_bytes + touched + state + pages


def share_of_experts(config: ModelConfig, rows: int) -> float:
    """The expected share of distinct experts that so many rows choose."""
    moe = config.moe
    return 1 - (1 - moe.num_experts_per_token / moe.num_experts) ** rows


def flops(config: ModelConfig, mesh: MeshShape, weights: Weights, rows: Rows) -> float:
    """Of a device, a product and a sum counted as two."""
    moe = config.moe
    chosen = rows.with_experts * moe.num_experts_per_token / moe.num_experts
    logits = rows.sequences * weights.head_size
    products = rows.count * weights.shared_size + chosen * weights.expert_size + logits
    return 2 * products + _attention_flops(config, mesh, rows)


def _attention_flops(config: ModelConfig, mesh: MeshShape, rows: Rows) -> float:
    """Of the recurrence and of softmax attention, without the projections."""
    plan = layer_plan(config)
    lightning = sum(layer.attention == "lightning" for layer in plan)
    found = 0.0
    if (att := config.lightning) is not None:
        heads, d = att.num_heads // mesh.tensor, att.head_dim
        # Decode: decay, outer product, sum and a product with q. Prefill: within a block q k^T
        # and its product with v; between blocks k^T v and q S.
        a_row = 5 * d * d if rows.is_decode else 4 * _CHUNK * d + 4 * d * d
        found += lightning * rows.count * heads * a_row
    softmax = len(plan) - lightning
    if (att := config.gqa) is not None:
        found += softmax * rows.pairs * (att.num_heads // mesh.tensor) * 4 * att.head_dim
    if (att := config.mla) is not None:
        width = 2 * (att.kv_lora_rank + att.rope_dim) + 2 * att.kv_lora_rank
        found += softmax * rows.pairs * (att.num_heads // mesh.tensor) * width
    return found


def interconnect_seconds(
    config: ModelConfig, topology: Topology, mesh: MeshShape, load: Workload, rows: Rows
) -> float:
    """Of all messages of a step, as the step sends them."""
    plan, d = layer_plan(config), config.hidden_size
    lightning = sum(layer.attention == "lightning" for layer in plan)
    wide = rows.count * d * _FLOAT32
    # The embedding, and of each layer the output of attention and of the feed-forward part.
    seconds = (2 * len(plan) + 1) * 2 * _gather_seconds(topology, wide, mesh.tensor)
    if config.lightning is not None:
        here, of_group = norm_parts(config.lightning, mesh.tensor)
        if of_group > 1:
            means = rows.count * _FLOAT32 * here * mesh.tensor
            seconds += lightning * _gather_seconds(topology, means, mesh.tensor)
    logits = rows.sequences * config.vocab_size * _FLOAT32
    seconds += _gather_seconds(topology, logits, mesh.tensor)
    # There in the model's dtype, back in float32.
    moved = rows.count * d * moved_rows(config, mesh)
    moe_layers = sum(layer.mlp == "moe" for layer in plan)
    for size in (moved * ITEM_BYTES[load.dtype], moved * _FLOAT32):
        seconds += moe_layers * _gather_seconds(topology, size, mesh.expert, stride=mesh.tensor)
    return seconds


def moved_rows(config: ModelConfig, mesh: MeshShape) -> float:
    """How many rows the exchange moves for one, over a device's links: one a shard where all are
    gathered; where choices are sent, those whose expert is in this device's share of each shard."""
    if not footprint.sends(config, mesh):
        return mesh.expert
    whole, _ = tensor_axes(config, mesh)
    return config.moe.num_experts_per_token / whole


def _gather_seconds(topology: Topology, num_bytes: float, devices: int, stride: int = 1) -> float:
    """Of putting so many bytes together on every device from the parts of each, or of summing
    what all hold into parts: a sum that all get is both."""
    return topology.exchange_seconds(num_bytes * (devices - 1) / devices, devices, stride)
