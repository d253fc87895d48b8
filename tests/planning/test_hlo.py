"""Collectives read off a program's text."""

from __future__ import annotations

import pytest

from bailing_jax.mesh import MeshShape
from bailing_jax.planning.compiled_step import Collective, CompiledStep
from bailing_jax.planning.hlo import collectives

MESH = MeshShape(expert=2, tensor=2)
LAYER = 'metadata={op_name="jit(f)/jit(_run_layer)/psum"}'
PAIRS = "replica_groups={{0,1},{2,3}}"
TURNED = "replica_groups=[2,2]<=[2,2]T(1,0)"
TEXT = f"""
%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%a, %b)
}}
ENTRY %main {{
  %p = bf16[8,128]{{1,0:T(8,128)}} parameter(0)
  %all-reduce.3 = f32[8,128]{{1,0:T(8,128)}} all-reduce(%x), {PAIRS}, {LAYER}
  %ag = (bf16[4,128]{{1,0}}, bf16[8,128]{{1,0}}) all-gather-start(%p), {TURNED}
  %agd = bf16[8,128]{{1,0}} all-gather-done(%ag)
  %rs = f32[2,128]{{1,0}} reduce-scatter(%y), replica_groups=[2,2]<=[4], {LAYER}
  %two = (f32[8]{{0}}, s32[4]{{0}}) all-reduce(%u, %v), {PAIRS}, {LAYER}
  %use = f32[8,128]{{1,0}} fusion(%all-reduce.3), calls=%fused
  %a2a = pred[16]{{0}} all-to-all(%z), replica_groups={{{{0,1,2,3}}}}
  %perm = f8e4m3fn[16]{{0}} collective-permute(%z), source_target_pairs={{{{0,2}},{{2,0}}}}
}}
"""
FOUND = (
    Collective("all-reduce", "tensor", True, 2, 8 * 128 * 4 + 8 * 4 + 4 * 4),
    Collective("all-gather", "expert", False, 1, 8 * 128 * 2),
    Collective("reduce-scatter", "tensor", True, 1, 2 * 128 * 4),
    Collective("all-to-all", "expert and tensor", False, 1, 16),
    Collective("collective-permute", "expert", False, 1, 16),
)


def test_collectives_by_kind_and_axis() -> None:
    assert collectives(TEXT, MESH) == FOUND


def test_a_program_without_any() -> None:
    assert collectives("ENTRY %main { %p = f32[8]{0} parameter(0) }", MESH) == ()


def test_those_of_a_layer_beside_the_exchange() -> None:
    exchange = Collective("all-gather", "expert", True, 9, 5)
    step = CompiledStep("decode", 1, 0, 0, 0, 0, (*FOUND, exchange), 0.0, 0.0, 0.0)
    assert step.beside_the_exchange(2) == pytest.approx(1.5)
