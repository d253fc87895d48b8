"""Ling and Ring language models in JAX.

    from bailing_jax import LLM, SamplingParams

    llm = LLM("path/to/checkpoint")
    print(llm.generate("The answer is", SamplingParams(max_tokens=32))[0].outputs[0].text)

Public names are loaded on first use, so that importing the package costs nothing. Importing it
before jax turns off XLA's concurrency-optimised CPU scheduler, which makes small batches slow.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bailing_jax.config import ModelConfig
    from bailing_jax.engine.async_engine import AsyncEngine
    from bailing_jax.llm import LLM
    from bailing_jax.request import CompletionOutput, RequestOutput, StreamPiece
    from bailing_jax.sampling_params import SamplingParams

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "StreamPiece",
]

_HOME = {
    "AsyncEngine": "engine.async_engine",
    "CompletionOutput": "request",
    "LLM": "llm",
    "ModelConfig": "config",
    "RequestOutput": "request",
    "SamplingParams": "sampling_params",
    "StreamPiece": "request",
}

_SCHEDULER_FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"


def _set_cpu_scheduler() -> None:
    """Set XLA's flag unless the user did; XLA reads it once, when jax first compiles."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _SCHEDULER_FLAG in flags:
        return
    if "jax" in sys.modules:
        warnings.warn(
            "jax was imported before bailing_jax: on a CPU, steps may run several times slower. "
            f"Import bailing_jax first, or set XLA_FLAGS=--{_SCHEDULER_FLAG}=false.",
            stacklevel=3,
        )
        return
    os.environ["XLA_FLAGS"] = f"{flags} --{_SCHEDULER_FLAG}=false".strip()


_set_cpu_scheduler()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
