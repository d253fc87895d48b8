"""Named shapes of the operators, shared by tests and benchmarks.

A benchmark's figure and a test's verdict are about the same call when they name the same shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LightningShape:
    """A call of lightning attention.

    Attributes:
        heads: N.
        key_dim: K.
        value_dim: V.
        rows: of a decode call, B; of a prefill call, T, of which the last may belong to nobody.
        lengths: of a prefill call's segments; empty for decode.
        dtype: of q, k, v and o.
        state_dtype: of the pool.
    """

    heads: int
    key_dim: int
    value_dim: int
    rows: int
    lengths: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    state_dtype: str = "float32"

    @property
    def least_bytes(self) -> int:
        """What any implementation has to move: every row once, every slot once in and once out."""
        size, state_size = (2 if d == "bfloat16" else 4 for d in (self.dtype, self.state_dtype))
        used = sum(self.lengths) if self.lengths else self.rows
        states = sum(n > 0 for n in self.lengths) if self.lengths else self.rows
        width = 2 * self.key_dim + 2 * self.value_dim
        slot = self.heads * self.key_dim * self.value_dim * state_size
        # Rows that belong to nobody are given zeros.
        nobody = (self.rows - used) * self.value_dim
        return self.heads * size * (used * width + nobody) + 2 * states * slot


def _ragged(total: int, number: int) -> tuple[int, ...]:
    """Lengths from short to long, no two the same, in no order, that add up."""
    weights = [1 + (7 * i) % number for i in range(number)]
    lengths = [math.floor(total * w / sum(weights)) for w in weights]
    lengths[weights.index(number)] += total - sum(lengths)
    return tuple(lengths)


# Small enough for an interpreter: two blocks of heads, or a number that makes one odd block; more
# rows than buffers; chunks that are full, partial and alone.
SMALL_DECODE = {
    "two-blocks": LightningShape(16, 40, 32, 9),
    "three-heads": LightningShape(3, 32, 40, 6, dtype="float32"),
    "twelve-heads-narrow-state": LightningShape(12, 48, 32, 5, state_dtype="bfloat16"),
}
SMALL_PREFILL = {
    "two-blocks": LightningShape(16, 40, 32, 75, (16, 1, 0, 37, 7)),
    "three-heads": LightningShape(3, 32, 40, 50, (33, 17), dtype="float32"),
    "twelve-heads-narrow-state": LightningShape(12, 48, 32, 29, (5, 24), state_dtype="bfloat16"),
}
# What the models of the family run: heads of 128, 16 to 64 of them on a device.
DECODE = {
    f"H{heads} B{rows}": LightningShape(heads, 128, 128, rows)
    for heads, rows in ((16, 1), (16, 32), (16, 128), (16, 256), (32, 256), (64, 128), (64, 256))
}
PREFILL = {
    f"H{heads} T{rows} x{number}": LightningShape(
        heads, 128, 128, rows, _ragged(rows, number) if number > 1 else (rows,)
    )
    for heads, rows, number in (
        (16, 2048, 1), (16, 8192, 1), (16, 8192, 16), (32, 8192, 1), (64, 8192, 1),
        (64, 8192, 16), (64, 16384, 1), (64, 16384, 64),
    )
}  # fmt: skip
