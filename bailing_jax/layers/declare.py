"""How modules declare their parameters: by name, from the one parameter description.

A `Scope` stands at a path such as "model.layers.3.attention" and makes the parameters below it.
Shapes, axes and checkpoint names are in `params.py`; a module only says which names it holds,
so the two can't disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from bailing_jax.params import Param

MakeArray = Callable[[Param], jax.Array]


class Scope:
    """The parameters below one path."""

    def __init__(self, table: Mapping[str, Param], make: MakeArray, path: str = "") -> None:
        self._table = table
        self._make = make
        self._path = path

    def __truediv__(self, name: str | int) -> Scope:
        """The scope one step further down."""
        path = f"{self._path}.{name}" if self._path else str(name)
        return Scope(self._table, self._make, path)

    def has(self, name: str) -> bool:
        """Whether the model has this parameter."""
        return f"{self._path}.{name}" in self._table

    def param(self, name: str) -> nnx.Param:
        """The parameter `name` of this scope."""
        param = self._table[f"{self._path}.{name}"]
        return nnx.Param(self._make(param), axes=param.axes)

    def optional(self, name: str) -> nnx.Param | None:
        """The parameter, or None when the model has none of that name."""
        return self.param(name) if self.has(name) else None
