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
from bailing_jax.mesh import MeshShape
from bailing_jax.planning import footprint, hlo, model, steps
from bailing_jax.planning.compiled_step import CompiledStep
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
    needs = footprint.footprint(found, mesh, load).needs
    assert held(built.leaves) == needs["weights"]
    assert held(built.state) == needs["recurrent_state"] + needs["pages"]


@pytest.mark.parametrize(
    ("name", "mesh", "weight_dtype"),
    [("latent", MeshShape(2, 2, 2), FP8), ("linear", MeshShape(expert=2, tensor=4), "bfloat16")],
)
def test_compiled_steps(name: str, mesh: MeshShape, weight_dtype: str) -> None:
    """State in place, arguments as planned, two collectives a layer beside the exchange."""
    found, load = planned(name, weight_dtype)
    needs = footprint.footprint(found, mesh, load).needs
    state = needs["recurrent_state"] + needs["pages"]
    names = []
    for step, _rows, lower in steps.traceable(found.config, jax.devices(), mesh, load):
        compiled = lower().compile()
        memory = compiled.memory_analysis()
        # Beside weights and state only the layout: tokens, tables, knobs.
        layout = memory.argument_size_in_bytes - needs["weights"] - state
        assert 0 < layout < 4096
        assert memory.alias_size_in_bytes >= state
        collectives = hlo.collectives(compiled.as_text(), mesh)
        made = CompiledStep(step, 0, 0, 0, 0, 0, collectives, 0, 0, 0)
        assert made.beside_the_exchange(found.config.num_layers) == 2
        assert any(x.over == "expert" and x.is_in_layer for x in collectives)
        names.append(step)
    assert names == ["decode", "prefill"]
