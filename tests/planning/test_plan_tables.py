"""The tables in docs/benchmarks: up to date, complete, and their limits are looked at."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import plan_compiled
import plan_table
import pytest

from bailing_jax.mesh import MeshShape, check_mesh
from bailing_jax.planning import model, topology
from bailing_jax.planning.chips import CHIPS
from bailing_jax.presets import preset_names

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def test_every_model_dtype_and_chip_has_a_row() -> None:
    rows = json.loads((FOLDER / "plan.json").read_text())
    assert [(row["model"], row["weight_dtype"], row["chip"]) for row in rows] == [
        (name, dtype, chip)
        for name in preset_names()
        for dtype in plan_table.DTYPES
        for chip in CHIPS
    ]
    assert (FOLDER / "plan.md").read_text() == plan_table.markdown(rows)


@pytest.mark.parametrize(
    ("name", "dtype", "chip"),
    [
        ("ring-mini-linear-2.0", "bfloat16", "v5e"),
        ("ling-2.6-1t", "float8_e4m3fn", "v6e"),
        ("ling-3.0-flash", "bfloat16", "h100"),
    ],
)
def test_rows_are_what_the_planner_says(name: str, dtype: str, chip: str) -> None:
    rows = json.loads((FOLDER / "plan.json").read_text())
    keys = ("model", "weight_dtype", "chip")
    (kept,) = (row for row in rows if tuple(row[key] for key in keys) == (name, dtype, chip))
    assert json.loads(json.dumps(plan_table.row(name, dtype, chip))) == kept


def test_cases_that_are_compiled_divide_their_models() -> None:
    for case in plan_compiled.CASES:
        mesh = MeshShape.parse(case.mesh)
        planned = model.read(case.model)
        check_mesh(planned.config, mesh)
        assert mesh.num_devices == topology.parse(case.topology).num_devices
        # More devices than groups would add a collective a layer.
        lightning = planned.config.lightning
        assert lightning is not None
        assert mesh.tensor <= lightning.num_norm_groups
    assert len({case.name for case in plan_compiled.CASES}) == len(plan_compiled.CASES)


CASE: dict[str, Any] = {
    "mesh": {"data": 1, "expert": 1, "tensor": 4},
    "floor_bytes": {"weights": 1000, "recurrent_state": 60, "pages": 40, "temporaries": 9},
    "hbm_bytes": 2**34,
    "steps": [
        {
            "name": "decode",
            "rows_a_shard": 32,
            "argument_bytes": 1150,
            "alias_bytes": 100,
            "temporary_bytes": 2**30,
            "state_copies": 0,
            "beside_the_exchange": 2.0,
            "compile_s": 300.0,
            "compile_cpu_s": 200.0,
            "collectives": [
                {"kind": "all-reduce", "count": 11},
                {"kind": "all-reduce", "count": 2},
            ],
        }
    ],
}
NAME = plan_compiled.CASES[0].name


def test_a_case_within_the_limits() -> None:
    assert plan_compiled.broken(NAME, CASE) == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("argument_bytes", 1300, "1.182 of the floor"),
        ("alias_bytes", 99, "the state is not updated in place"),
        ("state_copies", 3, "the state is copied at 3 places"),
        ("temporary_bytes", 2**30 + 2**20, "1.00 GiB of temporaries"),
        ("beside_the_exchange", 2.1, "2.10 collectives a layer"),
        ("compile_s", 301.0, "compiled in 301.0 s"),
    ],
)
def test_a_limit_that_is_not_kept(field: str, value: float, says: str) -> None:
    case = deepcopy(CASE)
    case["steps"][0][field] = value
    assert plan_compiled.broken(NAME, case) == [f"{NAME}, decode: {says}"]


def test_memory_that_is_not_there() -> None:
    found = plan_compiled.broken(NAME, CASE | {"hbm_bytes": 2**30})
    assert found == [f"{NAME}, decode: 1.00 GiB in all"]


def test_report_of_compiled_cases() -> None:
    other = plan_compiled.CASES[1].name
    found = {
        "versions": {"jax": "0"},
        "cases": {NAME: CASE, other: {"failed": "not done after 9 s"}},
        "broken": [f"{other}: not done after 9 s"],
    }
    text = plan_compiled.markdown(found)
    assert "Nothing here ran on a TPU, and no pod was used." in text
    assert "| yes | 2.00 | 13 all-reduce | 300 (200) |" in text
    assert f"- {other}: not done after 9 s" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(tables)) == 1
