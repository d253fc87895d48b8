"""Rotary position embedding: both pairings, partial rotation and YaRN.

Angles are position * inverse frequency in float32. Half-split pairs channel j with j + r/2 of
the first r channels and passes the rest through; interleaved pairs channels 2j and 2j + 1. The
rotation is computed in float32 and handed on in the dtype asked for.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from bailing_jax.config import Rope, Yarn


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """Radians a position, float32 [num_dims / 2].

    YaRN (https://arxiv.org/abs/2309.00071) divides slow channels by the factor, keeps fast ones
    and blends between the channels that turn beta_fast and beta_slow times over the original
    context.
    """
    pair = np.arange(rope.num_dims // 2, dtype=np.float64)
    plain = rope.theta ** (-2 * pair / rope.num_dims)
    if rope.yarn is None:
        return plain.astype(np.float32)
    low = max(math.floor(_channel_of(rope, rope.yarn, rope.yarn.beta_fast)), 0)
    high: float = min(
        math.ceil(_channel_of(rope, rope.yarn, rope.yarn.beta_slow)), rope.num_dims - 1
    )
    if low == high:
        high += 0.001
    ramp = np.clip((pair - low) / (high - low), 0, 1)
    return (plain / rope.yarn.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _channel_of(rope: Rope, yarn: Yarn, turns: float) -> float:
    """The channel pair that turns `turns` times over the original context."""
    return (
        rope.num_dims
        * math.log(yarn.original_max_positions / (2 * math.pi * turns))
        / (2 * math.log(rope.theta))
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def amplitude(rope: Rope) -> float:
    """YaRN's factor on cos and sin (1 without YaRN)."""
    yarn = rope.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1)


def mla_score_factor(rope: Rope) -> float:
    """What MLA multiplies its softmax scale by: m(factor, mscale_all_dim)^2 under YaRN."""
    yarn = rope.yarn
    if yarn is None or not yarn.mscale_all_dim:
        return 1.0
    return _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def rotate_half_split(
    x: jax.Array, positions: jax.Array, rope: Rope, dtype: jnp.dtype
) -> jax.Array:
    """Rotate the first num_dims channels of x [t, heads, dim], paired (j, j + num_dims / 2)."""
    cos, sin = _cos_sin(positions, rope)
    wide = x.astype(jnp.float32)
    first, second, rest = jnp.split(wide, [rope.num_dims // 2, rope.num_dims], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(dtype)


def rotate_interleaved(
    x: jax.Array, positions: jax.Array, rope: Rope, dtype: jnp.dtype
) -> jax.Array:
    """Rotate all channels of x [t, heads, num_dims], paired (2j, 2j + 1)."""
    cos, sin = _cos_sin(positions, rope)
    wide = x.astype(jnp.float32)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(dtype)


def half_split_angles(positions: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """cos and sin of a row's rotation, float32 [t, num_dims / 2]."""
    cos, sin = _cos_sin(positions, rope)
    return cos[:, 0], sin[:, 0]


def _cos_sin(positions: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [t, 1, num_dims / 2]."""
    angles = positions.astype(jnp.float32)[:, None, None] * inverse_frequencies(rope)
    return jnp.cos(angles) * amplitude(rope), jnp.sin(angles) * amplitude(rope)
