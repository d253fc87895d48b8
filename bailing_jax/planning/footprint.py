"""Bytes of one device: weights, recurrent state, pages, and an estimate of temporaries.

Weights are added up from the parameter description and the sharding table, state and pages from
the config: what the arrays of a device hold, without a compiler's padding. Devices hold alike
except where the sequences do not divide by the shards; a shard is planned with room for one more.

With float8_e4m3fn weights a matrix keeps one byte an element and a float32 scale for each output
channel (a row of the checkpoint's matrix). The embedding table, the head, the router and everything
that is no matrix keep their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bailing_jax.config import Mla, ModelConfig
from bailing_jax.layer_plan import layer_plan
from bailing_jax.mesh import MeshShape
from bailing_jax.params import Param
from bailing_jax.planning.chips import Chip
from bailing_jax.planning.model import PlannedModel
from bailing_jax.planning.workload import FP8, ITEM_BYTES, PAGE_SIZE, Workload
from bailing_jax.sharding import local_shape

_FLOAT32 = 4
# What gathered rows and the experts' results may take, as in bailing_jax.layers.expert_exchange.
GATHERED_BYTES, RESULT_BYTES = 2**29, 2**28
# Arrays of the size of the logits that choosing tokens keeps at once. With _MARGIN 9.8; libtpu
# 0.0.42 took 9.4 for Ring-mini-linear-2.0's decode of 64 rows (359 MiB).
_SAMPLED_COPIES = 7
_NEVER_FP8 = ("vocab", "router_experts")
# What a step's buffers come to beyond those that are counted: XLA keeps some of two layers at once.
_MARGIN = 1.4


@dataclass(frozen=True)
class Footprint:
    """Bytes of one device.

    Attributes:
        needs: by purpose: weights, recurrent_state, pages, temporaries (the estimate).
        slots: recurrent slots of a shard, without NULL.
        pages: pages of a shard, without NULL.
    """

    needs: Mapping[str, int]
    slots: int
    pages: int

    @property
    def total_bytes(self) -> int:
        """All that a device needs."""
        return sum(self.needs.values())


def footprint(model: PlannedModel, chip: Chip, mesh: MeshShape, load: Workload) -> Footprint:
    """What a device of the mesh needs for the load, every sequence at full length."""
    config = model.config
    slots = load.decode_rows(mesh)
    pages = slots * load.pages_a_sequence
    return Footprint(
        needs={
            "weights": weight_bytes(model, mesh, load),
            "recurrent_state": (slots + 1) * slot_bytes(config, chip, mesh, load),
            "pages": (pages + 1) * page_bytes(config, chip, mesh, load),
            "temporaries": temporary_bytes(config, chip, mesh, load),
        },
        slots=slots,
        pages=pages,
    )


def weight_bytes(model: PlannedModel, mesh: MeshShape, load: Workload) -> int:
    """Of all parameters of a device."""
    return sum(
        kind.count * param_bytes(model.config, kind.param, mesh, load) for kind in model.kinds
    )


def param_bytes(config: ModelConfig, param: Param, mesh: MeshShape, load: Workload) -> int:
    """Of a device's part of one parameter, its scales included."""
    shape = local_shape(config, param, mesh)
    size = math.prod(shape)
    if load.weight_dtype == FP8 and is_matrix(param):
        return size * ITEM_BYTES[FP8] + size // shape[input_axis(param)] * _FLOAT32
    dtype = "float32" if param.dtype == "float32" else load.dtype
    return size * ITEM_BYTES[dtype]


def is_matrix(param: Param) -> bool:
    """Whether it is one of the matrices that fp8 is for."""
    return len(param.shape) > 1 and not set(param.axes) & set(_NEVER_FP8)


def input_axis(param: Param) -> int:
    """The dimension that a product sums over in the checkpoint's matrix [out, in]."""
    source = param.sources[0]
    return source.order.index(len(source.order) - 1) + (source.index is not None)


def slot_bytes(config: ModelConfig, chip: Chip, mesh: MeshShape, load: Workload) -> int:
    """Of one sequence's recurrent state in all layers, as `StateSpec.whole_lanes` has it."""
    if (att := config.lightning) is None:
        return 0
    layers = sum(layer.attention == "lightning" for layer in layer_plan(config))
    heads = att.num_heads // mesh.tensor
    width = att.state_width if chip.is_tpu else att.head_dim
    return layers * heads * att.head_dim * width * ITEM_BYTES[load.state_dtype]


def page_bytes(config: ModelConfig, chip: Chip, mesh: MeshShape, load: Workload) -> int:
    """Of one page in all layers."""
    return PAGE_SIZE * token_bytes(config, chip, mesh, load)


def token_bytes(config: ModelConfig, chip: Chip, mesh: MeshShape, load: Workload) -> int:
    """Of what the pages keep of one token in all layers: latents whole; key-value heads divided,
    and copied where there are fewer than devices."""
    layers = sum(layer.attention != "lightning" for layer in layer_plan(config))
    width = 0
    if (att := config.gqa) is not None:
        width = 2 * max(1, att.num_kv_heads // mesh.tensor) * att.head_dim
    elif (att := config.mla) is not None:
        width = latent_width(att, chip)
    return layers * width * ITEM_BYTES[load.dtype]


def latent_width(mla: Mla, chip: Chip) -> int:
    """Channels a token's latent and RoPE take, as `StateSpec.whole_lanes` has it."""
    return mla.page_width if chip.is_tpu else mla.kv_lora_rank + mla.rope_dim


def temporary_bytes(config: ModelConfig, chip: Chip, mesh: MeshShape, load: Workload) -> int:
    """An estimate of what the largest step allocates while it runs: a mixed one, with every decode
    row and a whole chunk of prompt."""
    decode, item = load.decode_rows(mesh), ITEM_BYTES[load.dtype]
    rows = decode + load.prefill_chunk
    stream = rows * config.hidden_size * (2 * item + _FLOAT32)
    logit_rows = decode + load.segments(mesh)
    logits = _SAMPLED_COPIES * logit_rows * config.vocab_size * _FLOAT32
    attention = _attention_bytes(config, chip, mesh, rows, item)
    layer = max(attention, _expert_bytes(config, mesh, rows, item))
    return int(_MARGIN * (stream + max(layer, logits)))


def _attention_bytes(config: ModelConfig, chip: Chip, mesh: MeshShape, rows: int, item: int) -> int:
    """Projections and their float32 forms."""
    found = 0
    if (att := config.lightning) is not None:
        found = rows * att.num_heads * att.head_dim // mesh.tensor * (4 * item + 4 * _FLOAT32)
    if (att := config.gqa) is not None:
        heads = att.num_heads // mesh.tensor
        found = max(found, rows * heads * att.head_dim * (3 * item + 3 * _FLOAT32))
    if (att := config.mla) is not None:
        heads = att.num_heads // mesh.tensor
        latent = latent_width(att, chip)
        found = max(found, rows * heads * latent * (2 * item + 2 * _FLOAT32))
    return found


def _expert_bytes(config: ModelConfig, mesh: MeshShape, rows: int, item: int) -> int:
    """Rows of all shards that share the experts and their sums, and of those that the experts work
    on at a time each choice's result, by expert and once more by row."""
    d, gathered = config.hidden_size, 0
    results = config.moe.num_experts_per_token * d * 2 * _FLOAT32
    if mesh.expert > 1:
        # Sent choices have room for twice as many, and come back into as many rows.
        choices = config.moe.num_experts_per_token
        moved = 3 * choices if sends(config, mesh) else mesh.expert
        row = moved * d * (item + _FLOAT32)
        blocks = num_blocks(rows, row, GATHERED_BYTES)
        gathered = rows // blocks * row
        rows = rows // blocks * moved
    if mesh.expert * mesh.tensor > 1:
        rows //= num_blocks(rows, results, RESULT_BYTES)
    return gathered + rows * results


def sends(config: ModelConfig, mesh: MeshShape) -> bool:
    """Whether choices are sent to their experts' shards, in place of gathering all rows."""
    return mesh.expert > 2 * config.moe.num_experts_per_token


def num_blocks(rows: int, row_bytes: int, allowed_bytes: int) -> int:
    """Into how many equal blocks rows are cut, so that one takes about what is allowed."""
    wanted = min(rows, -(-rows * row_bytes // allowed_bytes))
    return next(n for n in range(wanted, rows + 1) if rows % n == 0)
