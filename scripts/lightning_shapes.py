"""Named shapes of the lightning kernels' benchmark, with what each has to reach on one H100.

Head size 128, bfloat16 rows, float32 state unless said otherwise; times in microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Prefill:
    """Packed sequences of `lengths`; `must` and `aim` are GPU times."""

    name: str
    heads: int
    lengths: tuple[int, ...]
    must: float | None = None
    aim: float | None = None
    head_dim: int = 128
    backward: bool = False
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    def bytes_moved(self) -> int:
        """q, k, v read and o written once, every state read and written once; forward only."""
        states = 2 * len(self.lengths) * self.heads * self.head_dim**2 * 4
        itemsize = 4 if self.dtype == "float32" else 2
        return 4 * self.rows * self.heads * self.head_dim * itemsize + states


@dataclass(frozen=True)
class Decode:
    """One token for each of `batch` sequences."""

    name: str
    batch: int
    heads: int
    must: float | None = None
    aim: float | None = None
    state_dtype: str = "float32"
    head_dim: int = 128

    def bytes_moved(self) -> int:
        """Every state read and written once, one row of q, k, v and o."""
        itemsize = 4 if self.state_dtype == "float32" else 2
        state = 2 * self.head_dim**2 * itemsize
        return self.batch * self.heads * (state + 4 * self.head_dim * 2)


def even(rows: int, sequences: int) -> tuple[int, ...]:
    """`rows` in sequences of nearly one length."""
    cuts = [rows * i // sequences for i in range(sequences + 1)]
    return tuple(b - a for a, b in pairwise(cuts))


# 1 to 9,000 rows, none a multiple of a chunk.
RAGGED = (9_000, 1, 777, 70, 2_049, 133, 5, 4_157)

PREFILLS = (
    Prefill("H16 T8192 x1", 16, even(8_192, 1), 100, 71),
    Prefill("H16 T8192 x16", 16, even(8_192, 16), 90, 72),
    Prefill("H16 T32768 x1", 16, even(32_768, 1), 300, 230),
    Prefill("H64 T8192 x1", 64, even(8_192, 1), 235, 205),
    Prefill("H64 T8192 x16", 64, even(8_192, 16), 285, 255),
    Prefill("H64 T32768 x1", 64, even(32_768, 1), 800, 760),
    Prefill("H64 T32768 x64", 64, even(32_768, 64), 1_100, 1_000),
    Prefill("H64 4x4096 forward+backward", 64, even(16_384, 4), backward=True),
)
# Nothing was tuned for these.
UNTUNED = (
    Prefill("H8 T8192 x1", 8, even(8_192, 1)),
    # A long one among short ones.
    Prefill("H16 T8192 7000 + 15", 16, (7_000, *even(1_192, 15))),
    Prefill("H16 ragged", 16, RAGGED),
    Prefill("H24 ragged", 24, RAGGED),
    Prefill("H48 ragged", 48, RAGGED),
    Prefill("H32 D64 T8192 x1", 32, even(8_192, 1), head_dim=64),
    Prefill("H16 T2048 x1 float32", 16, even(2_048, 1), dtype="float32"),
    Prefill("H16 T2048 x16 float32", 16, even(2_048, 16), dtype="float32"),
)
DECODES = (
    Decode("H16 B1", 1, 16, 2.7, 2),
    Decode("H16 B8", 8, 16),
    Decode("H16 B32", 32, 16, 31, 26),
    Decode("H16 B128", 128, 16, 102, 96),
    Decode("H16 B256", 256, 16, 198, 190),
    Decode("H32 B256", 256, 32, 388, 375),
    Decode("H64 B128", 128, 64, 388, 375),
    Decode("H16 B32, bfloat16 state", 32, 16, state_dtype="bfloat16"),
    Decode("H16 B128, bfloat16 state", 128, 16, state_dtype="bfloat16"),
    Decode("H16 B256, bfloat16 state", 256, 16, state_dtype="bfloat16"),
)
