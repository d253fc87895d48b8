"""Matrices of few bits with a scale for each column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """Matrices [..., in, out]; `compat.einsum` multiplies by them.

    Indexing takes some of a stack of matrices.

    Attributes:
        values: float8_e4m3fn [..., in, out].
        scales: float32 [..., 1, out].
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Its dimensions."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """What products take the values for."""
        return jnp.dtype("bfloat16")

    def __getitem__(self, index: Any) -> Scaled:
        return type(self)(self.values[index], self.scales[index])
