"""One optimizer step: gradients of every source and part, AdamW, the routers' bias.

    loss = sum over sources of share * (weighted nll / weight)  +  balance_loss * mean balance
    expert_bias += bias_rate * sign(mean load - load)       (auxiliary-loss-free balancing,
                                                             Wang et al., arXiv 2408.15664)

The selection bias takes no gradient: it only chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bailing_jax.checkpoint.random_weights import draw
from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.params import describe
from bailing_jax.training.loss import Batch, Weights, pack_losses
from bailing_jax.training.options import TrainOptions


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: int32 [], steps done.
        weights: float32 by path.
        optimizer: optax's state.
    """

    step: jax.Array
    weights: dict[str, jax.Array]
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """What a step reports, float32 scalars.

    Attributes:
        loss: that was minimised.
        source_loss: nats a weighted token, one entry a source.
        source_accuracy: share of weighted tokens that were the most likely one.
        grad_norm: before clipping.
        worst_load: the largest expert load over the mean load, over all routers; 1 is even.
    """

    loss: jax.Array
    source_loss: jax.Array
    source_accuracy: jax.Array
    grad_norm: jax.Array
    worst_load: jax.Array


def learning_rate(options: TrainOptions) -> optax.Schedule:
    """Linear warm-up, then a cosine to the final rate at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=max(options.steps, options.warmup_steps + 1),
        end_value=options.learning_rate * options.final_learning_rate,
    )


def optimizer(options: TrainOptions) -> optax.GradientTransformation:
    """Clipped AdamW; matrices decay, norms, biases and embeddings do not."""

    def decays(weights: Weights) -> dict[str, bool]:
        return {
            path: array.ndim >= 2 and "word_embeddings" not in path
            for path, array in weights.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            learning_rate(options),
            b1=0.9,
            b2=options.beta2,
            weight_decay=options.weight_decay,
            mask=decays,
        ),
    )


def initial_state(
    options: TrainOptions, config: ModelConfig, given: Mapping[str, np.ndarray] | None = None
) -> TrainState:
    """Step 0: random weights of the seed, or the given ones."""
    if given is None:
        given = {param.path: draw(param, options.seed) for param in describe(config)}
    weights = {path: jnp.asarray(array, jnp.float32) for path, array in given.items()}
    return TrainState(jnp.zeros((), jnp.int32), weights, optimizer(options).init(weights))


def make_step(
    options: TrainOptions, config: ModelConfig
) -> Callable[[TrainState, Sequence[Batch]], tuple[TrainState, Metrics]]:
    """The jitted step; it takes one batch a source, parts stacked on a leading axis.

    The state is donated.
    """
    runtime = RuntimeOptions(options.dtype, kernels="train")
    shares = jnp.asarray([source.share for source in options.shares()])

    def objective(weights, part, totals):
        """This part's share of the step's loss, and what it saw."""
        losses = [
            pack_losses(weights, batch, config, runtime, remat=options.remat) for batch in part
        ]
        nll = jnp.stack([one.nll for one in losses])
        loss = (shares * nll / totals).sum()
        if options.balance_loss and losses[0].routers:
            balance = [stats.balance for one in losses for stats in one.routers.values()]
            loss += options.balance_loss * jnp.stack(balance).mean() / options.accumulate
        correct = jnp.stack([one.correct for one in losses])
        load = {
            path: (shares[:, None] * jnp.stack([one.routers[path].load for one in losses])).sum(0)
            for path in losses[0].routers
        }
        return loss, (nll, correct, load)

    def step(state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Metrics]:
        totals = jnp.stack([jnp.maximum(batch.weights.sum(), 1e-9) for batch in batches])

        def part_sums(part):
            return jax.value_and_grad(objective, has_aux=True)(state.weights, part, totals)

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, part_sums(part)), None

        first = jax.tree.map(lambda x: x[0], tuple(batches))
        if options.accumulate == 1:
            total = part_sums(first)
        else:
            shapes = jax.eval_shape(part_sums, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(add_part, zeros, tuple(batches))
        (loss, (nll, correct, load)), grads = total
        updates, opt_state = optimizer(options).update(grads, state.optimizer, state.weights)
        weights: dict[str, jax.Array] = {**optax.apply_updates(state.weights, updates)}  # type: ignore
        for path, parts_load in load.items():
            bias = f"{path}.mlp.gate.expert_bias"
            uneven = parts_load.mean() - parts_load
            weights[bias] = state.weights[bias] + options.bias_rate * jnp.sign(uneven)
        worst = [parts_load.max() / parts_load.mean() for parts_load in load.values()]
        metrics = Metrics(
            loss=loss,
            source_loss=nll / totals,
            source_accuracy=correct / totals,
            grad_norm=optax.tree.norm(grads),
            worst_load=jnp.stack(worst).max() if worst else jnp.ones(()),
        )
        return TrainState(state.step + 1, weights, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def stack_parts(parts: Sequence[Batch]) -> Batch:
    """Batches of one source as one, on a new leading axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
