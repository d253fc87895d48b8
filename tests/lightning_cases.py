"""Lightning attention for tests: a float64 fold, and calls packed with poison around them.

The fold is written apart from the operators: one segment after another, one token after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from checks import normal, poison
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import lightning_decode, lightning_prefill

# "tpu" runs as the interpreter of TPU kernels runs it: buffers that nobody wrote hold NaN, and a
# copy is made when it is waited for, not before.
IMPLEMENTATIONS = ("xla", "reference", "tpu")
# Every dimension its own: heads, key, value, slots. Decays from "never forgets" to -8 a token.
N, K, V, S = 5, 40, 32, 19
LOG_DECAY = np.array([0.0, -0.004, -0.3, -2.0, -8.0], np.float32)
SCALE = 0.41


@dataclass(frozen=True)
class Segment:
    """Rows of one sequence in a call. Slot 0 makes it padding."""

    slot: int
    length: int
    fresh: bool = False


@dataclass(frozen=True)
class Rows:
    """Packed q, k, v."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __getitem__(self, index) -> Rows:
        return Rows(self.q[index], self.k[index], self.v[index])

    @staticmethod
    def random(rng: np.random.Generator, num: int, dtype: str = "float32") -> Rows:
        return Rows(*(normal(rng, (num, N, width), dtype) for width in (K, K, V)))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        return Rows(*(np.concatenate([getattr(p, x) for p in parts]) for x in "qkv"))

    def padded(self, rng: np.random.Generator, num: int) -> Rows:
        """NaN rows behind, up to `num`."""
        missing, dtype = num - len(self.q), self.q.dtype.name
        return Rows.join([self, Rows(*(poison(rng, (missing, N, w), dtype) for w in (K, K, V)))])


def spoil_pads(rng: np.random.Generator, rows: Rows, segments: Sequence[Segment]) -> Rows:
    """NaN in the rows of slot 0."""
    parts, start = [], 0
    for segment in segments:
        part = rows[start : start + segment.length]
        start += segment.length
        parts.append(part if segment.slot else part[:0].padded(rng, segment.length))
    return Rows.join([*parts, rows[start:]])


def pool(rng: np.random.Generator, dtype: str, live: Sequence[int] = ()) -> np.ndarray:
    """A state pool [S, N, K, V]: numbers in the live slots, NaN in all others, NULL included."""
    state = poison(rng, (S, N, K, V), dtype)
    state[list(live)] = normal(rng, (len(live), N, K, V), dtype)
    return state


def fold(
    rows: Rows, state: np.ndarray, segments: Sequence[Segment]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Outputs [rows, N, V] and the new states by slot, in float64; zero where nothing runs."""
    q, k, v = (x.astype(np.float64) for x in (rows.q, rows.k, rows.v))
    decay = np.exp(LOG_DECAY.astype(np.float64))[:, None, None]
    o, new, row = np.zeros(v.shape), {}, 0
    for segment in segments:
        stop = row + segment.length
        if segment.slot and segment.length:
            s = np.zeros((N, K, V)) if segment.fresh else state[segment.slot].astype(np.float64)
            for t in range(row, stop):
                s = decay * s + k[t][:, :, None] * v[t][:, None, :]
                o[t] = SCALE * (s * q[t][:, :, None]).sum(axis=1)
            new[segment.slot] = s
        row = stop
    return o, new


def interpreted(implementation: str) -> AbstractContextManager[None]:
    """Where calls of an implementation can run on a CPU."""
    if implementation == "tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    return nullcontext()


def prefill(
    implementation: str,
    rows: Rows,
    state: np.ndarray,
    segments: Sequence[Segment],
    *,
    num_segments: int,
    chunk_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The operator's outputs and pool; pad segments without rows are added up to a number."""
    segments = [*segments, *[Segment(0, 0, True)] * (num_segments - len(segments))]
    lengths = [segment.length for segment in segments]
    with interpreted(implementation):
        o, state = lightning_prefill(
            *(jnp.asarray(x) for x in (rows.q, rows.k, rows.v, LOG_DECAY, state)),
            slots=jnp.asarray([segment.slot for segment in segments], jnp.int32),
            cu_seqlens=jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
            is_fresh=jnp.asarray([segment.fresh for segment in segments], bool),
            scale=SCALE,
            chunk_size=chunk_size,
            implementation=implementation,
            # The form that keeps to this chunk size.
            exact=implementation == "tpu",
        )
        return np.asarray(o), np.asarray(state)


def decode(
    implementation: str, rows: Rows, state: np.ndarray, slots: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """One token into each slot."""
    with interpreted(implementation):
        o, state = lightning_decode(
            *(jnp.asarray(x) for x in (rows.q, rows.k, rows.v, LOG_DECAY, state)),
            slots=jnp.asarray(slots, jnp.int32),
            scale=SCALE,
            implementation=implementation,
        )
        return np.asarray(o), np.asarray(state)
