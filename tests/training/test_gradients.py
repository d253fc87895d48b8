"""The training loss and its gradient against the float64 model of the tests.

The reference runs each sequence alone, token by token. Its loss is differentiated by central
differences, along one random direction in every parameter.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
from random_checkpoints import V2, random_tensors
from reference_numpy import reference_forward
from slow import slow_but
from tiny_models import LATENT, LINEAR, SEED
from tolerances import TOLERANCES

from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.params import describe
from bailing_jax.training.export import checkpoint_tensors
from bailing_jax.training.loss import pack_losses, to_batch
from bailing_jax.training.packs import Pack, PackSize
from bailing_jax.training.start import weights_of

pytestmark = pytest.mark.unoptimised

# Longer than a chunk of lightning attention, a full window, one token, a chunk's border.
LENGTHS = (90, 128, 1, 64)
SIZE = PackSize(rows=300, segments=6, window=128)
GROUPED: dict[str, Any] = {
    **LINEAR, "architectures": [V2], "model_type": "bailing_moe_v2", "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS = {"linear": LINEAR, "latent": LATENT, "grouped": GROUPED}
STEP = 1e-5


def random_pack(rng: np.random.Generator, vocab: int) -> Pack:
    """Rows of nobody hold tokens and targets too, with weight zero."""
    tokens, targets = (rng.integers(0, vocab, SIZE.rows).astype(np.int32) for _ in range(2))
    weights = np.zeros(SIZE.rows, np.float32)
    weights[: sum(LENGTHS)] = rng.choice([0.0, 0.01, 1.0], sum(LENGTHS))
    return Pack(tokens, targets, weights, LENGTHS)


def reference_loss(config: dict[str, Any], tensors: dict[str, np.ndarray], pack: Pack) -> float:
    """Weighted negative log likelihood per weight, in float64."""
    total, start = 0.0, 0
    for length in pack.lengths:
        rows = slice(start, start + length)
        start += length
        result = reference_forward(config, tensors, pack.tokens[rows])
        logits = result.logits - result.logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= (pack.weights[rows] * log_p[np.arange(length), pack.targets[rows]]).sum()
    return total / pack.weights.astype(np.float64).sum()


@pytest.mark.parametrize(
    ("name", "remat"),
    slow_but([("latent", False), ("linear", True)], product(CONFIGS, [False, True])),
)
def test_loss_and_gradient_of_every_parameter(rng, name, remat):
    hf_config = CONFIGS[name]
    config = ModelConfig.from_hf(hf_config)
    tensors = random_tensors(hf_config, SEED)
    exact = {key: value.astype(np.float64) for key, value in tensors.items()}
    weights = weights_of(config, tensors)
    pack = random_pack(rng, config.vocab_size)
    options = RuntimeOptions("float32", kernels="train")

    def loss(weights):
        losses = pack_losses(weights, to_batch(pack, SIZE), config, options, remat=remat)
        return losses.nll / losses.weight

    got, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    want = reference_loss(hf_config, exact, pack)
    assert abs(got - want) <= TOLERANCES["training_loss"] * want
    for param in describe(config):
        ours = np.asarray(gradient[param.path], np.float64)
        if param.path.endswith("expert_bias"):
            assert (ours == 0).all()  # it only chooses
            continue
        direction = rng.standard_normal(param.shape)
        direction /= np.linalg.norm(direction)
        moved = {p.path: np.zeros(p.shape) for p in describe(config)} | {param.path: direction}
        along = checkpoint_tensors(config, moved, np.dtype(np.float64))
        ahead, behind = (
            reference_loss(
                hf_config, {key: exact[key] + sign * STEP * along[key] for key in exact}, pack
            )
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * STEP)
        # A random direction meets about 1 / sqrt(size) of the gradient.
        scale = np.linalg.norm(ours) / np.sqrt(param.size)
        error = abs((ours * direction).sum() - slope) / (abs(slope) + scale)
        assert error <= TOLERANCES["training_gradient"], (param.path, error, slope)
