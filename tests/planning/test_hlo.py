"""Collectives, and copies of the state, read off a program's text."""

from __future__ import annotations

import pytest

from bailing_jax.mesh import MeshShape
from bailing_jax.planning.compiled_step import Collective, CompiledStep
from bailing_jax.planning.hlo import collectives, state_copies

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
    step = CompiledStep("decode", 1, 0, 0, 0, 0, (*FOUND, exchange), 0, 0.0, 0.0, 0.0)
    assert step.beside_the_exchange(2) == pytest.approx(1.5)


def program(*lines: str, aliases: str = "{1}: (2, {}, may-alias), {2}: (1, {}, must-alias)") -> str:
    arguments = "s32[8]{0}, bf16[5,64,256]{2,1,0:T(8,128)(2,1)}, /*index=2*/f32[9,4,16]{2,1,0}"
    head = f"HloModule step, is_scheduled=true, input_output_alias={{ {aliases} }}, "
    entry = f"entry_computation_layout={{({arguments})->(s32[8]{{0}}, bf16[5,64,256]{{2,1,0}})}}"
    return "\n".join([head + entry, "ENTRY %main {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("%copy.1 = bf16[5,64,2,128]{3,2,1,0:T(2,128)(2,1)} copy(%pages)", 1),
        ("ROOT %t = f32[16,9,4]{2,1,0} transpose(%slots), dimensions={2,0,1}", 1),
        ("%copy.2 = s32[8]{0} copy(%tokens)", 0),
        ("%scatter = bf16[5,64,256]{2,1,0} fusion(%pages), calls=%fused", 0),
        ("%row = bf16[64,256]{1,0} copy(%page)", 0),
        ("%weights = f8e4m3fn[9,256]{0,1} copy(%narrow)", 0),  # as many bytes as the slots
    ],
)
def test_copies_of_what_is_updated_in_place(line: str, count: int) -> None:
    """Of another shape or layout, they are found by their dtype and size."""
    assert state_copies(program(line)) == count
    assert state_copies(program(line, line, "%x = f32[] add(%a, %b)")) == 2 * count


def test_of_an_argument_that_is_only_read_copies_are_free() -> None:
    line = "%copy.1 = bf16[5,64,2,128]{3,2,1,0} copy(%weights)"
    assert state_copies(program(line, aliases="{1}: (2, {}, may-alias)")) == 0
    assert state_copies("ENTRY %main { %copy = f32[8]{0} copy(%p) }") == 0


def test_arguments_that_are_one_tuple_are_told_apart() -> None:
    """As XLA takes more than 2,000: that all are in argument 0 does not make the first a pool."""
    aliases = "{1}: (0, {2}, may-alias), {2}: (0, {1}, must-alias)"
    pool, tokens = "f32[16,9,4]{2,1,0} copy(%slots)", "s32[8]{0} copy(%tokens)"
    assert state_copies(program(f"%copy.1 = {pool}", aliases=aliases)) == 1
    assert state_copies(program(f"%copy.1 = {tokens}", aliases=aliases)) == 0
