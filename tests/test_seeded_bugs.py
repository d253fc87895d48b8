"""The planted bugs fit today's code and name tests that exist; the script runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import founding_bug
import pytest
import seeded_bugs
from named_tests import defined_tests
from planting import Bug, Edit, PlantingError, plant, read_bugs

ROOT = Path(__file__).resolve().parents[1]
BUGS = {bug.id: bug for bug in read_bugs()}


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_fits_the_code(name: str) -> None:
    """Its text stands there once, and what comes of it is still Python that differs."""
    for edit in BUGS[name].edits:
        text = (ROOT / edit.file).read_text()
        assert text.count(edit.old) == 1, edit
        planted = text.replace(edit.old, edit.new)
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text))


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_names_tests_that_exist(name: str) -> None:
    known = defined_tests()
    assert BUGS[name].tests
    for test in BUGS[name].tests:
        file, *rest = test.split("::")
        assert file in {path for path, _ in known}, test
        if rest:
            assert (file, rest[0]) in known, test
            # A law that several files share stands in a base class of another file.
            assert rest[-1] in {found for _, found in known}, test


def test_there_are_enough_and_the_founding_swap_is_among_them() -> None:
    assert len(BUGS) >= 40
    assert set(founding_bug.FOUNDING) <= set(BUGS)
    assert set(seeded_bugs.QUICK) <= set(BUGS)
    families = {bug.family for bug in BUGS.values()}
    assert {"numerics", "order", "slots", "padding", "chunks", "leaving", "kernels"} <= families


@pytest.mark.parametrize("text", ["", "old\nold\n"], ids=["not there", "twice"])
def test_a_bug_that_does_not_fit_is_not_planted(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(PlantingError, match="times"):
        plant(Bug("some", (), "", (Edit("a.py", "old", "new"),), ()), tmp_path)
    assert (tmp_path / "a.py").read_text() == text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlantingError, match=r"there is no b\.py"):
        plant(Bug("some", (), "", (Edit("b.py", "old", "new"),), ()), tmp_path)
