"""The checks of `python -m bailing_jax.selftest`: is this backend one we can trust?

Each check is a function that returns when all is well and raises otherwise; `CheckFailed` says
what was found. They need no checkpoint and are meant to end within seconds: shapes are tiny, and
compiling is nearly all of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bailing_jax import runtime, small_model
from bailing_jax.config import ModelConfig
from bailing_jax.engine import check_operators
from bailing_jax.engine.check_operators import CheckFailed
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.layer_plan import decay_table
from bailing_jax.layers.options import RuntimeOptions

# Of the shipped model's config: two layers (lightning and dense, latent and experts), odd widths.
_TINY = {
    "num_hidden_layers": 2,
    "layer_group_size": 2,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "rotary_dim": 8,
    "q_lora_rank": 26,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 18,
    "v_head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 22,
    "vocab_size": 323,
    "eos_token_id": 320,
    "pad_token_id": 320,
}
_LIMITS = EngineLimits(max_num_seqs=5, max_model_len=320, prefill_chunk=48, page_size=16)
# exp(g) of a head after one token, worked out by hand from the published formula for 3 heads and
# 2 layers: slopes 2^-4, 2^-8 and (interleaved) 2^-2; layer factors 1 + 1e-5 and 1e-5.
_DECAYS = ((0.0625, 0.00390625, 0.25), (1.00001, 0.00001))


class Result(NamedTuple):
    """What a check came to; problem is None where all is well."""

    name: str
    seconds: float
    problem: str | None


def run_checks() -> Iterator[Result]:
    """Run all checks, two at a time; none keeps another from running.

    Results come in the order of `CHECKS`, each as soon as those before it are there.
    """
    with ThreadPoolExecutor(2) as pool:
        # The last takes about as long as all the others, so it starts first.
        started = {name: pool.submit(_run, name, CHECKS[name]) for name in reversed(CHECKS)}
        for name in CHECKS:
            yield started[name].result()


def _run(name: str, check: Callable[[], None]) -> Result:
    start, problem = time.perf_counter(), None
    try:
        check()
    except CheckFailed as error:
        problem = str(error)
    except Exception as error:  # a broken backend fails in any way it likes
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return Result(name, time.perf_counter() - start, problem)


def _tiny_config() -> ModelConfig:
    released = json.loads((small_model.folder() / "config.json").read_text(encoding="utf-8"))
    return ModelConfig.from_hf(released, _TINY, where="selftest")


def index_semantics() -> None:
    """What gather, scatter, select and sort do: where nothing promises it, it is tested here."""
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    x[0] = 0
    for name, found, want in _index_cases(x):
        if not np.array_equal(np.asarray(found), want, equal_nan=True):
            raise CheckFailed(f"{name}: got {np.asarray(found).tolist()}, want {want.tolist()}")


@jax.jit
def _indexed(x: jax.Array) -> dict[str, jax.Array]:
    far, pads = jnp.array([1, 9]), jnp.array([3, 0, 0, 3])
    values = jnp.where((pads == 3)[:, None], 8.0, x[pads])
    ends, keys = jnp.array([0, 0, 3, 3, 5]), jnp.array([2, 1, 2, 0, 1])
    spoiled = x.at[2].set(jnp.nan)
    return {
        "reads out of range are clamped": x[far, 0],
        "writes out of range are dropped": x.at[far].set(9.0)[:, 0],
        "slices out of range are moved inside": jax.lax.dynamic_slice_in_dim(x, 4, 3)[:, 0],
        "equal writes to one place leave that value": x.at[pads].set(
            values, mode="promise_in_bounds"
        ),
        "select keeps NaN out": jnp.where((jnp.arange(5) == 2)[:, None], 0, spoiled).sum(1),
        "search passes over empty segments": jnp.searchsorted(ends, jnp.arange(5), side="right"),
        "sorting is stable": jnp.argsort(keys, stable=True),
        "of equal scores the first is taken": jax.lax.top_k(keys.astype(jnp.float32), 3)[1],
    }


def _index_cases(x: np.ndarray) -> Iterator[tuple[str, jax.Array, np.ndarray]]:
    dropped, written = x[:, 0].copy(), x.copy()
    dropped[1], written[3] = 9, 8
    total = x.sum(1)
    total[2] = 0
    want = {
        "reads out of range are clamped": x[[1, 4], 0],
        "writes out of range are dropped": dropped,
        "slices out of range are moved inside": x[2:5, 0],
        "equal writes to one place leave that value": written,
        "select keeps NaN out": total,
        "search passes over empty segments": np.array([2, 2, 2, 4, 4]),
        "sorting is stable": np.array([3, 1, 4, 0, 2]),
        "of equal scores the first is taken": np.array([0, 2, 1]),
    }
    found = _indexed(x)
    return ((name, found[name], want[name]) for name in want)


def decays() -> None:
    """The log decay of every layer and head, against figures worked out by hand."""
    slopes, factors = _DECAYS
    table = decay_table(_tiny_config())
    want = -np.outer(factors, slopes)
    if table.shape != want.shape or not np.allclose(table, want, rtol=2e-7, atol=0):
        raise CheckFailed(f"got {table.tolist()}, want {want.tolist()}")
    on_device = np.asarray(jax.jit(jnp.exp)(table))
    check_operators.close("exp on the device", on_device, np.exp(want))


def exact_mode() -> None:
    """A tiny model's request alone and in company, in the dtype that is usual here."""
    # Flax and the model take a second to import, in which the other checks compile already.
    from bailing_jax.checkpoint.random_weights import random_model
    from bailing_jax.engine import exact_check

    on_cpu = runtime.platform() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    # On a CPU LLVM's optimizer is half of the time that all checks take. Without it this checks
    # XLA's part, the form, library and cut it takes for an operation, and not how LLVM cuts loops.
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"} if on_cpu else {}
    config = _tiny_config()
    model = random_model(config, RuntimeOptions(dtype=dtype, exact=True), seed=0)
    spec = _LIMITS.state_spec(dtype, "float32")
    problem = exact_check.find_difference(model, config, _LIMITS, spec, options)
    if problem is not None:
        raise CheckFailed(f"{dtype}: {problem}")


CHECKS: dict[str, Callable[[], None]] = {
    "index semantics": index_semantics,
    "decay table": decays,
    "lightning decode": check_operators.lightning_decode_golden,
    "lightning prefill": check_operators.lightning_prefill_golden,
    "grouped-query attention": check_operators.paged_attention_golden,
    "latent attention": check_operators.latent_attention_golden,
    "experts": check_operators.experts_golden,
    "exact mode": exact_mode,
}
