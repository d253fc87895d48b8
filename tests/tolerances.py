"""Every tolerance of the tests, with its reason; absolute unless said otherwise.

The golden sets bring their own (their READMEs), and exact equality needs no entry. A figure here
is a bound derived from what was measured, with room for other machines; loosening one is a change
of the promise and needs a reason beside it.
"""

from __future__ import annotations

TOLERANCES = {
    # float32 model against the float64 reference; logits have standard deviation about 1 and
    # the goldens measured 1e-5 to 5e-5 between float32 and float64.
    "reference_logits": 5e-4,
    # The residual stream grows with depth to about 10.
    "reference_hidden": 1e-3,
    # Relative to the state's largest entry.
    "reference_state": 1e-4,
    # The same request cut or placed differently: float32 sums in another order.
    "law_logits": 2e-4,
    # Relative to the state's largest entry.
    "law_state": 2e-5,
    # The same rows on several devices: each sums a part of a row's products, and the parts are
    # added then; float32 sums in another order, as in law_logits.
    "mesh_logits": 2e-4,
    # The same, of pages too, and after whatever schedule.
    "schedule_state": 5e-5,
    # Relative rms error of a bfloat16 recurrent state after 112 decode steps: each step rounds to
    # 8 bits (2^-8 at most, so about 2e-3 rms of what is kept), and slow heads keep every rounding.
    "bfloat16_state_drift": 2e-2,
    # Relative rms of the residual stream when q and k are rounded to bfloat16 once (2^-8), before
    # any expert flips: the first lightning layer.
    "bfloat16_rope": 1e-2,
    # Relative: half of float32's last bit, and check values written to nine decimals.
    "decay_table": 2e-7,
    # Relative: one norm in float32, a sum of squares, a reciprocal root and two products.
    "norm": 1e-6,
    # Relative: float32 tables computed in float64, and goldens of nine digits.
    "rope_frequencies": 2e-7,
    # For each position: an angle is rounded to float32, half its last bit is 2^-24 of it, and
    # the heads' channels are at most 4 large.
    "rope_radians": 3e-7,
    # cos and sin of an exact angle, and two products with channels at most 4 large, in float32.
    "rope_cos_sin": 2e-6,
    # Relative: float32 sums of at most 32 products, a sigmoid and a quotient.
    "router_weights": 2e-6,
    # Operators (checks.error: |got - want| over |want| + rms).
    # float32 throughout, sums of up to 131 tokens; measured 1.4e-6.
    "lightning": 5e-6,
    # Numbers rounded to bfloat16 once: half of its last bit is 2^-8 of the number.
    "bfloat16_rounding": 4e-3,
    # q and k rounded to bfloat16 from float32 of another order: a neighbour, 2^-7 of the number,
    # and the result's own rounding.
    "bfloat16_neighbour": 1.2e-2,
    # float32 norms and rotations in another order before the recurrence: a few of its last bits.
    "norm_and_rope": 2e-5,
    # A lightning layer in bfloat16 whose two forms round in different places: of every product of
    # the last sum q, k, o, its norm and the gated one, at most 2^-8 / sqrt(3) each, in both. That
    # is sqrt(10) such, 7.1e-3, and the worst of 200 entries 3.5 times as much; measured 1.3e-2.
    "lightning_layer_bfloat16": 2.5e-2,
    # A bfloat16 state rounded at a cut, at its end, and in the call it is compared with.
    "bfloat16_cut": 1.2e-2,
    # bfloat16 products: scores, weighted values, the state and the result are rounded to 8 bits.
    # A head's rms, and the worst of 10^5 entries at 5 times that; measured 3.4e-3 and 1.5e-2.
    "wgmma_rms": 5e-3,
    "wgmma": 2.5e-2,
    # Steps of a random walk over 32,768 decode steps (the test has the formula); measured 1.0.
    "drift": 3.0,
    # float32 softmax over up to 701 tokens; measured 8e-7.
    "attention": 5e-6,
    # The same on bfloat16 pages: weights and result are rounded, 2^-8 each; measured 6e-3.
    "attention_bfloat16": 1e-2,
    # float32 products of 11 and 5 terms, 3 experts; measured 1.4e-6.
    "experts": 5e-6,
    # Result and hidden numbers rounded: 2^-8 + 4 deviations of 2^-8 / sqrt(3); measured 1.1e-2.
    "experts_bfloat16": 1.6e-2,
    # End of operators.
    # Training: relative, float32 loss and slopes against float64 differences.
    "training_loss": 1e-5,
    "training_gradient": 1e-3,
}
