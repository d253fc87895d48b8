"""The expert mixture through XLA: a loop over blocks of rows that share an expert.

(Row, choice) pairs are sorted by expert and cut into blocks inside one expert; each block reads
its expert's weights once. No pair is dropped and none is padded to a capacity. `ragged_dot`
would do the same in one call, but XLA expands it to every expert on CPU and on NVIDIA GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.compat import einsum
from pallas_kernels.order import inverse, stable_order

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
    num_experts, pairs = gate.shape[0], rows * choices
    block = _block_size(rows, choices, num_experts)
    # Pairs of rows that do not exist sort behind the last expert with those of experts that are
    # not here: they are nobody's own.
    expert = jnp.where(exists[:, None], expert_ids, num_experts)
    order = stable_order(expert.reshape(-1), num_experts + 1)
    source = jnp.pad(order // choices, (0, block))
    block_expert, block_start, num_blocks = _blocks(expert.reshape(-1), num_experts, block)

    def one_block(number: jax.Array, y: jax.Array) -> jax.Array:
        e, start = block_expert[number], block_start[number]
        part = x[jax.lax.dynamic_slice_in_dim(source, start, block)]
        # Blocks come in order, so rows past the expert's own are overwritten by the next.
        return jax.lax.dynamic_update_slice_in_dim(
            y, _swiglu(part, gate[e], up[e], down[e]), start, 0
        )

    y = jnp.zeros((pairs + block, x.shape[1]), jnp.float32)
    y = jax.lax.fori_loop(0, num_blocks, one_block, y)
    places, is_here = inverse(order).reshape(rows, choices), expert < num_experts
    mixture = jnp.zeros(x.shape, jnp.float32)
    # One after the other: for choices as an axis beside the rows a TPU would lay it all out anew.
    for i in range(choices):
        # The last block may reach into pairs that are nobody's.
        chosen = jnp.where(is_here[:, i, None], y[places[:, i]] * weights[:, i, None], 0)
        mixture = mixture + chosen
    return mixture


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
    order = stable_order(jnp.where(is_here, 0, 1), 2)

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
    """Each block's expert and first place in the order, and the number of blocks in use.

    `expert` [pairs] in any order; num_experts stands for pairs that are nobody's. Sums over
    comparisons with everything: a few thousand times a few hundred are one small kernel, where
    bisections and running sums are loops of their own.
    """
    pairs, e = expert.shape[0], jnp.arange(num_experts, dtype=jnp.int32)
    bound = min(pairs, pairs // block + num_experts)
    count = (expert[:, None] == e).sum(axis=0, dtype=jnp.int32)
    blocks = -(-count // block)
    is_before = e[:, None] > e
    first = jnp.where(is_before, count, 0).sum(axis=1)
    first_block = jnp.where(is_before, blocks, 0).sum(axis=1)
    number = jnp.arange(bound, dtype=jnp.int32)
    owner = (number[:, None] >= first_block).sum(axis=1, dtype=jnp.int32) - 1
    start = (first - first_block * block)[owner] + number * block
    return owner, jnp.clip(start, 0, pairs), blocks.sum()
