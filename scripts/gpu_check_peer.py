"""flash-linear-attention's kernels at the shapes of `gpu_check.py`, in a process of their own.

Writes one JSON object, anew after each shape: GPU time a call (the profiler's sum over kernels)
and wall time, in microseconds, by shape. Needs torch, triton, einops and fla-core.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
from lightning_shapes import DECODES, PREFILLS, UNTUNED, Decode, Prefill
from torch.profiler import ProfilerActivity, profile

ROTATED_BYTES = 300_000_000
SCALE = 128**-0.5


def measure(call, calls: int) -> dict[str, float]:
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        call(i)
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in found.key_averages())
    return {"gpu_us": total / calls, "wall_us": 1e6 * wall / calls}


def decays(heads: int) -> torch.Tensor:
    return -torch.logspace(-0.0458, -3, heads, device="cuda")


def normal(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def time_prefill(shape: Prefill, calls: int) -> dict[str, float]:
    if shape.dtype != "bfloat16":
        return {}
    rows, heads, dim, num = shape.rows, shape.heads, shape.head_dim, len(shape.lengths)
    sets = min(16, max(2, -(-ROTATED_BYTES // (6 * rows * heads * dim))))
    inputs = [[normal(1, rows, heads, dim) for _ in range(3)] for _ in range(sets)]
    if shape.backward:
        inputs = [[x.requires_grad_() for x in xs] for xs in inputs]
    cu_seqlens = torch.tensor([0, *shape.lengths]).cumsum(0)
    options = {
        "g_gamma": decays(heads), "scale": SCALE, "output_final_state": True,
        "initial_state": normal(num, heads, dim, dim, dtype=torch.float32),
        "cu_seqlens": cu_seqlens.cuda(),
    }  # fmt: skip
    weight = normal(1, rows, heads, dim)

    def call(i):
        xs = inputs[i % sets]
        o, _ = chunk_simple_gla(*xs, **options)
        if shape.backward:
            torch.autograd.grad(o, xs, weight)

    return measure(call, calls)


def time_decode(shape: Decode, calls: int) -> dict[str, float]:
    if shape.state_dtype != "float32":
        return {}
    batch, heads, dim = shape.batch, shape.heads, shape.head_dim
    sets = min(64, max(2, -(-ROTATED_BYTES // (4 * batch * heads * dim * dim))))
    states = [normal(batch, heads, dim, dim, dtype=torch.float32) for _ in range(sets)]
    rows = [normal(batch, 1, heads, dim) for _ in range(3)]
    gamma = decays(heads)

    def call(i):
        _, states[i % sets] = fused_recurrent_simple_gla(
            *rows, g_gamma=gamma, scale=SCALE, initial_state=states[i % sets],
            output_final_state=True,
        )  # fmt: skip

    return measure(call, calls)


def main() -> None:
    calls, path = int(sys.argv[1]), Path(sys.argv[2])
    found = {}
    # Decoding first: its kernels compile once, a prefill is tuned anew for each number of heads.
    for shape in (*DECODES, *PREFILLS, *UNTUNED):
        run = time_prefill if isinstance(shape, Prefill) else time_decode
        try:
            found[shape.name] = run(shape, calls)
        except Exception as error:
            found[shape.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(shape.name, found[shape.name], file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
