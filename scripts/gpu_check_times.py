"""GPU times of the lightning kernels, read from the profiler; for `gpu_check.py`.

A time is what the kernels of a call take on the GPU: for each kernel its median over the calls,
times how often it runs in one, summed. Inputs rotate through more memory than the L2 cache holds.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lightning_shapes import Decode, Prefill

from pallas_kernels import compat, lightning_prefill
from pallas_kernels.lightning_attention import gpu_decode, gpu_grad

# More than the L2 cache of any GPU here (50 to 60 MB), several times over.
ROTATED_BYTES = 300_000_000
SCALE = 128**-0.5
# Calls of decode in one program, so that they run inside one CUDA graph as in a model's step.
DECODES_A_STEP = 16


def measure(call: Callable[[int], Any], calls: int, per_call: int = 1) -> dict[str, Any]:
    """Times of `call(i)`, which does the measured thing `per_call` times and returns its arrays."""
    for i in range(3):
        jax.block_until_ready(call(i))
    start = time.perf_counter()
    for i in range(calls):
        out = call(i)
    queued = time.perf_counter() - start
    jax.block_until_ready(out)
    wall = time.perf_counter() - start
    found: dict[str, Any] = {
        "wall_us": 1e6 * wall / calls / per_call,
        "host_us": 1e6 * queued / calls / per_call,
    }
    try:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                for i in range(calls):
                    out = call(i)
                jax.block_until_ready(out)
            kernels = kernel_times(Path(folder))
    except Exception as error:  # a broken profiler must not cost the other columns
        found["profiler"] = f"{type(error).__name__}: {error}"[:300]
        return found
    total = 0.0
    found["kernels"] = {}
    for name, times in kernels.items():
        share = len(times) / calls / per_call
        total += statistics.median(times) * share
        found["kernels"][name] = {
            "median_us": round(statistics.median(times), 2), "a_call": round(share, 3),
            "least_us": round(min(times), 2), "most_us": round(max(times), 2),
        }  # fmt: skip
    if total:
        found["gpu_us"] = total
    return found


def kernel_times(folder: Path) -> dict[str, list[float]]:
    """Microseconds of every event on the GPU's streams, by name."""
    (path,) = folder.rglob("*.xplane.pb")
    times: dict[str, list[float]] = defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    times[event.name].append(event.duration_ns / 1e3)
    return times


def random_arrays(
    seed: int, *shapes: tuple[int, ...], dtype: Any = jnp.bfloat16
) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def number_of_sets(bytes_a_set: int) -> int:
    return min(16, max(2, -(-ROTATED_BYTES // bytes_a_set)))


def time_prefill(
    shape: Prefill, calls: int, implementation: str = "gpu", **tuning: int
) -> dict[str, Any]:
    """Times of one prefill, with its gradients of q, k and v where the shape says so."""
    rows, heads, dim, num = shape.rows, shape.heads, shape.head_dim, len(shape.lengths)
    dtype = jnp.dtype(shape.dtype)
    sets = number_of_sets(3 * rows * heads * dim * dtype.itemsize)
    inputs = [random_arrays(i, *[(rows, heads, dim)] * 3, dtype=dtype) for i in range(sets)]
    log_decay = -jnp.asarray(np.geomspace(0.9, 0.001, heads), jnp.float32)
    places = {
        "slots": jnp.arange(1, num + 1, dtype=jnp.int32),
        "cu_seqlens": jnp.asarray(np.cumsum([0, *shape.lengths]), jnp.int32),
        # Half go on from a state.
        "is_fresh": jnp.arange(num) % 2 == 1,
    }
    if tuning:
        run = functools.partial(gpu_grad.lightning_prefill, **tuning)
    else:
        run = functools.partial(lightning_prefill, implementation=implementation)
    state = random_arrays(99, (num + 1, heads, dim, dim), dtype=jnp.float32)[0]

    if shape.backward:
        weight = random_arrays(98, (rows, heads, dim))[0]

        def step(q, k, v, state):
            def outputs(q, k, v):
                return run(q, k, v, log_decay, state, **places, scale=SCALE)

            o, pull = jax.vjp(outputs, q, k, v)
            return o, pull((weight, jnp.zeros_like(state)))

        program = jax.jit(step)
        return measure(lambda i: program(*inputs[i % sets], state), calls)

    program = jax.jit(
        lambda q, k, v, state: run(q, k, v, log_decay, state, **places, scale=SCALE),
        donate_argnums=3,
    )
    pool = [state]

    def call(i):
        o, pool[0] = program(*inputs[i % sets], pool[0])
        return o, pool[0]

    return measure(call, calls)


def time_decode(shape: Decode, calls: int, **tuning: int) -> dict[str, Any]:
    """Times of one decode, inside a program of many on slots that rotate through the pool."""
    batch, heads, dim = shape.batch, shape.heads, shape.head_dim
    state_bytes = heads * dim * dim * jnp.dtype(shape.state_dtype).itemsize
    num_slots = 1 + max(2 * batch, -(-ROTATED_BYTES // state_bytes))
    q, k, v = random_arrays(1, *[(batch, heads, dim)] * 3)
    state = random_arrays(2, (num_slots, heads, dim, dim), dtype=jnp.dtype(shape.state_dtype))[0]
    log_decay = -jnp.asarray(np.geomspace(0.9, 0.001, heads), jnp.float32)
    rng = np.random.default_rng(0)
    # Each step's calls go through the slots without coming back before the pool is through.
    orders = [1 + rng.permutation(num_slots - 1) for _ in range(4)]
    slots = [
        jnp.asarray([np.roll(order, -i * batch)[:batch] for i in range(DECODES_A_STEP)], jnp.int32)
        for order in orders
    ]
    one = jax.jit(
        lambda state, q, slots: gpu_decode.lightning_decode(
            q, k, v, log_decay, state, slots=slots, scale=SCALE, **tuning
        )
    )

    def step(state, q, slots):
        for i in range(DECODES_A_STEP):
            o, state = one(state, q, slots[i])
            # The next call waits for this one, as in a model.
            q = q + 1e-3 * o
        return q, state

    program = jax.jit(step, donate_argnums=0)
    pool = [state]

    def call(i):
        o, pool[0] = program(pool[0], q, slots[i % len(slots)])
        return o, pool[0]

    found = measure(call, calls, per_call=DECODES_A_STEP)
    own = [v for name, v in found.get("kernels", {}).items() if "lightning" in name]
    if own:
        # Without the sums and slices that only tie the calls together.
        found["gpu_us"] = sum(v["median_us"] * v["a_call"] for v in own)
    return found


def ceilings(calls: int, *, dry: bool) -> dict[str, float]:
    """What this GPU's memory and matrix units reach: TB/s read + written, bfloat16 TFLOP/s."""
    size = 1 << 12 if dry else 1 << 30
    x = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copied = measure(lambda _: copy(x), calls)
    side = 64 if dry else 8_192
    a, b = random_arrays(5, (side, side), (side, side))
    product = jax.jit(lambda a, b: a @ b)
    multiplied = measure(lambda _: product(a, b), calls)
    return {
        "copy_tb_s": 2 * x.nbytes / best(copied) / 1e6,
        "matmul_tflop_s": 2 * side**3 / best(multiplied) / 1e6,
    }


def best(found: dict[str, Any]) -> float:
    """The GPU time, or the wall time where there is none."""
    return found.get("gpu_us", found["wall_us"])


def is_interpreted() -> bool:
    return compat.is_interpreting_mosaic_gpu()
