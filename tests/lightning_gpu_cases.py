"""Calls of the GPU's lightning kernels for tests: any head size, poison around, float64 beside.

The same calls run in the interpreter on a CPU and, marked `gpu`, on the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal, poison
from lightning_cases import Segment
from tolerances import TOLERANCES

from pallas_kernels import compat

MACHINES = pytest.mark.parametrize(
    "machine",
    [
        pytest.param("interpreter", marks=pytest.mark.mosaic_interpreter),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ],
)
SCALE = 0.41


@contextlib.contextmanager
def on(machine: str, *, detect_races: bool = False):
    """Kernels traced within run on that machine."""
    if machine == "gpu":
        assert jax.default_backend() == "gpu", "these tests need an NVIDIA GPU"
        yield
        return
    with compat.interpret_mosaic_gpu(detect_races=detect_races):
        yield


@dataclass
class Call:
    """Rows, decays and a pool; NaN in rows of nobody, in slots of nobody and in fresh ones."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    log_decay: np.ndarray
    state: np.ndarray
    segments: Sequence[Segment]

    @staticmethod
    def random(
        rng: np.random.Generator,
        segments: Sequence[Segment],
        log_decay: Sequence[float],
        key_dim: int,
        value_dim: int,
        *,
        pads: int = 0,
        dtype: str = "bfloat16",
        state_dtype: str = "float32",
    ) -> Call:
        heads, num_slots = len(log_decay), max(s.slot for s in segments) + 3
        rows = sum(s.length for s in segments)
        widths = (key_dim, key_dim, value_dim)
        q, k, v = (normal(rng, (rows, heads, width), dtype) for width in widths)
        start = 0
        for segment in segments:
            if segment.slot == 0:
                for x in (q, k, v):
                    part = x[start : start + segment.length]
                    part[:] = poison(rng, part.shape, dtype)
            start += segment.length
        q, k, v = (np.concatenate([x, poison(rng, (pads, *x.shape[1:]), dtype)]) for x in (q, k, v))
        live = [s.slot for s in segments if s.slot and not s.fresh]
        state = poison(rng, (num_slots, heads, key_dim, value_dim), state_dtype)
        state[live] = normal(rng, (len(live), *state.shape[1:]), state_dtype)
        return Call(q, k, v, np.array(log_decay, np.float32), state, segments)

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """What both operators take first."""
        return tuple(map(jnp.asarray, (self.q, self.k, self.v, self.log_decay, self.state)))

    @property
    def places(self) -> dict[str, jax.Array]:
        """slots, cu_seqlens, is_fresh."""
        lengths = [s.length for s in self.segments]
        return {
            "slots": jnp.asarray([s.slot for s in self.segments], jnp.int32),
            "cu_seqlens": jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
            "is_fresh": jnp.asarray([s.fresh for s in self.segments], bool),
        }

    def fold(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Outputs and new states by slot in float64, one token after another."""
        q, k, v = (x.astype(np.float64) for x in (self.q, self.k, self.v))
        decay = np.exp(self.log_decay.astype(np.float64))[:, None, None]
        o, new, row = np.zeros(v.shape), {}, 0
        for segment in self.segments:
            stop = row + segment.length
            if segment.slot and segment.length:
                s = self.state[segment.slot].astype(np.float64)
                s = np.zeros_like(s) if segment.fresh else s
                for t in range(row, stop):
                    s = decay * s + k[t][:, :, None] * v[t][:, None, :]
                    o[t] = SCALE * np.einsum("nkv,nk->nv", s, q[t])
                new[segment.slot] = s
            row = stop
        return o, new

    def check(self, o: jax.Array, after: jax.Array, tolerance: str, state_tolerance: str) -> None:
        """Every row and every slot against the fold; what nobody owns bit for bit."""
        o, after = np.asarray(o), np.asarray(after)
        assert (o.dtype, after.dtype) == (self.v.dtype, self.state.dtype)
        want_o, want_states = self.fold()
        owner = np.repeat([s.slot for s in self.segments], [s.length for s in self.segments])
        real = np.zeros(len(o), bool)
        real[: len(owner)] = owner != 0
        assert (o[~real] == 0).all()
        close(o[real], want_o[real], tolerance, head_axis=1)
        for slot, want in want_states.items():
            close(after[slot], want, state_tolerance, head_axis=0)
        others = [slot for slot in range(len(after)) if slot not in want_states]
        assert_same_bits(after[others], self.state[others])


def close(got, want: np.ndarray, name: str, head_axis: int) -> None:
    """The worst entry, and for products of bfloat16 the rms of a head's errors too."""
    assert_close(got, want, name, head_axis=head_axis)
    if name == "wgmma":
        assert rms_error(got, want, head_axis) <= TOLERANCES["wgmma_rms"]


def rms_error(got, want: np.ndarray, head_axis: int) -> float:
    """The worst head's rms error over its rms."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    if not want.size:
        return 0.0
    axes = tuple(i for i in range(want.ndim) if i != head_axis)
    squares = np.mean((got - want) ** 2, axis=axes) / np.mean(want**2, axis=axes)
    return float(np.sqrt(squares.max()))
