"""The specification of lightning attention: a scan over tokens, in float32.

    S_t = exp(g) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

The state is rounded to the pool's dtype once, at the end of a segment. Rows beyond the segments
give zero; segments without rows and slot 0 leave the state alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum


def lightning_prefill(q, k, v, log_decay, state, *, slots, cu_seqlens, is_fresh, scale, **_):
    """See `api.lightning_prefill`."""

    def token(state, row):
        segment = jnp.searchsorted(cu_seqlens[1:], row, side="right")
        exists = segment < slots.shape[0]
        segment = jnp.minimum(segment, slots.shape[0] - 1)
        slot = slots[segment]
        exists &= slot != 0
        starts = is_fresh[segment] & (row == cu_seqlens[segment])
        old = jnp.where(starts, 0, state[slot])
        # exp(g) S as S + (exp(g) - 1) S: a slow head's exp(g) would err the same way every token.
        new = old + jnp.expm1(log_decay)[:, None, None] * old + einsum("nk,nv->nkv", k[row], v[row])
        o = scale * einsum("nkv,nk->nv", new, q[row].astype(jnp.float32))
        state = state.at[slot].set(jnp.where(exists, new, state[slot]))
        return state, jnp.where(exists, o, 0).astype(v.dtype)

    wide, o = jax.lax.scan(token, state.astype(jnp.float32), jnp.arange(q.shape[0]))
    runs = ((cu_seqlens[1:] > cu_seqlens[:-1]) & (slots != 0))[:, None, None, None]
    return o, state.at[slots].set(jnp.where(runs, wide[slots].astype(state.dtype), state[slots]))


def lightning_decode(q, k, v, log_decay, state, *, slots, scale):
    """See `api.lightning_decode`."""
    batch = slots.shape[0]
    return lightning_prefill(
        q, k, v, log_decay, state, slots=slots, cu_seqlens=jnp.arange(batch + 1),
        is_fresh=jnp.zeros(batch, bool), scale=scale,
    )  # fmt: skip
