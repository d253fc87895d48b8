"""The one place that knows about differences between jax versions and platforms.

Supported: jax 0.10.2 and newer. Matmul precision is always set here, never inherited from a
global default: float32 operands are multiplied in float32, narrower ones in one pass with
float32 accumulation.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp

from pallas_kernels.scaled import Scaled


def einsum(formula: str, *operands: jax.Array | Scaled) -> jax.Array:
    """`jnp.einsum` with float32 result and explicit precision.

    A `Scaled` comes last, and the result's last axes are its own without `in`.
    """
    *others, last = operands
    if isinstance(last, Scaled):
        # Scales multiply the few results, not the many values: a TPU's compiler, which unrolls
        # products, writes two fifths more code for those.
        return einsum(formula, *others, last.values.astype(last.dtype)) * last.scales[..., 0, :]
    arrays = cast("tuple[jax.Array, ...]", operands)
    if len(arrays) == 2 and all(x.dtype != jnp.float32 for x in arrays):
        return _narrow_product(formula, *arrays)
    return _einsum(formula, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of narrow operands; its gradients are narrow products too."""
    return _einsum(formula, a, b)


def _narrow_product_gradients(
    formula: str, operands: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The float32 gradient of a float32 result would otherwise drag both products to float32.
    a, b = operands
    inputs, _, result = formula.partition("->")
    of_a, of_b = inputs.split(",")
    g = g.astype(a.dtype)
    return (
        _einsum(f"{result},{of_b}->{of_a}", g, b).astype(a.dtype),
        _einsum(f"{of_a},{result}->{of_b}", a, g).astype(b.dtype),
    )


_narrow_product.defvjp(
    lambda formula, a, b: (_narrow_product(formula, a, b), (a, b)), _narrow_product_gradients
)


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    contract = functools.partial(jnp.einsum, formula, preferred_element_type=jnp.float32)
    highest = functools.partial(contract, precision=jax.lax.Precision.HIGHEST)
    if any(x.dtype == jnp.float32 for x in operands):
        return highest(*operands)

    def widened(*narrow: jax.Array) -> jax.Array:
        return highest(*(x.astype(jnp.float32) for x in narrow))

    # XLA's CPU matmul has no narrow operands with a float32 result. Chosen at lowering, so that
    # a program compiled on a CPU host for another machine is that machine's.
    return jax.lax.platform_dependent(
        *operands,
        cpu=widened,
        default=functools.partial(contract, precision=jax.lax.Precision.DEFAULT),
    )


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Causal softmax attention of whole sequences, differentiable.

    Args:
        q: [B, T, N, H].
        k: [B, T, Kh, H]; query head n reads key head n * Kh // N.
        v: [B, T, Kh, H].
        scale: factor of the scores.

    Returns:
        [B, T, N, H] in q's dtype. NVIDIA's fused kernel where it has one for the dtype and the
        width, XLA's otherwise.
    """
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    fused = jax.default_backend() == "gpu" and narrow and q.shape[-1] % 8 == 0 <= 128 - q.shape[-1]
    with jax.default_matmul_precision("default" if narrow else "highest"):
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation="cudnn" if fused else "xla"
        )


# Mosaic GPU: `plgpu.kernel` with mutable refs and these names came together in this release.
_MOSAIC_GPU_SINCE = (0, 11, 2)
_interpreting_mosaic_gpu = contextvars.ContextVar("interpreting_mosaic_gpu", default=False)


def has_mosaic_gpu() -> bool:
    """Whether this jax has the Mosaic GPU interface the kernels are written for."""
    return jax.__version_info__ >= _MOSAIC_GPU_SINCE


def mosaic_gpu() -> Any:
    """The module of Mosaic GPU; untyped, as its names move between releases."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def why_no_mosaic_gpu() -> str | None:
    """Why Mosaic GPU kernels can't run here, or None: they need a Hopper GPU and a newer jax."""
    if not has_mosaic_gpu():
        return f"needs jax {'.'.join(map(str, _MOSAIC_GPU_SINCE))}, this is {jax.__version__}"
    if _interpreting_mosaic_gpu.get():
        return None
    if jax.default_backend() != "gpu":
        return "no NVIDIA GPU"
    device = jax.devices()[0]
    # ROCm devices have no such attribute, or an empty one.
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.startswith("9."):
        return f"needs a Hopper GPU (compute capability 9), {device.device_kind} has {capability}"
    return None


@contextlib.contextmanager
def interpret_mosaic_gpu(*, detect_races: bool = False) -> Iterator[None]:
    """Within it Mosaic GPU kernels are interpreted on the CPU, when they are traced.

    The interpreter knows shared memory, barriers, copies and several warpgroups; it knows nothing
    of registers, layouts and alignment, which lowering checks.
    """
    plgpu = mosaic_gpu()
    token = _interpreting_mosaic_gpu.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _interpreting_mosaic_gpu.reset(token)


def is_interpreting_mosaic_gpu() -> bool:
    """Whether `interpret_mosaic_gpu` is in force."""
    return _interpreting_mosaic_gpu.get()


def store_from_registers(ref: Any, value: jax.Array) -> None:
    """Registers of a Mosaic GPU kernel to global memory, whatever lines a warp's lanes fill."""
    plgpu = mosaic_gpu()
    if hasattr(plgpu, "store"):
        # jax 0.12 wants it said aloud where a warp does not fill whole lines of 128 bytes.
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def prepare_for_mesh() -> None:
    """Choose the partitioner, before anything is placed on several devices.

    jaxlib 0.11.2 dies (a segmentation fault) where its Shardy partitioner compiles a decode step;
    0.10.2 and 0.12.0 do not.
    """
    if jax.__version_info__[:2] == (0, 11):
        jax.config.update("jax_use_shardy_partitioner", False)


def shard_map(run: Any, mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    """One program a device on its own parts of the arrays; who holds copies is not checked.

    The check does not know loops around kernels, nor sums in a fixed order.
    """
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def target_platform() -> str:
    """The platform a program traced here is for: that of the mesh in use, else the default one.

    A mesh of devices that are described but not there (`jax.sharding.set_mesh`) makes a program
    for them, whatever this host has.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def tpu_cores() -> int:
    """The TensorCores that one TPU device stands for: 2 on chips that pair them, else 1."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 1
    if jax.default_backend() != "tpu":
        return 1
    return getattr(jax.devices()[0], "num_cores", None) or 1
