"""The planner's figures against the engine's own programs on eight simulated devices.

Run by test_compiled_steps.py, in a process that has them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import pytest
from tiny_models import LATENT, LINEAR

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_DOES_NOT_FIT, UserError
from bailing_jax.mesh import MeshShape
from bailing_jax.planning import compiled, footprint, model, ranking, report, steps
from bailing_jax.planning.chips import CHIPS
from bailing_jax.planning.topology import parse
from bailing_jax.planning.workload import FP8, Workload, workload

WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "vocab_size": 320,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "group_norm_size": 4,
}
CONFIGS = {"latent": {**LATENT, **WIDE, "num_key_value_heads": 4}, "linear": {**LINEAR, **WIDE}}
MESHES = (MeshShape(2, 2, 2), MeshShape(expert=2, tensor=4), MeshShape(tensor=4))


def planned(name: str, weight_dtype: str) -> tuple[model.PlannedModel, Workload]:
    found = model.planned(name, ModelConfig.from_hf(CONFIGS[name]))
    load = workload(
        found.config, max_num_seqs=5, max_model_len=100, prefill_chunk=16, weight_dtype=weight_dtype
    )
    return found, load


def held(tree: Any) -> int:
    """Bytes of one device's part of shapes that have a place."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", FP8])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_programs_arguments(
    name: str, mesh: MeshShape, weight_dtype: str
) -> None:
    found, load = planned(name, weight_dtype)
    built = steps.built(found.config, jax.devices(), mesh, load)
    needs = footprint.footprint(found, CHIPS["v6e"], mesh, load).needs
    assert held(built.leaves) == needs["weights"]
    assert held(built.state) == needs["recurrent_state"] + needs["pages"]


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of described TPUs and their compiler: these eight devices and theirs."""
    monkeypatch.setattr(compiled, "prepare", lambda _topology: None)
    monkeypatch.setattr(compiled, "_devices", lambda _topology: jax.devices())


@pytest.mark.usefixtures("on_cpus")
@pytest.mark.parametrize(
    ("name", "mesh", "weight_dtype"),
    [("latent", MeshShape(2, 2, 2), FP8), ("linear", MeshShape(expert=2, tensor=4), "bfloat16")],
)
def test_compiled_steps(name: str, mesh: MeshShape, weight_dtype: str) -> None:
    """State in place, arguments as planned, two collectives a layer beside the exchange."""
    found, load = planned(name, weight_dtype)
    needs = footprint.footprint(found, CHIPS["v6e"], mesh, load).needs
    state = needs["recurrent_state"] + needs["pages"]
    where, said = parse("v6e:2x4"), []
    made = compiled.steps(found, where, mesh, load, said.append)
    assert [step.name for step in made] == ["decode", "prefill"]
    assert said == [f"compiling the {step.name} step for v6e:2x4" for step in made]
    rows = load.decode_rows(mesh)
    assert [step.rows_a_shard for step in made] == [rows, rows + 16]
    for step in made:
        # Beside weights and state only the layout: tokens, tables, knobs.
        assert 0 < step.argument_bytes - needs["weights"] - state < 4096
        assert step.alias_bytes >= state
        assert step.beside_the_exchange(found.config.num_layers) == 2
        assert any(x.over == "expert" and x.is_in_layer for x in step.collectives)
    chosen, ranked = ranking.chosen(found, where, str(mesh), load)
    text = report.as_text(report.Plan(found, load, chosen, ranked, None, made))
    assert "compiled for v6e:2x4, not run (bytes are a device's):" in text
    assert "a layer has 2.00 beside the exchange" in text
    plan = report.as_object(report.Plan(found, load, chosen, ranked, None, made))
    assert [step["beside_the_exchange"] for step in plan["compiled"]] == [2, 2]


class Refuses:
    """In place of a lowered program: a compiler that says this."""

    def __init__(self, says: str) -> None:
        self.says = says

    def compile(self, _options: None) -> None:
        raise jax.errors.JaxRuntimeError(self.says)


@pytest.mark.parametrize(
    "says", ["RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", "no"]
)
def test_a_step_that_does_not_fit(says: str) -> None:
    is_memory, where = "memory" in says, parse("v6e:2x2")
    with pytest.raises(UserError if is_memory else jax.errors.JaxRuntimeError) as refused:
        compiled._compiled("decode", 4, lambda: (Refuses(says), None), where, MeshShape())
    if isinstance(refused.value, UserError):
        assert refused.value.exit_code == EXIT_DOES_NOT_FIT
        assert "the decode step does not fit v6e:2x2: RESOURCE_EXHAUSTED" in refused.value.message
