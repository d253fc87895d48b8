"""Lightning attention where numbers are large: very slow and very fast decay, very many slots."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, normal
from lightning_cases import IMPLEMENTATIONS, SCALE, interpreted

from pallas_kernels import lightning_decode, lightning_prefill

pytestmark = pytest.mark.unoptimised

# From a head that loses a millionth a token to one that is empty after each; across a chunk of 64
# the last four would overflow as exp(-g t), and the last two underflow as exp(g).
DECAYS = np.array([-(2.0**-20), -0.02, -1.4, -3.0, -40.0, -200.0], np.float32)
N, K, V, ROWS = len(DECAYS), 40, 32, 200


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def fold(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, decays: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    decay = np.exp(decays.astype(np.float64))[:, None, None]
    o = np.zeros(v.shape)
    for t in range(len(q)):
        s = decay * s + k[t][:, :, None].astype(np.float64) * v[t][:, None, :]
        o[t] = SCALE * (s * q[t][:, :, None]).sum(axis=1)
    return o, s


def test_r007_decays_of_any_size_stay_exact(rng: np.random.Generator, implementation: str) -> None:
    """Two hundred tokens in chunks, then ten one at a time, from a state that holds something."""
    q, k, v = (normal(rng, (ROWS + 10, N, width), "float32") for width in (K, K, V))
    state = normal(rng, (3, N, K, V), "float32")
    want, want_state = fold(q, k, v, state[2].astype(np.float64), DECAYS)
    decays, pool = jnp.asarray(DECAYS), jnp.asarray(state)
    with interpreted(implementation):
        o, pool = lightning_prefill(
            *(jnp.asarray(x[:ROWS]) for x in (q, k, v)), decays, pool,
            slots=jnp.array([2], jnp.int32), cu_seqlens=jnp.array([0, ROWS], jnp.int32),
            is_fresh=jnp.array([False]), scale=SCALE, implementation=implementation,
        )  # fmt: skip
        outputs = [np.asarray(o)]
        for t in range(ROWS, ROWS + 10):
            o, pool = lightning_decode(
                *(jnp.asarray(x[t : t + 1]) for x in (q, k, v)), decays, pool,
                slots=jnp.array([2], jnp.int32), scale=SCALE, implementation=implementation,
            )  # fmt: skip
            outputs.append(np.asarray(o))
    assert_close(np.concatenate(outputs), want, "lightning", head_axis=1)
    assert_close(np.asarray(pool[2]), want_state, "lightning", head_axis=0)


def test_r098_slots_of_a_large_pool(rng: np.random.Generator, implementation: str) -> None:
    """A full-size head puts slot 2048 beyond 2^31 elements: high slots are their own."""
    slots = np.array([2047, 2048, 2049, 4099], np.int32)
    decays = DECAYS[1:2]
    q, k, v = (normal(rng, (4, 1, width), "float32") for width in (K, K, V))
    pool = np.zeros((4100, 1, K, V), np.float32)
    pool[slots] = normal(rng, (4, 1, K, V), "float32")
    with interpreted(implementation):
        o, after = lightning_decode(
            *(jnp.asarray(x) for x in (q, k, v, decays, pool)), slots=jnp.asarray(slots),
            scale=SCALE, implementation=implementation,
        )  # fmt: skip
        o, after = np.asarray(o), np.asarray(after)
    for i, slot in enumerate(slots):
        row = slice(i, i + 1)
        want, state = fold(q[row], k[row], v[row], pool[slot].astype(np.float64), decays)
        assert_close(o[row], want, "lightning", head_axis=1)
        assert_close(after[slot], state, "lightning", head_axis=0)
    others = np.setdiff1d(np.arange(len(pool)), slots)
    assert not after[others].any()
