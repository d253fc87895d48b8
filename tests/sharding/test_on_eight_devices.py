"""The laws of a model on a mesh, each file in a process of its own with eight simulated devices.

How many devices a process has is fixed when jax starts, and the other tests want one. XLA compiles
without optimising here: nearly all the time would go there, and nothing measured depends on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import compiling
import pytest

HERE = Path(__file__).parent
LAWS = sorted(path.name for path in HERE.glob("laws_*.py"))
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    *compiling.FLAGS,
)
# Eight devices on a few busy cores take their time.
OPTIONS = ("-p", "no:cacheprovider", "-o", "timeout=1800")


def test_there_are_laws() -> None:
    assert [f"laws_of_{what}.py" for what in ("loading", "norms", "programs", "steps")] == LAWS


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("laws", "which"),
    [
        *((laws, "not slow") for laws in LAWS),
        # Most of an hour; the norms have none.
        *(
            pytest.param(laws, "slow", marks=pytest.mark.slow)
            for laws in LAWS
            if laws != "laws_of_norms.py"
        ),
    ],
)
def test_i13_laws_hold_on_eight_devices(laws: str, which: str) -> None:
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *OPTIONS, "-m", which, laws],
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
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
