"""The bounds: published hand-made figures, laws of more and less, and what binds."""

from __future__ import annotations

import pytest

from bailing_jax.mesh import MeshShape, meshes
from bailing_jax.planning import model, ranking
from bailing_jax.planning.chips import CHIPS
from bailing_jax.planning.roofline import (
    Phase,
    Rows,
    Weights,
    decode_rows,
    flops,
    memory_bytes,
    prefill_rows,
    roofline,
    share_of_experts,
)
from bailing_jax.planning.topology import Topology, parse, slices
from bailing_jax.planning.workload import FP8, workload

ONE = MeshShape()


@pytest.fixture(scope="module")
def ring_mini() -> model.PlannedModel:
    return model.read("ring-mini-linear-2.0")


@pytest.fixture(scope="module")
def ling_1t() -> model.PlannedModel:
    return model.read("ling-2.6-1t")


# Tokens/s of Ring-mini-linear-2.0 in bfloat16 on one GPU, 1k tokens behind each sequence, worked
# out apart from this code: bytes of weights, chosen experts, state in and out and pages.
BY_HAND = {
    "h100:1": {1: 1279, 32: 4768, 128: 11569, 256: 19967},
    "h200:1": {1: 1833, 32: 6831, 128: 16576, 256: 28609},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_decode_of_one_gpu(ring_mini: model.PlannedModel, name: str) -> None:
    for sequences, rate in BY_HAND[name].items():
        load = workload(ring_mini.config, max_num_seqs=sequences)
        bounds = roofline(ring_mini, parse(name), ONE, load)
        assert bounds.decode_rate == pytest.approx(rate, rel=2e-3)
        assert bounds.decode_rate == bounds.decode_in_turns  # one device has no messages
        assert bounds.decode.binds == "memory"


def test_decode_bytes_by_hand(ring_mini: model.PlannedModel) -> None:
    """32 sequences: 1.62 GB that every step reads, 19.5 GB of experts, 1.07 of state, 0.27 of
    pages."""
    load = workload(ring_mini.config, max_num_seqs=32)
    weights, rows = Weights.of(ring_mini, ONE, load), decode_rows(ONE, load)
    assert weights.shared_bytes / 1e9 == pytest.approx(1.62, abs=0.01)
    touched = weights.expert_bytes * share_of_experts(ring_mini.config, rows.with_experts)
    assert touched / 1e9 == pytest.approx(19.5, abs=0.05)
    total = memory_bytes(ring_mini.config, CHIPS["h100"], ONE, load, weights, rows)
    assert (total - weights.shared_bytes - touched) / 1e9 == pytest.approx(1.07 + 0.27, abs=0.01)


def test_experts_that_rows_choose(ring_mini: model.PlannedModel) -> None:
    """Of 256, expected distinct ones for 1, 8, 32, 128, 256 rows."""
    found = [256 * share_of_experts(ring_mini.config, rows) for rows in (0, 1, 8, 32, 128, 256)]
    assert [round(x) for x in found] == [0, 8, 57, 163, 252, 256]


def test_flops_of_a_row_are_two_a_weight_it_meets(ring_mini: model.PlannedModel) -> None:
    load = workload(ring_mini.config)
    weights = Weights.of(ring_mini, ONE, load)
    row = Rows(1, 1, 1, 0, 0, is_decode=True)
    # All active parameters but the table of tokens, and norms, which are no products.
    active = ring_mini.num_active - 157184 * 2048
    recurrence = 16 * 16 * 5 * 128 * 128
    assert flops(ring_mini.config, ONE, weights, row) - recurrence == pytest.approx(
        2 * active, rel=1e-3
    )


def test_prefill_of_a_long_prompt_by_hand(ring_mini: model.PlannedModel) -> None:
    """8192 tokens at once: about 15.7 TFLOP of weights, 1.1 of softmax attention."""
    load = workload(ring_mini.config, max_model_len=8192, prefill_chunk=8192, prompt_tokens=8192)
    bounds = roofline(ring_mini, parse("h100:1"), ONE, load)
    assert bounds.prefill.binds == "compute"
    assert bounds.prefill.compute == pytest.approx(17e-3, rel=0.1)
    assert bounds.first_token_seconds == pytest.approx(bounds.prefill.compute, rel=1e-6)


@pytest.mark.parametrize("mesh", [MeshShape(tensor=8), MeshShape(expert=8), MeshShape(1, 4, 2)])
def test_devices_share_the_work(ling_1t: model.PlannedModel, mesh: MeshShape) -> None:
    """Divided work adds up to the whole: all of a row's products, none of them twice."""
    load = workload(ling_1t.config, max_num_seqs=64)
    whole = flops(ling_1t.config, ONE, Weights.of(ling_1t, ONE, load), decode_rows(ONE, load))
    mine = flops(ling_1t.config, mesh, Weights.of(ling_1t, mesh, load), decode_rows(mesh, load))
    # The router and the projections into latents are whole on every device of a shard.
    assert whole <= mine * mesh.num_devices < 1.08 * whole
    experts = Weights.of(ling_1t, mesh, load).expert_bytes * mesh.num_devices
    assert experts == Weights.of(ling_1t, ONE, load).expert_bytes


def test_prompt_pairs() -> None:
    assert prefill_rows(0, 4, 4).pairs == 1 + 2 + 3 + 4
    assert prefill_rows(10, 4, 4).pairs == 11 + 12 + 13 + 14
    whole = prefill_rows(0, 10, 10).pairs
    assert whole == prefill_rows(0, 6, 6).pairs + prefill_rows(6, 4, 4).pairs


def test_a_phase() -> None:
    phase = Phase(memory=3.0, compute=1.0, interconnect=2.0)
    assert (phase.bound_seconds, phase.in_turns_seconds, phase.binds) == (3.0, 5.0, "memory")
    assert Phase(1.0, 1.5, 2.0).binds == "interconnect"


def test_a_longer_prompt_takes_longer(ring_mini: model.PlannedModel) -> None:
    seconds = [
        roofline(
            ring_mini, parse("v6e:2x2"), MeshShape(tensor=4),
            workload(ring_mini.config, prompt_tokens=tokens),
        ).first_token_seconds
        for tokens in (1, 511, 512, 513, 1024, 4096)
    ]  # fmt: skip
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(seconds)


def test_bounds_do_not_exceed_published_ones(ling_1t: model.PlannedModel) -> None:
    """A served figure lies below its bound: 1145 tokens/s were published for 32 sequences of
    Ling-2.6-1T on 16 chips of v7x."""
    load = workload(ling_1t.config, max_num_seqs=32, max_model_len=2048, weight_dtype=FP8)
    best = ranking.ranked(ling_1t, parse("v7x:2x2x4"), load)[0]
    assert best.fits
    assert 1145 < best.roofline.decode_in_turns < best.roofline.decode_rate < 10_000


# Ranking.


def test_every_mesh_is_ranked_and_those_that_fit_come_first(ling_1t: model.PlannedModel) -> None:
    load = workload(ling_1t.config, weight_dtype=FP8)
    found = ranking.ranked(ling_1t, parse("v6e:8x8"), load)
    assert {each.mesh for each in found} == set(meshes(ling_1t.config, 64))
    fits = [each.fits for each in found]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    rates = [each.roofline.decode_in_turns for each in found if each.fits]
    assert rates == sorted(rates, reverse=True)
    assert ranking.best_mesh(ling_1t, parse("v6e:8x8"), load) == found[0].mesh


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_more_chips_never_fit_less(ling_1t: model.PlannedModel, chip) -> None:
    load = workload(ling_1t.config, max_num_seqs=64, weight_dtype=FP8)
    fits, least = [], []
    for where in slices(chip):
        if meshes(ling_1t.config, where.num_devices):
            best = ranking.ranked(ling_1t, where, load)[0]
            fits.append(best.fits)
            least.append((where, best))
    assert fits == sorted(fits)
    smallest = ranking.smallest_slice(ling_1t, Topology(chip, chip.slices[0]), load)
    assert any(fits) == (smallest is not None)
    if smallest is not None:
        first = next(where for where, best in least if best.fits)
        assert smallest.topology == first


def test_a_load_that_fits_nowhere(ling_1t: model.PlannedModel) -> None:
    load = workload(ling_1t.config, max_num_seqs=10**7, max_model_len=262144)
    assert ranking.smallest_slice(ling_1t, parse("v5e:2x2"), load) is None
