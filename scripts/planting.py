"""Planted bugs: what they change, and a copy of the project that has one.

The bugs are data, tests/seeded_bugs/*.toml. Each replaces short pieces of the source, which must
stand there exactly once, so that a bug the code has grown away from is an error and never a copy
of the healthy program. The product itself knows of none of this.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "seeded_bugs"
PACKAGES = ("bailing_jax", "pallas_kernels", "convert")
# What the tests of a copy read. No caches and no version control.
PROJECT = (
    *PACKAGES, "tests", "scripts", "docs", "pyproject.toml", "README.md", "CHANGELOG.md",
    "CONTRIBUTING.md", "LICENSE",
)  # fmt: skip
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")
# The last row of each family of the catalogue.
_FAMILIES = {
    9: "numerics", 19: "order", 34: "slots", 44: "padding", 53: "chunks", 67: "prefix cache",
    78: "speculation", 90: "leaving", 97: "sharding", 106: "kernels", 112: "loading and routing",
}  # fmt: skip


class PlantingError(Exception):
    """A bug that can't be planted."""


@dataclass(frozen=True)
class Edit:
    """`old`, found exactly once in `file`, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    """One planted bug.

    Attributes:
        id: its name.
        rows: rows of the catalogue (docs/regressions.md) that it is an example of; none where it
            only spoils what a user reads.
        what: one sentence.
        edits: what is changed.
        tests: pytest ids that are expected to fail; the script runs these.
    """

    id: str
    rows: tuple[str, ...]
    what: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]

    @property
    def family(self) -> str:
        """What kind of failure it is."""
        return family(self.rows[0]) if self.rows else "text"


def family(row: str) -> str:
    """The family of a row of the catalogue."""
    number = int(row[1:])
    return next(name for last, name in _FAMILIES.items() if number <= last)


def read_bugs(folder: Path = DATA) -> list[Bug]:
    """All bugs, by file and in its order.

    Raises:
        PlantingError: a field is missing or unknown, or an id is used twice.
    """
    bugs = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["bug"]:
            try:
                bugs.append(_bug(**entry))
            except (TypeError, KeyError) as error:
                raise PlantingError(f"{path.name}: {entry.get('id')}: {error}") from error
    ids = [bug.id for bug in bugs]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise PlantingError(f"used twice: {', '.join(sorted(twice))}")
    return bugs


def _bug(
    *,
    id: str,
    what: str,
    tests: list[str],
    rows: Sequence[str] = (),
    file: str = "",
    old: str = "",
    new: str = "",
    edits: Sequence[dict[str, str]] = (),
) -> Bug:
    """A bug from its entry: one edit spelled out in place, or several in `edits`."""
    several = edits or [{"old": old, "new": new}]
    made = tuple(Edit(**{"file": file, **edit}) for edit in several)
    return Bug(id, tuple(rows), what, made, tuple(tests))


def plant(bug: Bug, project: Path) -> None:
    """Change the copy of the project.

    Raises:
        PlantingError: a file is not there, or does not hold the old text exactly once.
    """
    for edit in bug.edits:
        path = project / edit.file
        if not path.is_file():
            raise PlantingError(f"{bug.id}: there is no {edit.file}")
        text = path.read_text()
        if (count := text.count(edit.old) if edit.old else 0) != 1:
            raise PlantingError(f"{bug.id}: {edit.file} has {count} times\n{edit.old}")
        path.write_text(text.replace(edit.old, edit.new))


@contextmanager
def copy_of_project(names: Sequence[str] = PROJECT) -> Iterator[Path]:
    """A temporary folder with these files and folders of the project."""
    with TemporaryDirectory(prefix="planted-") as folder:
        for name in names:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=_LEFT_OUT)
            else:
                shutil.copy2(source, target)
        yield Path(folder)
