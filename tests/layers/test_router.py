"""The router: group limit, bias, ties and weights, by hand-made scores and against float64.

Logits reach the router through an identity matrix, so that x is z.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from module_scope import scope_of
from reference_numpy import route, sigmoid
from tolerances import TOLERANCES

from bailing_jax.config import Moe
from bailing_jax.layers.moe import Router


def moe(experts: int, chosen: int, groups: int = 1, kept: int = 1, scaling: float = 1.0) -> Moe:
    return Moe(
        experts, chosen, groups, kept, expert_width=1, shared_width=0, scaling_factor=scaling
    )


def routed(config: Moe, z: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights of logits [t, e]."""
    arrays = {"weight": np.eye(config.num_experts, dtype=np.float32), "expert_bias": bias}
    router = Router(scope_of({k: v.astype(np.float32) for k, v in arrays.items()}), config)
    ids, weights = jax.jit(router)(jnp.asarray(z, jnp.float32))
    assert ids.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    assert ids.shape == weights.shape == (len(z), config.num_experts_per_token)
    return np.asarray(ids), np.asarray(weights)


def test_golden_router() -> None:
    z = 2 * np.sin(0.7 * np.arange(16) + 0.9)[None]
    bias = 0.05 * (7 * np.arange(16) % 5) - 0.1
    ids, weights = routed(moe(16, 4, groups=4, kept=2, scaling=2.5), z, bias)
    assert ids.tolist() == [[2, 1, 9, 11]]
    want = [[0.61097486, 0.65919003, 0.62141692, 0.60841819]]
    np.testing.assert_allclose(weights, want, rtol=TOLERANCES["router_weights"])


def test_r109_dropped_groups_are_masked_below_any_score() -> None:
    """Trap T20: masked with 0, a dropped group would win over a kept one of negative scores."""
    z = np.array([[0.0, 0.1, 2.0, -3.0]])
    bias = np.array([-2.0, -2.0, -2.9, -2.9])
    ids, _ = routed(moe(4, 2, groups=2, kept=1), z, bias)
    biased = sigmoid(z) + bias
    assert (biased < 0).all()
    # The groups score -2.98 and -4.87.
    assert ids.tolist() == [[1, 0]]
    masked_with_zero = np.where([True, True, False, False], biased[0], 0)
    assert set(np.argsort(-masked_with_zero)[:2]) == {2, 3}


def test_a_group_is_as_good_as_its_best_two() -> None:
    # Best single expert in group 0, best pair in group 1, best three in group 2.
    z = np.array([[5.0, -4.0, -4.0, 1.2, 1.2, -4.0, 0.8, 0.8, 0.8]])
    ids, _ = routed(moe(9, 2, groups=3, kept=1), z, np.zeros(9))
    assert ids.tolist() == [[3, 4]]


def test_kept_groups_compete_for_every_place() -> None:
    z = np.array([[3.0, 2.9, 2.8, -9.0, 1.0, 2.0, -9.0, -9.0, 0.5, 0.6, 0.4, 0.3]])
    ids, _ = routed(moe(12, 4, groups=3, kept=2), z, np.zeros(12))
    assert ids.tolist() == [[0, 1, 2, 5]]


def test_r109_ties_go_to_the_lowest_id() -> None:
    experts = np.zeros((1, 16))
    ids, weights = routed(moe(16, 5, groups=4, kept=2), experts, np.zeros(16))
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    np.testing.assert_allclose(weights, 0.2, rtol=TOLERANCES["router_weights"])
    # Groups 1 and 3 tie below group 2; experts 4, 6, 9 and 11 tie inside.
    z = np.array([[-5, -5, -5, -5, 1, 0, 1, 0, 0, 2, 0, 2, 1, 0, 1, 0]], float)
    ids, _ = routed(moe(16, 4, groups=4, kept=2), z, np.zeros(16))
    assert ids.tolist() == [[9, 11, 4, 6]]


def test_the_bias_chooses_but_does_not_weigh() -> None:
    z = np.array([[2.0, 1.0, 0.0, -1.0, -2.0]])
    bias = np.array([0.0, -5.0, 0.0, 0.0, 5.0])
    ids, weights = routed(moe(5, 2), z, bias)
    assert ids.tolist() == [[4, 0]]
    s = sigmoid(z[0, [4, 0]])
    np.testing.assert_allclose(weights[0], s / s.sum(), rtol=TOLERANCES["router_weights"])


@pytest.mark.parametrize("scaling", [1.0, 2.5, 0.3])
def test_r107_one_expert_weighs_its_score_times_the_scaling(scaling: float) -> None:
    """Not 1: a single weight is not renormalised, and the scaling applies all the same."""
    z = np.array([[-1.0, 0.4, -2.0], [3.0, 0.0, 1.0]])
    ids, weights = routed(moe(3, 1, scaling=scaling), z, np.array([0.0, 0.0, -4.0]))
    assert ids.tolist() == [[1], [0]]
    want = scaling * sigmoid(np.array([[0.4], [3.0]]))
    np.testing.assert_allclose(weights, want, rtol=TOLERANCES["router_weights"])


@pytest.mark.parametrize("chosen", [2, 3, 6])
def test_r107_several_experts_share_the_scaling(chosen: int, rng: np.random.Generator) -> None:
    z = rng.standard_normal((7, 6))
    _, weights = routed(moe(6, chosen, groups=2, kept=2, scaling=2.5), z, np.zeros(6))
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=TOLERANCES["router_weights"])


def test_scores_that_vanish_give_no_nan() -> None:
    """sigmoid(-200) is 0 in float32; 1e-20 keeps 0 / 0 away."""
    ids, weights = routed(moe(4, 2), np.full((1, 4), -200.0), np.zeros(4))
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_array_equal(weights, 0.0)


@pytest.mark.parametrize("kept", [1, 3])
def test_all_groups_kept_is_no_grouping(kept: int, rng: np.random.Generator) -> None:
    z, bias = rng.standard_normal((11, 12)), rng.standard_normal(12)
    plain = routed(moe(12, 5), z, bias)
    grouped = routed(moe(12, 5, groups=kept, kept=kept), z, bias)
    np.testing.assert_array_equal(plain[0], grouped[0])
    np.testing.assert_array_equal(plain[1], grouped[1])


def test_r109_the_router_multiplies_in_float32(rng: np.random.Generator) -> None:
    """bfloat16 activations are widened, not the weights narrowed: near ties keep their order."""
    x = jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16)
    weight = rng.standard_normal((32, 24)).astype(np.float32)
    arrays = {"weight": weight, "expert_bias": np.zeros(24, np.float32)}
    _, weights = Router(scope_of(arrays), moe(24, 1))(x)
    wide = np.asarray(x).astype(np.float64) @ weight.astype(np.float64)
    want = sigmoid(wide).max(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, want, rtol=TOLERANCES["router_weights"])
    narrow = np.asarray(x.astype(jnp.float32) @ jnp.asarray(weight, jnp.bfloat16))
    rough = sigmoid(narrow.astype(np.float64)).max(axis=1, keepdims=True)
    assert np.abs(rough / want - 1).max() > 10 * TOLERANCES["router_weights"]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_router_agrees_with_float64(data: st.DataObject, seed: int) -> None:
    groups = data.draw(st.integers(1, 4))
    experts = groups * data.draw(st.integers(2, 5))
    kept = data.draw(st.integers(1, groups))
    chosen = data.draw(st.integers(1, kept * experts // groups))
    scaling = data.draw(st.sampled_from([1.0, 2.5]))
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((50, experts))
    bias = 0.5 * rng.standard_normal(experts) - data.draw(st.sampled_from([0.0, 1.5]))
    ids, weights = routed(moe(experts, chosen, groups, kept, scaling), z, bias)
    hf_config = {
        "num_experts_per_tok": chosen,
        "n_group": groups,
        "topk_group": kept,
        "routed_scaling_factor": scaling,
    }
    want = route(z.astype(np.float32).astype(np.float64), bias.astype(np.float32), hf_config)
    if want.margin < 1e-5:  # rounding may decide
        return
    order = np.argsort(ids, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(ids, order, axis=1), want.ids)
    got = np.take_along_axis(weights, order, axis=1)
    np.testing.assert_allclose(got, want.weights, rtol=TOLERANCES["router_weights"])
    # Best first: by biased score, falling.
    biased = np.take_along_axis(sigmoid(z) + bias, ids.astype(np.int64), axis=1)
    assert (np.diff(biased, axis=1) < 1e-6).all()


def test_a_row_does_not_see_its_neighbours(rng: np.random.Generator) -> None:
    z, bias = rng.standard_normal((9, 12)), rng.standard_normal(12)
    config = moe(12, 4, groups=4, kept=2, scaling=2.5)
    whole = routed(config, z, bias)
    noisy = np.where(np.arange(9)[:, None] == 4, z, np.nan)
    alone = routed(config, noisy, bias)
    np.testing.assert_array_equal(whole[0][4], alone[0][4])
    np.testing.assert_array_equal(whole[1][4], alone[1][4])
    assert jax.device_get(np.isnan(alone[1][[0, 8]])).all()
