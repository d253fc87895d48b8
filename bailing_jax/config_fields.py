"""Typed access to the keys of one JSON object, with errors that name key, value and choice.

`Fields` remembers which keys were asked for, so that whoever reads a config can list the keys
nobody understood. It knows nothing of models: the meaning of the keys is in `config.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence

from bailing_jax.errors import EXIT_USAGE, UserError

MAX_INT = 2**31 - 1


class Fields:
    """The keys of one JSON object (`values`), found in `where` (a file name for messages).

    Those in `overridden` were not found there: the caller gave them as hf_overrides.
    """

    def __init__(
        self, values: Mapping[str, object], where: str, overridden: Collection[str] = ()
    ) -> None:
        self.values = values
        self.where = where
        self._overridden = overridden
        self._known: set[str] = set()
        self._strange: list[str] = []

    def refuse(self, key: str, value: object, allowed: str, hint: str = "") -> UserError:
        """The error for a key whose value can't be used."""
        where = "hf_overrides" if key in self._overridden else self.where
        return UserError(
            f"{where}: {key} = {value!r}; allowed: {allowed}",
            hint,
            EXIT_USAGE,
            options={"hf_overrides"} & {where},
        )

    def get(self, key: str) -> object:
        """The raw value, or None when absent or null."""
        self._known.add(key)
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.get(key) is not None

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT
    ) -> int:
        """An int in [low, high]; `default` when absent, an error when there is no default."""
        value = self.optional_integer(key, low=low, high=high)
        if value is not None:
            return value
        if default is None:
            raise self._missing(key, f"an integer from {low} to {high}")
        return default

    def optional_integer(self, key: str, *, low: int = 1, high: int = MAX_INT) -> int | None:
        """An int in [low, high], or None when absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number > 0; `default` when absent, an error when there is no default."""
        value = self.optional_number(key)
        if value is not None:
            return value
        if default is None:
            raise self._missing(key, "a finite number > 0")
        return default

    def optional_number(self, key: str, *, zero: bool = False) -> float | None:
        """A finite number > 0 (>= 0 with `zero`), or None when absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, value, "a number")
        # An int may be too large for a float; this comparison is exact.
        if not 0 <= value <= sys.float_info.max or (value == 0 and not zero):
            raise self.refuse(key, value, f"a finite number {'>=' if zero else '>'} 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; `default` when absent or null."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true, false")
        return value

    def fixed(self, key: str, allowed: Sequence[object], hint: str = "") -> None:
        """Refuse a present value outside `allowed` (absent and null always pass)."""
        value = self.get(key)
        # `True == 1` in Python, but not in JSON.
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            choices = ", ".join("null" if a is None else repr(a) for a in allowed) or "null"
            raise self.refuse(key, value, f"{choices} (or the key left out)", hint)

    def ignored(self, keys: Iterable[str]) -> None:
        """Mark keys that are understood and change nothing here."""
        self._known.update(keys)

    def add_unknown(self, names: Iterable[str]) -> None:
        """Report these too: unknown keys of an object inside this one, as `object.key`."""
        self._strange += names

    def unknown(self) -> tuple[str, ...]:
        """The keys nobody asked for, sorted."""
        return tuple(sorted({*self.values, *self._strange} - self._known))

    def _missing(self, key: str, allowed: str) -> UserError:
        return UserError(
            f"{self.where}: {key} is missing; it must be {allowed}",
            "The file is incomplete: copy config.json again from the released checkpoint.",
            EXIT_USAGE,
        )
