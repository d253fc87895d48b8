"""The loss of one pack, through the model that serves: same layers, same loop.

The layers run with the "train" implementations (dense attention inside a segment, dense experts,
the chunks of lightning attention joined in parallel), every segment starts fresh, no pages are
written. What a router did is returned beside the loss: its load moves the selection bias, and its
balance loss may be added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.batch import BatchLayout, pack
from bailing_jax.config import ModelConfig
from bailing_jax.layers.decoder_layer import DecoderLayer
from bailing_jax.layers.moe import MoE
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import build, param_dtype
from bailing_jax.row import Row
from bailing_jax.state import StateSpec, allocate
from bailing_jax.training.packs import WINDOW_STEP, Pack, PackSize

# Path -> float32 array: the master weights, and everything shaped like them.
Weights = Mapping[str, jax.Array]


class Batch(NamedTuple):
    """One pack on the device.

    Attributes:
        layout: the step; all rows are prefill rows.
        targets: int32 [T].
        weights: float32 [T].
    """

    layout: BatchLayout
    targets: jax.Array
    weights: jax.Array


class RouterStats(NamedTuple):
    """What one router did with the rows that exist.

    Attributes:
        load: float32 [e], the share of choices that went to each expert; sums to 1.
        balance: float32 [], e times the sum over experts of load times mean affinity share;
            1 when both are even.
    """

    load: jax.Array
    balance: jax.Array


class Losses(NamedTuple):
    """Sums over one pack, to be divided by a step's total weight.

    Attributes:
        nll: weighted negative log likelihood, nats.
        weight: sum of the weights.
        correct: weighted count of targets that are the most likely token.
        routers: one entry a MoE layer, by layer number.
    """

    nll: jax.Array
    weight: jax.Array
    correct: jax.Array
    routers: dict[str, RouterStats]


def to_batch(packed: Pack, size: PackSize) -> Batch:
    """Lay a pack out as a step of fresh segments."""
    width = -(-size.window // WINDOW_STEP)
    starts = [0]
    for length in packed.lengths:
        starts.append(starts[-1] + length)
    rows = [
        Row(
            packed.tokens[starts[i] : starts[i + 1]],  # type: ignore[arg-type]
            slot=i + 1,
            pages=range(1 + i * width, 1 + (i + 1) * width),
            context=0,
        )
        for i in range(len(packed.lengths))
    ]
    layout = pack(
        [],
        rows,
        num_decode=0,
        num_prefill=size.rows,
        num_segments=size.segments,
        page_size=WINDOW_STEP,
        pages_a_sequence=width,
    )
    return Batch(layout, packed.targets, packed.weights)  # type: ignore[arg-type]


def pack_losses(
    weights: Weights,
    batch: Batch,
    config: ModelConfig,
    options: RuntimeOptions,
    *,
    remat: bool = False,
) -> Losses:
    """The losses of one pack.

    Args:
        weights: master weights by path, float32.
        batch: from `to_batch`.
        config: the model.
        options: dtype of the computation; kernels "train".
        remat: recompute each layer in the backward pass.
    """
    model = build(
        config, options, lambda param: weights[param.path].astype(param_dtype(param, options))
    )
    num_segments = batch.layout.segment_slots.shape[0]
    # The pages are not touched: one stands for all.
    spec = StateSpec(num_segments + 1, 1, options.dtype, page_size=WINDOW_STEP)
    routers: dict[str, RouterStats] = {}
    number = iter(range(config.num_layers))

    def run_layer(graphdef, params, x, leaf, layout, log_decay):
        def run(params, x, leaf):
            return _watched(nnx.merge(graphdef, params), x, leaf, layout, log_decay)

        x, leaf, stats = (jax.checkpoint(run) if remat else run)(params, x, leaf)
        layer = next(number)
        if stats is not None:
            routers[f"model.layers.{layer}"] = stats
        return x, leaf

    x, _, _ = model(allocate(config, spec), batch.layout, run_layer)
    logits = model.logits(x)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
        logits, batch.targets[:, None], axis=1
    ).squeeze(1)
    correct = (logits.argmax(axis=-1) == batch.targets) * batch.weights
    # A select, not a product: rows of nobody may hold anything.
    nll = jnp.where(batch.weights > 0, nll * batch.weights, 0)
    return Losses(nll.sum(), batch.weights.sum(), correct.sum(), routers)


def _watched(
    layer: DecoderLayer,
    x: jax.Array,
    leaf: jax.Array,
    layout: BatchLayout,
    log_decay: jax.Array,
) -> tuple[jax.Array, jax.Array, RouterStats | None]:
    """A layer as `DecoderLayer.__call__` runs it, and what its router did."""
    exists = layout.exists()
    h, leaf = layer.attend(x, leaf, layout, log_decay)
    normed = layer.post_attention_layernorm(h)
    if not isinstance(layer.mlp, MoE):
        return h + layer.mlp(normed, exists), leaf, None
    scores = layer.mlp.gate.scores(normed)
    ids, weights = layer.mlp.gate.choose(scores)
    y = layer.mlp.mix(normed, exists, ids, weights)
    return h + y, leaf, _router_stats(scores, ids, exists)


def _router_stats(scores: jax.Array, ids: jax.Array, exists: jax.Array) -> RouterStats:
    rows = jnp.maximum(exists.sum(), 1)
    experts, choices = scores.shape[1], ids.shape[1]
    chosen = jax.nn.one_hot(ids, experts).sum(axis=1)
    load = jnp.where(exists[:, None], chosen, 0).sum(axis=0) / (rows * choices)
    affinity = scores / (scores.sum(axis=1, keepdims=True) + 1e-20)
    mean = jnp.where(exists[:, None], affinity, 0).sum(axis=0) / rows
    return RouterStats(load, experts * (load * mean).sum())
