"""Rotary embedding against plain float64: both pairings, partial rotation, YaRN, dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_configs import V2_5, read
from tolerances import TOLERANCES

from bailing_jax.config import Rope, Yarn
from bailing_jax.layers.rope import (
    amplitude,
    inverse_frequencies,
    mla_score_factor,
    rotate_half_split,
    rotate_interleaved,
)

Rotate = Callable[[jax.Array, jax.Array, Rope, Any], jax.Array]

# A first token, neighbours, and one past the longest context of any release.
POSITIONS = np.array([0, 1, 2, 7, 63, 64, 300], np.int32)
FAR = np.array([32_768, 131_071, 262_144], np.int32)


def yarn(**changes: float | int | None) -> Yarn:
    keys: dict[str, Any] = {
        "factor": 4.0,
        "original_max_positions": 32768,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": None,
        "mscale_all_dim": None,
        "attention_factor": None,
    }
    return Yarn(**(keys | changes))


def turned(
    x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, pairs: list[tuple[int, int]]
) -> np.ndarray:
    """Each pair (a, b) of channels turned by position * frequency, in float64."""
    y = x.astype(np.float64)
    for (a, b), frequency in zip(pairs, frequencies, strict=True):
        angle = positions[:, None] * float(frequency)
        first, second = x[..., a].astype(np.float64), x[..., b].astype(np.float64)
        y[..., a] = first * np.cos(angle) - second * np.sin(angle)
        y[..., b] = first * np.sin(angle) + second * np.cos(angle)
    return y


# ---- tables


@pytest.mark.parametrize(
    ("theta", "low", "high", "want"),
    [
        (6e5, 12, 21, (3.59304112e-2, 6.81072400e-3, 8.60662966e-4, 8.15707046e-5, 6.31474743e-7)),
        (6e6, 10, 18, (2.02051550e-2, 2.33354753e-3, 1.78608627e-4, 1.45075968e-5, 6.78587702e-8)),
    ],
)
def test_golden_yarn_frequencies(
    theta: float, low: int, high: int, want: tuple[float, ...]
) -> None:
    got = inverse_frequencies(Rope(theta, 64, yarn()))
    assert got.dtype == np.float32
    rtol = TOLERANCES["rope_frequencies"]
    np.testing.assert_allclose(got[[0, 8, 12, 16, 20, 31]], [1, *want], rtol=rtol)
    # Kept up to channel `low`, divided by the factor from `high`, in between strictly between.
    share = got / inverse_frequencies(Rope(theta, 64, None))
    np.testing.assert_allclose(share[: low + 1], 1, rtol=rtol)
    np.testing.assert_allclose(share[high:], 0.25, rtol=rtol)
    between = share[low : high + 1].astype(np.float64)
    np.testing.assert_allclose(between, np.linspace(1, 0.25, high - low + 1), rtol=rtol)


def test_r009_frequencies_use_the_rotated_channels_not_the_head() -> None:
    got = inverse_frequencies(Rope(1e4, 6, None))
    np.testing.assert_allclose(got, [1, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)], rtol=1e-7)


@pytest.mark.parametrize(
    ("theta", "changes", "ramp"),
    [
        # low = floor(-3.7) is cut to 0; high = ceil(5.4) = 6 lies beyond the last pair, which
        # therefore is not divided by all of the factor.
        (
            1e4,
            {"original_max_positions": 131072, "beta_fast": 2e7},
            [j / 6 for j in range(5)],
        ),
        # low = floor(2.2); high = ceil(10.5) is cut to r - 1 = 9.
        (100.0, {"original_max_positions": 100_000, "beta_fast": 2e3}, [0, 0, 0, 1 / 7, 2 / 7]),
    ],
)
def test_the_ramp_is_cut_at_the_first_and_the_last_channel(
    theta: float, changes: dict[str, float], ramp: list[float]
) -> None:
    got = inverse_frequencies(Rope(theta, 10, yarn(**changes)))
    share = got / inverse_frequencies(Rope(theta, 10, None))
    want = 1 - 0.75 * np.array(ramp)
    np.testing.assert_allclose(share, want, rtol=TOLERANCES["rope_frequencies"])


def test_a_ramp_of_no_length_is_a_step() -> None:
    """Over six positions no channel turns often enough: low and high are both 0."""
    rope = Rope(1e4, 8, yarn(original_max_positions=6))
    np.testing.assert_allclose(
        inverse_frequencies(rope) * 4, [4, *(1e4 ** (-j / 4) for j in (1, 2, 3))], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "a", "scale"),
    [
        ({}, 1.13862944, 0.07216878),
        ({"mscale_all_dim": 1.0}, 1.13862944, 0.09356517),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 0.09356517),
        ({"mscale": 0.5, "mscale_all_dim": 0.0}, 1.13862944, 0.07216878),
        ({"mscale": 0.0, "mscale_all_dim": 1.0}, 1.13862944, 0.09356517),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, 1.27725887 / 1.13862944, 0.09356517),
        ({"attention_factor": 1.5, "mscale_all_dim": 1.0}, 1.5, 0.09356517),
        ({"factor": 1.0}, 1.0, 0.07216878),
        ({"factor": 0.5, "mscale_all_dim": 1.0}, 1.0, 0.07216878),
    ],
)
def test_golden_yarn_amplitude_and_t8_mla_scale(
    changes: dict[str, float], a: float, scale: float
) -> None:
    rope = Rope(6e5, 64, yarn(**changes))
    assert amplitude(rope) == pytest.approx(a, abs=1e-8)
    assert (128 + 64) ** -0.5 * mla_score_factor(rope) == pytest.approx(scale, abs=1e-8)


def test_without_yarn_nothing_is_scaled() -> None:
    rope = Rope(6e5, 64, None)
    assert (amplitude(rope), mla_score_factor(rope)) == (1.0, 1.0)


def test_each_kind_of_attention_has_a_table_of_its_own_width() -> None:
    block = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = read(V2_5, rope_scaling=block)
    assert config.lightning is not None
    assert config.lightning.rope is not None
    assert config.mla is not None
    assert inverse_frequencies(config.lightning.rope).shape == (5,)  # 10 of 20 channels
    assert inverse_frequencies(config.mla.rope).shape == (4,)  # all of 8


# ---- rotation

KINDS: list[tuple[str, Rotate, int, list[tuple[int, int]]]] = [
    ("half-split", rotate_half_split, 10, [(j, j + 5) for j in range(5)]),
    ("partial", rotate_half_split, 14, [(j, j + 5) for j in range(5)]),
    ("interleaved", rotate_interleaved, 10, [(2 * j, 2 * j + 1) for j in range(5)]),
]
BY_KIND = pytest.mark.parametrize(
    ("rotate", "width", "pairs"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS]
)
ROPES = {"plain": Rope(6e5, 10, None), "yarn": Rope(1e4, 10, yarn(original_max_positions=64))}


@BY_KIND
@pytest.mark.parametrize("scaling", ROPES)
def test_rotation_is_the_textbooks(
    rotate: Rotate,
    width: int,
    pairs: list[tuple[int, int]],
    scaling: str,
    rng: np.random.Generator,
) -> None:
    rope = ROPES[scaling]
    x = rng.standard_normal((len(POSITIONS), 3, width)).astype(np.float32)
    got = rotate(jnp.asarray(x), jnp.asarray(POSITIONS), rope, jnp.float32)
    assert got.shape == x.shape
    want = turned(x, POSITIONS, inverse_frequencies(rope), pairs)
    want[..., :10] *= 1.1386294361 if scaling == "yarn" else 1.0
    atol = TOLERANCES["rope_radians"] * POSITIONS.max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    # Channels that are not rotated pass through bit for bit, not even scaled.
    np.testing.assert_array_equal(got[..., 10:], x[..., 10:])


@BY_KIND
def test_t10_far_positions_turn_by_the_rounded_angle_only(
    rotate: Rotate, width: int, pairs: list[tuple[int, int]], rng: np.random.Generator
) -> None:
    """float32 angles at 262144 are off by 1e-2; cos and sin in bfloat16 would be off anywhere."""
    rope = ROPES["plain"]
    x = rng.standard_normal((len(FAR), 2, width)).astype(np.float32)
    got = np.asarray(rotate(jnp.asarray(x), jnp.asarray(FAR), rope, jnp.float32))
    # float32 angles, then exact trigonometry: what is left is the rounding of cos and sin.
    angles = (FAR[:, None].astype(np.float32) * inverse_frequencies(rope)).astype(np.float64)
    for j, (a, b) in enumerate(pairs):
        first, second = x[..., a].astype(np.float64), x[..., b].astype(np.float64)
        cos, sin = np.cos(angles[:, j : j + 1]), np.sin(angles[:, j : j + 1])
        want = [first * cos - second * sin, first * sin + second * cos]
        atol = TOLERANCES["rope_cos_sin"]
        np.testing.assert_allclose([got[..., a], got[..., b]], want, rtol=0, atol=atol)


@BY_KIND
def test_scores_depend_on_the_distance_only(
    rotate: Rotate, width: int, pairs: list[tuple[int, int]], rng: np.random.Generator
) -> None:
    assert len(pairs) == 5
    q, k = (jnp.asarray(rng.standard_normal((1, 1, width)), jnp.float32) for _ in range(2))

    def score(at_q: int, at_k: int) -> float:
        rope = ROPES["plain"]
        a = rotate(q, jnp.array([at_q]), rope, jnp.float32)
        b = rotate(k, jnp.array([at_k]), rope, jnp.float32)
        return float(jnp.vdot(a, b))

    atol = 200 * math.sqrt(width) * TOLERANCES["rope_radians"]
    assert score(107, 100) == pytest.approx(score(7, 0), abs=atol)
    assert score(107, 100) != pytest.approx(score(100, 107), abs=100 * atol)


def test_both_pairings_are_one_rotation_of_permuted_channels(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((7, 3, 10)), jnp.float32)
    rope = ROPES["plain"]
    interleaved = rotate_interleaved(x, jnp.asarray(POSITIONS), rope, jnp.float32)
    sorted_x = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    split = rotate_half_split(sorted_x, jnp.asarray(POSITIONS), rope, jnp.float32)
    np.testing.assert_array_equal(split[..., :5], interleaved[..., 0::2])
    np.testing.assert_array_equal(split[..., 5:], interleaved[..., 1::2])
    unsorted = rotate_half_split(x, jnp.asarray(POSITIONS), rope, jnp.float32)
    assert not np.allclose(unsorted[1:], interleaved[1:], atol=0.1)


@BY_KIND
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rope_dtype", [jnp.float32, jnp.bfloat16])
def test_t10_the_rotation_is_float32_and_rounds_once_at_the_end(
    rotate: Rotate,
    width: int,
    pairs: list[tuple[int, int]],
    x_dtype: Any,
    rope_dtype: Any,
    rng: np.random.Generator,
) -> None:
    assert len(pairs) == 5
    x = jnp.asarray(rng.standard_normal((7, 3, width)), x_dtype)
    at = jnp.asarray(POSITIONS)
    got = rotate(x, at, ROPES["plain"], rope_dtype)
    assert got.dtype == rope_dtype
    wide = rotate(x.astype(jnp.float32), at, ROPES["plain"], jnp.float32)
    np.testing.assert_array_equal(got, wide.astype(rope_dtype))
