"""No loop of the product may end early because two lists differ in length."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Whoever computes a step: a row left out there is a wrong answer, not an error.
PLACES = ("pallas_kernels", *(f"bailing_jax/{name}" for name in (
    "engine", "layers", "checkpoint", "batch.py", "model.py", "state.py", "llm.py",
)))  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_r018_every_zip_is_strict(place: str) -> None:
    path = ROOT / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":
                strict = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert strict.get("strict") == "True", f"{file}:{node.lineno}"
