"""Gradients of the GPU's lightning prefill: those of `train`, and float64 slopes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_bits, normal
from lightning_cases import Segment
from lightning_gpu_cases import MACHINES, SCALE, Call, on, rms_error
from tolerances import TOLERANCES

from pallas_kernels import lightning_prefill
from pallas_kernels.lightning_attention import gpu_grad
from pallas_kernels.lightning_attention.gpu_work import cut


def weighted(call, which, weights, **options):
    """The sum of outputs and states with weights, as a function of the arrays."""

    def value(*arrays):
        o, after = which(*arrays, **call.places, scale=SCALE, **options)
        return (o.astype(jnp.float32) * weights[0]).sum() + (after * weights[1]).sum()

    return value


@MACHINES
def test_gradients_are_those_of_train(rng, machine):
    """Of q, k, v and the pool: through fresh segments, empty ones and one that is cut."""
    segments = [Segment(4, 420), Segment(3, 0), Segment(2, 70, True)]
    call = Call.random(rng, segments, [-0.004], 64, 64)
    call.state = normal(rng, call.state.shape, "float32")
    weights = normal(rng, call.v.shape, "float32"), normal(rng, call.state.shape, "float32")
    assert cut(len(call.q), len(segments), 1, 64, 2).windows
    with on(machine):
        of_kernels = weighted(call, gpu_grad.lightning_prefill, weights, blocks=2)
        got = jax.jit(jax.grad(of_kernels, argnums=(0, 1, 2, 4)))(*call.arrays)
    wide = [x.astype(jnp.float32) for x in call.arrays]
    of_train = weighted(call, lightning_prefill, weights, implementation="train")
    want = jax.jit(jax.grad(of_train, argnums=(0, 1, 2, 4)))(*wide)
    for ours, theirs in zip(got, want, strict=True):
        assert rms_error(ours, np.asarray(theirs), 1) <= TOLERANCES["wgmma_rms"]
    # The gradient of what nothing reads is none, and slots of nobody pass theirs on.
    d_pool = np.asarray(got[3])
    assert (d_pool[2] == 0).all()
    assert_same_bits(d_pool[[0, 1, 3, 5]], weights[1][[0, 1, 3, 5]])


@MACHINES
@pytest.mark.parametrize(
    ("size", "dtype"), [((64, 128), "bfloat16"), ((32, 48), "float32")], ids=["kernels", "scan"]
)
def test_gradients_are_float64_slopes(rng, machine, size, dtype):
    """By differences of the float64 fold; nobody trains the decay, but who asks is told right."""
    call = Call.random(rng, [Segment(2, 41), Segment(1, 30, True)], [-0.1], *size, dtype=dtype)
    call.state = normal(rng, call.state.shape, "float32")
    weights = normal(rng, call.v.shape, "float32"), normal(rng, call.state.shape, "float32")
    with on(machine):
        value = weighted(call, gpu_grad.lightning_prefill, weights)
        got = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3, 4)))(*call.arrays)

    def value64(**changed):
        o, new = dataclasses.replace(call, **changed).fold()
        after = changed.get("state", call.state).astype(np.float64)
        for slot, s in new.items():
            after[slot] = s
        return (o * weights[0]).sum() + (after * weights[1]).sum()

    for name, gradient in zip(("q", "k", "v", "log_decay", "state"), got, strict=True):
        array = getattr(call, name).astype(np.float64)
        direction = np.asarray(gradient).astype(np.float64)
        step = 1e-4 / np.abs(direction).max()
        up, down = (value64(**{name: array + s * step * direction}) for s in (1, -1))
        # Along the gradient itself the slope is its square.
        slope = (up - down) / (2 * step)
        tolerance = {"bfloat16": "wgmma_rms", "float32": "training_gradient"}[dtype]
        assert abs(slope / (direction**2).sum() - 1) <= TOLERANCES[tolerance]
