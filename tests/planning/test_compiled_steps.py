"""The laws of compiled steps, in a process of its own with eight simulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import compiling

HERE = Path(__file__).parent
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    *compiling.FLAGS,
)


def test_laws_hold_on_eight_devices() -> None:
    paths = [str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "laws_of_compiled_steps.py",
        ],
        cwd=HERE,
        env={
            **os.environ,
            "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
