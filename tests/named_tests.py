"""Which tests there are, read off the sources without running or importing any."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent


@functools.cache
def defined_tests() -> frozenset[tuple[str, str]]:
    """(file from the project's root, name) of every test function, method and class.

    Laws that several files share stand in a base class and count for the file they stand in;
    a class made by assignment (hypothesis' state machines) counts too.
    """
    return frozenset(
        (path.relative_to(TESTS.parent).as_posix(), name)
        for path in sorted(TESTS.rglob("*.py"))
        for name in _names(ast.parse(path.read_text()).body)
    )


@functools.cache
def slow_tests() -> frozenset[str]:
    """Names of functions that are `slow` in all their cases, and so left out by default."""
    return frozenset(
        node.name
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
    )


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_test(node.name):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            if _is_test(node.name):
                yield node.name
            yield from _names(node.body)
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name) and _is_test(t.id))


def _is_test(name: str) -> bool:
    return name.startswith(("test_", "Test"))
