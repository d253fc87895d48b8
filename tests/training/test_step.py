"""One optimizer step: what it minimises, how parts add up, and what moves which weight.

Compiling a step takes ten times as long as running one, so the tests share three of them, and one
program for what they should come to.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from tiny_models import LATENT
from training_cases import tiny_options

from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.training.loss import Losses, pack_losses, to_batch
from bailing_jax.training.options import DataShare, TrainOptions
from bailing_jax.training.packs import Pack, PackSize
from bailing_jax.training.step import initial_state, learning_rate, make_step, stack_parts

pytestmark = pytest.mark.unoptimised

CONFIG = ModelConfig.from_hf(LATENT)
SIZE = PackSize(rows=96, segments=3, window=64)
RUNTIME = RuntimeOptions("float32", kernels="train")
BALANCE = 0.3


def random_pack(rng: np.random.Generator, lengths: tuple[int, ...]) -> Pack:
    used = sum(lengths)
    tokens, targets = (rng.integers(0, 300, SIZE.rows).astype(np.int32) for _ in range(2))
    weights = np.zeros(SIZE.rows, np.float32)
    weights[:used] = rng.choice([0.1, 1.0], used)
    return Pack(tokens, targets, weights, lengths)


def batches(*sources: list[Pack]):
    return [stack_parts([to_batch(pack, SIZE) for pack in parts]) for parts in sources]


@functools.cache
def step_of(choices: TrainOptions):
    """The step of these options, compiled once."""
    return make_step(choices, CONFIG)


@jax.jit
def reference(weights, batch, nll_scale, balance_scale):
    """The gradient of a pack's scaled nll and mean balance loss, and the pack's losses."""

    def objective(weights):
        losses = pack_losses(weights, batch, CONFIG, RUNTIME)
        balance = sum(stats.balance for stats in losses.routers.values()) / len(losses.routers)
        return nll_scale * losses.nll + balance_scale * balance, losses

    gradient, losses = jax.grad(objective, has_aux=True)(weights)
    return gradient, losses


def losses_of(weights, pack: Pack) -> Losses:
    return reference(weights, to_batch(pack, SIZE), 1.0, 0.0)[1]


def options(**changed) -> TrainOptions:
    return tiny_options("data", **changed)


def host(weights) -> dict[str, np.ndarray]:
    """A copy that outlives donation."""
    return {path: np.array(array) for path, array in weights.items()}


def summed() -> TrainOptions:
    """Everything a step adds up: two sources of two parts each, and the balance loss."""
    return options(
        data=(DataShare("a", 3), DataShare("b", 1)),
        accumulate=2, learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, balance_loss=BALANCE,
    )  # fmt: skip


def clipped() -> TrainOptions:
    """Decay, the bias's rate and a tiny limit of the gradient; the learning rate falls to 0."""
    return options(
        bias_rate=0.02, weight_decay=0.5, learning_rate=1e-2, clip_norm=1e-9, warmup_steps=0,
        steps=1, final_learning_rate=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sums():
    """A step of `summed`: its packs, the weights before and after it, and what it told."""
    rng = np.random.default_rng(0)
    first = [random_pack(rng, (40, 3)), random_pack(rng, (64, 1, 30))]
    second = [random_pack(rng, (5,)), random_pack(rng, (20, 2))]
    state = initial_state(summed(), CONFIG)
    before = host(state.weights)
    after, metrics = step_of(summed())(state, batches(first, second))
    return (first, second), before, after, metrics


def test_parts_add_up_to_the_loss_per_weight(sums):
    """Parts of different weight give the loss and the step of all together."""
    sources, before, after, metrics = sums
    assert len({float(pack.weights.sum()) for packs in sources for pack in packs}) == 4
    want, gradient = 0.0, {path: np.zeros(array.shape) for path, array in before.items()}
    for packs, share in zip(sources, (0.75, 0.25), strict=True):
        scale = share / sum(float(pack.weights.sum()) for pack in packs)
        for pack in packs:
            part, losses = reference(before, to_batch(pack, SIZE), scale, BALANCE / 4)
            balance = np.mean([float(stats.balance) for stats in losses.routers.values()])
            want += scale * float(losses.nll) + BALANCE / 4 * balance
            gradient = {path: gradient[path] + np.asarray(g) for path, g in part.items()}
    np.testing.assert_allclose(metrics.loss, want, rtol=1e-5)
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    # Adam's first step is the sign of the gradient times the rate.
    for path, g in gradient.items():
        moved = np.asarray(after.weights[path]) - before[path]
        clear = np.abs(g) > 1e-4 * norm
        if not path.endswith("expert_bias"):
            np.testing.assert_allclose(moved[clear], -1e-3 * np.sign(g)[clear], rtol=2e-2)
    assert int(after.step) == 1


def test_sources_count_by_their_share(sums):
    """However many tokens each of them has."""
    sources, before, _, metrics = sums
    each = [[losses_of(before, pack) for pack in packs] for packs in sources]
    weights = [sum(float(one.weight) for one in parts) for parts in each]
    assert weights[0] > 4 * weights[1]
    want = [sum(float(p.nll) for p in parts) / w for parts, w in zip(each, weights, strict=True)]
    np.testing.assert_allclose(metrics.source_loss, want, rtol=1e-5)
    # What is left of the loss is the balance loss.
    balances = [float(s.balance) for parts in each for p in parts for s in p.routers.values()]
    shared = 0.75 * want[0] + 0.25 * want[1]
    np.testing.assert_allclose(metrics.loss, shared + BALANCE * np.mean(balances), rtol=1e-5)
    right = [
        sum(float(p.correct) for p in parts) / w for parts, w in zip(each, weights, strict=True)
    ]
    np.testing.assert_allclose(metrics.source_accuracy, right, atol=1e-6)


def test_the_balance_loss_is_added(sums):
    """It stands beside the sources' losses, which are told without it."""
    sources, before, _, metrics = sums
    routers = [losses_of(before, pack).routers for packs in sources for pack in packs]
    balance = np.mean([float(stats.balance) for one in routers for stats in one.values()])
    assert balance > 1  # 1 is the least, at even load
    told = float(metrics.source_loss @ np.array([0.75, 0.25]))
    np.testing.assert_allclose(float(metrics.loss) - told, BALANCE * balance, rtol=1e-4)


def test_the_router_bias_moves_towards_even_load(rng):
    """By the rate, up for experts chosen too little, down for the others; nothing else moves it."""
    pack = random_pack(rng, (64, 20, 8))
    state = initial_state(clipped(), CONFIG)
    before = host(state.weights)
    routers = losses_of(before, pack).routers
    assert sorted(routers) == ["model.layers.1", "model.layers.2"]
    after, metrics = step_of(clipped())(state, batches([pack]))
    for layer, stats in routers.items():
        load = np.asarray(stats.load)
        np.testing.assert_allclose(load.sum(), 1, rtol=1e-6)
        # Only rows that exist were counted: 92 rows with 2 choices each.
        counts = load * 2 * 92
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
        bias = f"{layer}.mlp.gate.expert_bias"
        np.testing.assert_array_equal(
            np.asarray(after.weights[bias]) - before[bias],
            np.float32(0.02) * np.sign(load.mean() - load),
        )
    worst = max(float(s.load.max() / s.load.mean()) for s in routers.values())
    np.testing.assert_allclose(metrics.worst_load, worst, rtol=1e-5)


def test_training_evens_the_load(rng):
    """A router whose bias favours one expert by far uses all of them after some steps."""
    pack = random_pack(rng, (64, 30))
    state = initial_state(clipped(), CONFIG)
    bias = "model.layers.1.mlp.gate.expert_bias"
    state.weights[bias] = state.weights[bias].at[0].set(0.5)
    step = step_of(clipped())
    loads = []
    # From the second step on the learning rate is 0: only the biases move.
    for _ in range(60):
        state, metrics = step(state, batches([pack]))
        loads.append(float(metrics.worst_load))
    assert loads[0] > 2.5
    assert loads[-1] < 1.5


def test_matrices_decay_and_nothing_else():
    """With nothing to learn (all weights of the loss zero) only the decay moves weights."""
    pack = Pack(*(np.zeros(SIZE.rows, t) for t in (np.int32, np.int32, np.float32)), (10,))
    state = initial_state(clipped(), CONFIG)
    before = host(state.weights)
    after, _ = step_of(clipped())(state, batches([pack]))
    for path, old in before.items():
        if path.endswith("expert_bias"):
            continue  # moves by the load, see above
        decays = old.ndim >= 2 and path != "model.word_embeddings.weight"
        want = old * (1 - 1e-2 * 0.5) if decays else old
        np.testing.assert_allclose(after.weights[path], want, rtol=1e-5, err_msg=path)


def test_the_gradient_is_clipped(rng):
    """A tiny limit makes Adam's epsilon count: steps get shorter, the norm is told as it was."""
    pack = random_pack(rng, (60, 30))
    state = initial_state(clipped(), CONFIG)
    before = host(state.weights)
    after, metrics = step_of(clipped())(state, batches([pack]))
    gradient, losses = reference(before, to_batch(pack, SIZE), 1 / float(pack.weights.sum()), 0.0)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
    assert norm > 1e-2
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    np.testing.assert_allclose(metrics.loss, losses.nll / losses.weight, rtol=1e-5)
    path = "lm_head.weight"
    moves = np.asarray(after.weights[path]) - (1 - 1e-2 * 0.5) * before[path]
    # Without the limit every clear entry moves by the rate.
    assert (np.abs(np.asarray(gradient[path])) > 1e-4 * norm).any()
    assert 0 < np.abs(moves).max() < 0.5 * 1e-2


def test_the_learning_rate_warms_up_and_falls():
    choices = options(steps=100, warmup_steps=10, learning_rate=0.1, final_learning_rate=0.2)
    rate = learning_rate(choices)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(0.05)
    assert float(rate(10)) == pytest.approx(0.1)
    assert float(rate(55)) == pytest.approx(0.1 * (0.2 + 0.8 / 2))  # half of the cosine
    assert float(rate(100)) == pytest.approx(0.02)


@pytest.mark.slow
def test_bfloat16_computes_on_float32_masters(rng):
    """Updates far below a bfloat16 weight's last bit add up."""
    pack = random_pack(rng, (60, 30))
    choices = options(dtype="bfloat16", learning_rate=1e-6, warmup_steps=0, weight_decay=0.0)
    state = initial_state(choices, CONFIG)
    before = host(state.weights)
    step = step_of(choices)
    for _ in range(3):
        state, metrics = step(state, batches([pack]))
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(state.weights))
    moved = np.abs(np.asarray(state.weights["lm_head.weight"]) - before["lm_head.weight"])
    assert 2e-6 < np.median(moved) < 4e-6
    exact = losses_of(before, pack)
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
