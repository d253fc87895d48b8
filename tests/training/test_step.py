"""One optimizer step: what it minimises, how parts add up, and what moves which weight."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_models import LATENT
from training_cases import tiny_options

from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.training.loss import pack_losses, to_batch
from bailing_jax.training.options import DataShare, TrainOptions
from bailing_jax.training.packs import Pack, PackSize
from bailing_jax.training.step import initial_state, learning_rate, make_step, stack_parts

CONFIG = ModelConfig.from_hf(LATENT)
SIZE = PackSize(rows=96, segments=3, window=64)
RUNTIME = RuntimeOptions("float32", kernels="train")


def random_pack(rng: np.random.Generator, lengths: tuple[int, ...]) -> Pack:
    used = sum(lengths)
    tokens, targets = (rng.integers(0, 300, SIZE.rows).astype(np.int32) for _ in range(2))
    weights = np.zeros(SIZE.rows, np.float32)
    weights[:used] = rng.choice([0.1, 1.0], used)
    return Pack(tokens, targets, weights, lengths)


def batches(*sources: list[Pack]):
    return [stack_parts([to_batch(pack, SIZE) for pack in parts]) for parts in sources]


def options(**changed) -> TrainOptions:
    return tiny_options("data", **changed)


def host(weights) -> dict[str, np.ndarray]:
    """A copy that outlives donation."""
    return {path: np.array(array) for path, array in weights.items()}


def test_parts_add_up_to_the_loss_per_weight(rng):
    """Two parts of different weight give the loss and the step of both together."""
    packs = [random_pack(rng, (40, 3)), random_pack(rng, (64, 1, 30))]
    choices = options(accumulate=2, learning_rate=1e-3, warmup_steps=0, weight_decay=0.0)
    state = initial_state(choices, CONFIG)
    before = host(state.weights)
    after, metrics = make_step(choices, CONFIG)(state, batches(packs))

    def loss(weights):
        parts = [pack_losses(weights, to_batch(pack, SIZE), CONFIG, RUNTIME) for pack in packs]
        return sum(one.nll for one in parts) / sum(one.weight for one in parts)

    want, gradient = jax.jit(jax.value_and_grad(loss))(before)
    np.testing.assert_allclose(metrics.loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics.source_loss, [want], rtol=1e-5)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    # Adam's first step is the sign of the gradient times the rate.
    for path, g in gradient.items():
        moved = np.asarray(after.weights[path]) - before[path]
        clear = np.abs(g) > 1e-4 * norm
        if not path.endswith("expert_bias"):
            np.testing.assert_allclose(moved[clear], -1e-3 * np.sign(g)[clear], rtol=2e-2)
    assert int(after.step) == 1


def test_sources_count_by_their_share(rng):
    """However many tokens each of them has."""
    packs = [random_pack(rng, (64, 32)), random_pack(rng, (5,))]
    shares = (DataShare("a", 3), DataShare("b", 1))
    choices = options(data=shares)
    weights = host(initial_state(choices, CONFIG).weights)
    _, metrics = make_step(choices, CONFIG)(
        initial_state(choices, CONFIG), batches(packs[:1], packs[1:])
    )
    each = [pack_losses(weights, to_batch(pack, SIZE), CONFIG, RUNTIME) for pack in packs]
    want = [float(one.nll / one.weight) for one in each]
    np.testing.assert_allclose(metrics.source_loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, 0.75 * want[0] + 0.25 * want[1], rtol=1e-5)
    right = [float(one.correct / one.weight) for one in each]
    np.testing.assert_allclose(metrics.source_accuracy, right, atol=1e-6)


def test_the_router_bias_moves_towards_even_load(rng):
    """By the rate, up for experts chosen too little, down for the others; nothing else moves it."""
    pack = random_pack(rng, (64, 20, 8))
    choices = options(bias_rate=0.25, weight_decay=1.0, learning_rate=1e-9, warmup_steps=0)
    state = initial_state(choices, CONFIG)
    before = host(state.weights)
    routers = pack_losses(before, to_batch(pack, SIZE), CONFIG, RUNTIME).routers
    assert sorted(routers) == ["model.layers.1", "model.layers.2"]
    after, metrics = make_step(choices, CONFIG)(state, batches([pack]))
    for layer, stats in routers.items():
        load = np.asarray(stats.load)
        np.testing.assert_allclose(load.sum(), 1, rtol=1e-6)
        # Only rows that exist were counted: 92 rows with 2 choices each.
        counts = load * 2 * 92
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
        bias = f"{layer}.mlp.gate.expert_bias"
        np.testing.assert_array_equal(
            np.asarray(after.weights[bias]) - before[bias], 0.25 * np.sign(load.mean() - load)
        )
    worst = max(float(s.load.max() / s.load.mean()) for s in routers.values())
    np.testing.assert_allclose(metrics.worst_load, worst, rtol=1e-5)


def test_training_evens_the_load(rng):
    """A router whose bias favours one expert by far uses all of them after some steps."""
    pack = random_pack(rng, (64, 30))
    choices = options(bias_rate=0.02, learning_rate=1e-6, steps=60, warmup_steps=0)
    state = initial_state(choices, CONFIG)
    bias = "model.layers.1.mlp.gate.expert_bias"
    state.weights[bias] = state.weights[bias].at[0].set(0.5)
    step = make_step(choices, CONFIG)
    loads = []
    for _ in range(60):
        state, metrics = step(state, batches([pack]))
        loads.append(float(metrics.worst_load))
    assert loads[0] > 2.5
    assert loads[-1] < 1.5


def test_the_balance_loss_is_added(rng):
    pack = random_pack(rng, (60, 30))
    losses = []
    for weight in (0.0, 0.3):
        choices = options(balance_loss=weight)
        _, metrics = make_step(choices, CONFIG)(initial_state(choices, CONFIG), batches([pack]))
        losses.append(float(metrics.loss))
    weights = host(initial_state(options(), CONFIG).weights)
    routers = pack_losses(weights, to_batch(pack, SIZE), CONFIG, RUNTIME).routers
    balance = np.mean([float(stats.balance) for stats in routers.values()])
    assert balance > 1  # 1 is the least, at even load
    np.testing.assert_allclose(losses[1] - losses[0], 0.3 * balance, rtol=1e-4)


def test_matrices_decay_and_nothing_else():
    """With nothing to learn (all weights of the loss zero) only the decay moves weights."""
    pack = Pack(*(np.zeros(SIZE.rows, t) for t in (np.int32, np.int32, np.float32)), (10,))
    choices = options(learning_rate=1e-2, weight_decay=0.5, warmup_steps=0, bias_rate=0.0)
    state = initial_state(choices, CONFIG)
    before = host(state.weights)
    after, _ = make_step(choices, CONFIG)(state, batches([pack]))
    for path, old in before.items():
        decays = old.ndim >= 2 and path != "model.word_embeddings.weight"
        want = old * (1 - 1e-2 * 0.5) if decays else old
        np.testing.assert_allclose(after.weights[path], want, rtol=1e-5, err_msg=path)


def test_the_gradient_is_clipped(rng):
    """A tiny limit makes Adam's epsilon count: steps get shorter, the norm is told as it was."""
    pack = random_pack(rng, (60, 30))
    moves, norms = [], []
    for limit in (1e9, 1e-9):
        choices = options(clip_norm=limit, weight_decay=0.0, warmup_steps=0)
        state = initial_state(choices, CONFIG)
        before = host(state.weights)
        after, metrics = make_step(choices, CONFIG)(state, batches([pack]))
        moves.append(np.abs(np.asarray(after.weights["lm_head.weight"]) - before["lm_head.weight"]))
        norms.append(float(metrics.grad_norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert moves[1].max() < 0.5 * moves[0].max()


def test_the_learning_rate_warms_up_and_falls():
    choices = options(steps=100, warmup_steps=10, learning_rate=0.1, final_learning_rate=0.2)
    rate = learning_rate(choices)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(0.05)
    assert float(rate(10)) == pytest.approx(0.1)
    assert float(rate(55)) == pytest.approx(0.1 * (0.2 + 0.8 / 2))  # half of the cosine
    assert float(rate(100)) == pytest.approx(0.02)


def test_bfloat16_computes_on_float32_masters(rng):
    """Updates far below a bfloat16 weight's last bit add up."""
    pack = random_pack(rng, (60, 30))
    choices = options(dtype="bfloat16", learning_rate=1e-6, warmup_steps=0, weight_decay=0.0)
    state = initial_state(choices, CONFIG)
    before = host(state.weights)
    step = make_step(choices, CONFIG)
    for _ in range(3):
        state, metrics = step(state, batches([pack]))
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(state.weights))
    moved = np.abs(np.asarray(state.weights["lm_head.weight"]) - before["lm_head.weight"])
    assert 2e-6 < np.median(moved) < 4e-6
    exact = pack_losses(before, to_batch(pack, SIZE), CONFIG, RUNTIME)
    assert float(metrics.loss) == pytest.approx(float(exact.nll / exact.weight), rel=2e-2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"rows": 255, "accumulate": 2}, "a divisor of rows"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"beta2": 1.0}, "beta2 = 1"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"warmup_steps": 7}, "<= 6"),
        ({"data": ()}, "at least one source"),
        ({"data": (DataShare("a", 0.0),)}, "share of a"),
        ({"clip_norm": float("nan")}, "clip_norm"),
    ],
)
def test_options_that_make_no_sense(changed, said):
    from bailing_jax.errors import UserError

    with pytest.raises(UserError, match=said):
        options(**changed)
