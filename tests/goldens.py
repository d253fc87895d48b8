"""The golden sets: checkpoints with the outputs of independent code, and their tolerances.

Each set's README names the tolerance of every array and where it comes from; it is read from
there, so that no second copy can drift.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("v2-gqa", "linear_v2-gqa", "v2_5-mla", "v2_5-mla-bf16")
LINEAR = tuple(name for name in NAMES if name != "v2-gqa")
# What the publishers' files use, and so what the sets were made with.
OVERRIDES = {"decay_layer_offset": 1}

_ROW = re.compile(r"^\| (\w+) \|.*\| ([0-9.e+-]+) \|$", re.MULTILINE)


@functools.cache
def tolerance(name: str, array: str) -> float:
    """The README's suggested absolute tolerance of an array."""
    table = dict(_ROW.findall((GOLDEN / name / "README.md").read_text()))
    return float(table[array])


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a set."""
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


def layers_of(name: str, prefix: str) -> dict[int, np.ndarray]:
    """Arrays called `{prefix}_layer{i}`, by layer."""
    found = {}
    for key, array in golden(name).items():
        if key.startswith(f"{prefix}_layer"):
            found[int(key.removeprefix(f"{prefix}_layer"))] = array
    return found


def close(name: str, array: str, got: np.ndarray, want: np.ndarray) -> None:
    """Assert agreement within the README's tolerance."""
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(name, array), err_msg=array)
