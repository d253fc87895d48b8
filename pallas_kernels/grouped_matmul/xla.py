"""The expert mixture through XLA: a loop over blocks of rows that share an expert.

(Row, choice) pairs are sorted by expert and cut into blocks inside one expert; each block reads
its expert's weights once. No pair is dropped and none is padded to a capacity. `ragged_dot`
would do the same in one call, but XLA expands it to every expert on CPU and on NVIDIA GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum
from pallas_kernels.tiles import segment_of

_BLOCKS = (8, 16, 32, 64)


def expert_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    exists: jax.Array,
    *,
    one_path: bool = False,
) -> jax.Array:
    """See `api.expert_mlp`; float32. `one_path`: a lone row goes through the blocks like others.

    A row's products do not depend on the block or the lane of a block it lands in: every block
    has the same static size, and rows of other experts in it are overwritten by later blocks.
    """
    rows, choices = expert_ids.shape
    if rows == 1 and not one_path:
        return _one_row(x, gate, up, down, expert_ids[0], weights[0], exists)
    num_experts = gate.shape[0]
    block = _block_size(rows, choices, num_experts)
    # Pairs of rows that do not exist sort behind the last expert with those of experts that are
    # not here: they are nobody's own.
    expert = jnp.where(exists[:, None], expert_ids, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    pair_x = jnp.pad(x[order // choices], ((0, block), (0, 0)))
    block_expert, block_start, num_blocks = _blocks(expert[order], num_experts, block)

    def one_block(number: jax.Array, y: jax.Array) -> jax.Array:
        e, start = block_expert[number], block_start[number]
        part = jax.lax.dynamic_slice_in_dim(pair_x, start, block)
        # Blocks come in order, so rows past the expert's own are overwritten by the next.
        return jax.lax.dynamic_update_slice_in_dim(
            y, _swiglu(part, gate[e], up[e], down[e]), start, 0
        )

    y = jnp.zeros(pair_x.shape, jnp.float32)
    y = jax.lax.fori_loop(0, num_blocks, one_block, y)
    y = y[jnp.argsort(order)].reshape(rows, choices, -1)
    # The last block may reach into pairs that are nobody's.
    y = jnp.where((expert_ids < num_experts)[..., None], y * weights[..., None], 0).sum(axis=1)
    return jnp.where(exists[:, None], y, 0)


def _one_row(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    exists: jax.Array,
) -> jax.Array:
    """A lone row's experts are all different: those that are here go first, one after the other."""
    is_here = (expert_ids < gate.shape[0]) & exists
    order = jnp.argsort(~is_here, stable=True)

    def one_choice(i: jax.Array, y: jax.Array) -> jax.Array:
        e = expert_ids[order[i]]
        return y + weights[order[i]] * _swiglu(x, gate[e], up[e], down[e])

    y = jax.lax.fori_loop(0, is_here.sum(), one_choice, jnp.zeros(x.shape, jnp.float32))
    return jnp.where(exists[:, None], y, 0)


def _swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """One expert on rows [m, d]: float32 [m, d]."""
    hidden = jax.nn.silu(einsum("md,df->mf", x, gate)) * einsum("md,df->mf", x, up)
    return einsum("mf,fd->md", hidden.astype(x.dtype), down)


def _block_size(rows: int, choices: int, num_experts: int) -> int:
    """Rows a block: about what an expert gets."""
    share = rows * choices / num_experts
    return next((size for size in _BLOCKS if size >= share), _BLOCKS[-1])


def _blocks(
    expert: jax.Array, num_experts: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each block's expert and first pair, and the number of blocks in use.

    `expert` [pairs] is sorted; num_experts stands for pairs of rows that do not exist.
    """
    bound = min(expert.shape[0], expert.shape[0] // block + num_experts)
    # Not a count by scatter: XLA's CPU scatter is a loop over its elements.
    first = jnp.searchsorted(expert, jnp.arange(num_experts + 1))
    blocks = -(-(first[1:] - first[:-1]) // block)
    ends = jnp.cumsum(blocks)
    number = jnp.arange(bound)
    owner, _ = segment_of(number, ends)
    start = first[owner] + (number - (ends - blocks)[owner]) * block
    return owner, jnp.clip(start, 0, expert.shape[0]), ends[-1]
