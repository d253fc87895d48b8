"""Builds one Flax module from plain arrays, without a model around it."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from bailing_jax.layers.declare import Scope
from bailing_jax.params import Param


def scope_of(arrays: Mapping[str, np.ndarray], prefix: str = "module") -> Scope:
    """A scope whose parameters are these arrays, by the names the module asks for."""
    table = {
        f"{prefix}.{name}": Param(
            f"{prefix}.{name}", array.shape, tuple(f"axis{i}" for i in range(array.ndim)), ()
        )
        for name, array in arrays.items()
    }
    named = {f"{prefix}.{name}": array for name, array in arrays.items()}
    return Scope(table, lambda param: jnp.asarray(named[param.path]), prefix)
