"""The grouped norm over heads that lie on several devices; runs on eight simulated devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from jax.sharding import Mesh, PartitionSpec

from bailing_jax.config import Lightning
from bailing_jax.layers.norms import RMSNorm
from bailing_jax.layers.parallel import Parallel
from bailing_jax.mesh import MeshShape
from bailing_jax.sharding import AXES, TENSOR, norm_parts
from pallas_kernels import compat

HEAD, EPS = 5, 1e-6


def lightning(heads: int, groups: int) -> Lightning:
    return Lightning(
        num_heads=heads, head_dim=HEAD, num_norm_groups=groups, use_silu=False, use_qk_norm=False,
        rope=None, qkv_bias=False, output_bias=False,
    )  # fmt: skip


def norm(weight: jax.Array, groups: int, *shared_by: Parallel) -> RMSNorm:
    scope: Any = SimpleNamespace(param=lambda _name: weight)
    return RMSNorm(scope, EPS, groups, *shared_by)


@pytest.mark.parametrize(
    ("heads", "groups", "tensor", "parts"),
    [
        (6, 3, 2, (3, 2)),  # three heads a device, two a group: one group lies on both
        (12, 2, 4, (1, 2)),
        (8, 2, 8, (1, 4)),
        (12, 4, 6, (2, 3)),
        (8, 4, 2, (2, 1)),  # nobody shares one
        (3, 5, 3, (5, 3)),  # groups smaller than a head, across two
    ],
)
def test_r092_a_group_on_several_devices_has_one_mean(
    heads: int, groups: int, tensor: int, parts: tuple[int, int], rng: np.random.Generator
) -> None:
    layer = lightning(heads, groups)
    assert norm_parts(layer, tensor) == parts
    width = heads * HEAD
    # Every head has a magnitude of its own, so that a mean over wrong heads shows.
    x = rng.standard_normal((7, width)) * np.repeat(np.geomspace(0.1, 30, heads), HEAD)
    x, weight = x.astype(np.float32), rng.uniform(0.5, 2, width).astype(np.float32)
    config: Any = SimpleNamespace(lightning=layer, moe=SimpleNamespace(num_experts=tensor))
    parallel = Parallel.of(config, MeshShape(1, 1, tensor))
    mesh = Mesh(np.array(jax.devices()[:tensor]).reshape(1, 1, tensor, 1), AXES)

    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return norm(weight, parts[0], parallel)(x)

    spec = PartitionSpec(None, TENSOR), PartitionSpec(TENSOR)
    got = jax.jit(compat.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec[0]))(x, weight)
    assert_close(got, np.asarray(norm(jnp.asarray(weight), groups)(jnp.asarray(x))), "norm")
    wide = x.astype(np.float64).reshape(7, groups, -1)
    mean = np.mean(wide**2, axis=-1, keepdims=True)
    assert_close(got, (wide / np.sqrt(mean + EPS)).reshape(x.shape) * weight, "norm")
