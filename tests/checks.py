"""What operator tests compare with: bits, NaN poison, and one measure of error."""

from __future__ import annotations

import jax
import numpy as np
from tolerances import TOLERANCES


def bits(x: jax.Array | np.ndarray) -> np.ndarray:
    """The array as unsigned integers: equal bits mean equal NaN payloads and signs of zero too."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def poison(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """NaN everywhere, each with its own sign and payload, so that a rewritten one shows.

    bfloat16 ones differ in sign only: on a CPU, jaxlib 0.10 updates a bfloat16 array by way of
    float32 and keeps no payload.
    """
    if np.dtype(dtype).itemsize == 2:
        return (rng.integers(0, 2, shape) << 15 | 0x7FC0).astype(np.uint16).view(dtype)
    sign = rng.integers(0, 2, shape) << 31
    return (sign | 0x7FC00000 | rng.integers(0, 1 << 22, shape)).astype(np.uint32).view(dtype)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Standard normal numbers."""
    return rng.standard_normal(shape).astype(dtype)


def error(got: np.ndarray, want: np.ndarray, head_axis: int | None = None) -> float:
    """The worst |got - want| / (|want| + rms(want)), the rms taken a head where an axis is given.

    A head that forgets fast has small outputs; against the rms of all heads its errors would hide.
    """
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape
    if want.size == 0:
        return 0.0
    axes = None if head_axis is None else tuple(i for i in range(want.ndim) if i != head_axis)
    scale = np.abs(want) + np.sqrt(np.mean(want**2, axis=axes, keepdims=True))
    # Where everything is zero only zero is right.
    ratio = np.where(scale > 0, np.abs(got - want) / np.where(scale > 0, scale, 1), np.abs(got))
    return float(ratio.max()) if np.isfinite(ratio).all() else float("inf")


def assert_close(
    got: jax.Array | np.ndarray, want: np.ndarray, name: str, head_axis: int | None = None
) -> None:
    """Assert that `error` stays within the tolerance of that name."""
    worst = error(np.asarray(got), want, head_axis)
    assert worst <= TOLERANCES[name], f"{name}: {worst:.3g} > {TOLERANCES[name]:.3g}"


def assert_same_bits(got: jax.Array | np.ndarray, want: jax.Array | np.ndarray) -> None:
    """Assert equality of every bit."""
    got, want = bits(got), bits(want)
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)
