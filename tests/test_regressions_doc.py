"""docs/regressions.md: every row once, in one of three states, and the tests it names exist."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from named_tests import defined_tests, slow_tests

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "regressions.md"
ROWS = tuple(f"R{number:03d}" for number in range(1, 113))
STATES = ("covered", "impossible", "not yet")
_ROW = re.compile(r"^\| (R\d+) \| (.+?) \| (.+?): (.+) \|$")


class Row(NamedTuple):
    """A line of the table."""

    what: str
    state: str
    text: str

    @property
    def tests(self) -> list[str]:
        return re.findall(r"`((?:test_|Test)\w+)`", self.text)


def read(text: str) -> dict[str, Row]:
    """The table by row; a row twice, or a line that is none, fails."""
    rows: dict[str, Row] = {}
    for line in text.splitlines():
        if line.startswith("| R") and not line.startswith("| Row"):
            found = _ROW.match(line)
            assert found, line
            assert found[1] not in rows, line
            rows[found[1]] = Row(*found.groups()[1:])
    return rows


TABLE = read(DOCUMENT.read_text())


def numbered_tests() -> dict[str, set[str]]:
    """The tests whose names carry a row's number, by row."""
    found: dict[str, set[str]] = defaultdict(set)
    for _, name in defined_tests():
        for number in re.findall(r"_r(\d{3})(?=_)", name):
            found[f"R{number}"].add(name)
    return found


def test_every_row_is_there_once_and_in_order() -> None:
    assert tuple(TABLE) == ROWS


@pytest.mark.parametrize("row", TABLE)
def test_a_row_is_in_one_of_three_states(row: str) -> None:
    """Covered by tests, or in words; and each says in a sentence of its own what goes wrong."""
    entry = TABLE[row]
    assert entry.state in STATES
    assert bool(entry.tests) == (entry.state == "covered")
    assert entry.what.endswith(".")
    assert 20 < len(entry.what) < 160
    assert [other.what for other in TABLE.values()].count(entry.what) == 1


@pytest.mark.parametrize("row", TABLE)
def test_the_tests_named_exist(row: str) -> None:
    known = {name for _, name in defined_tests()}
    assert set(TABLE[row].tests) <= known
    assert len(set(TABLE[row].tests)) == len(TABLE[row].tests)


@pytest.mark.parametrize("row", TABLE)
def test_no_row_is_left_to_tests_that_run_only_when_asked_for(row: str) -> None:
    entry = TABLE[row]
    assert entry.state != "covered" or set(entry.tests) - slow_tests()


def test_slow_tests_are_known() -> None:
    assert "test_a_run_learns_and_its_model_generates" in slow_tests()
    assert "test_the_tests_named_exist" not in slow_tests()


@pytest.mark.parametrize("row", ROWS)
def test_tests_that_carry_a_rows_number_are_named_in_it(row: str) -> None:
    assert numbered_tests()[row] <= set(TABLE[row].tests)


def test_no_test_carries_a_number_without_a_row() -> None:
    assert set(numbered_tests()) <= set(ROWS)


@pytest.mark.parametrize(
    "line",
    [
        "| R001 | Twice the same. | covered: `test_a` |\n| R001 | Again. | covered: `test_b` |",
        "| R002 | No state. |",
    ],
)
def test_a_broken_table_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        read(line)
