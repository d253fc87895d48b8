"""Collectives read off a program's text."""

from __future__ import annotations

from bailing_jax.planning.compiled_step import Collective
from bailing_jax.planning.hlo import collectives

TEXT = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
ENTRY %main {
  %p = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[8,128]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1}}
  %ag = (bf16[4,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%p), dimensions={0}
  %agd = bf16[8,128]{1,0} all-gather-done(%ag)
  %rs = f32[2,128]{1,0} reduce-scatter(%y), dimensions={0}, to_apply=%add
  %two = (f32[8]{0}, s32[4]{0}) all-reduce(%u, %v), to_apply=%add
  %use = f32[8,128]{1,0} fusion(%all-reduce.3), calls=%fused
  %a2a = pred[16]{0} all-to-all(%z), dimensions={0}
}
"""


def test_collectives_by_kind() -> None:
    assert collectives(TEXT) == (
        Collective("all-reduce", 2, 8 * 128 * 4 + 8 * 4 + 4 * 4),
        Collective("all-gather", 1, 8 * 128 * 2),
        Collective("reduce-scatter", 1, 2 * 128 * 4),
        Collective("all-to-all", 1, 16),
    )


def test_a_program_without_any() -> None:
    assert collectives("ENTRY %main { %p = f32[8]{0} parameter(0) }") == ()
