"""Compiling for a CPU in half the time, where nothing measured depends on it.

jax's own switch leaves out most of LLVM's work. What is left goes to XLA's fusion emitters, which
lower each fusion through MLIR; up to jax 0.10 XLA has a switch that writes LLVM's code at once.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import pytest
from jax._src import compiler

_FLAG = "xla_cpu_use_fusion_emitters"
_HAS_FLAG = jax.__version_info__ < (0, 11)
# For processes of their own; they optimise as little as they are told by jax's switch.
FLAGS = (f"--{_FLAG}=false",) if _HAS_FLAG else ()


def leave_out_fusion_emitters(patch: pytest.MonkeyPatch) -> None:
    """In this process and in commands it starts, until `patch` is undone."""
    if not _HAS_FLAG:
        return
    # XLA reads its flags once, and a process takes files that optimise as well.
    options = compiler.get_compile_options

    def without(*args: Any, **kwargs: Any) -> Any:
        found = options(*args, **kwargs)
        found.env_option_overrides = [*found.env_option_overrides, (_FLAG, False)]
        return found

    patch.setattr(compiler, "get_compile_options", without)
    patch.setenv("XLA_FLAGS", " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip())
