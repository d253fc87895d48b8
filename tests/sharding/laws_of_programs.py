"""What the compiled programs of a mesh hold: few collectives, the state in place; exact mode."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import jax
import numpy as np
import pytest
from checks import assert_same_bits
from mesh_models import PAGE, SPEC, WIDTH, config_of, programs, run_on
from slow import slow_but

from bailing_jax.batch import BatchLayout, pack, stack
from bailing_jax.engine import sampler
from bailing_jax.engine.programs import Programs
from bailing_jax.layers import expert_exchange
from bailing_jax.mesh import MeshShape
from bailing_jax.row import Row

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def empty(shards: int, *, prefill: int) -> BatchLayout:
    layout = pack(
        [],
        [],
        num_decode=3,
        num_prefill=prefill,
        num_segments=2 if prefill else 0,
        page_size=PAGE,
        pages_a_sequence=WIDTH,
    )
    return layout if shards == 1 else stack([layout] * shards)


def compiled(made: Programs, mesh: MeshShape, *, prefill: int) -> jax.stages.Compiled:
    made.compile_step(made.new_state(SPEC), empty(mesh.num_shards, prefill=prefill))
    (found,) = made._compiled.values()
    return found


def collectives(made: Programs, mesh: MeshShape) -> Counter[str]:
    text = compiled(made, mesh, prefill=10).as_text()
    assert text is not None
    return Counter(_COLLECTIVE.findall(text))


@pytest.mark.parametrize(("tensor", "peers"), [(2, 0), (4, 2)])
def test_two_sums_a_layer(tensor: int, peers: int) -> None:
    """And one for the embedding; the logits, and shared groups of two lightning norms, gather."""
    mesh = MeshShape(1, 1, tensor)
    layers = config_of("linear").num_layers
    assert collectives(programs("linear", mesh), mesh) == {
        "all-reduce": 2 * layers + 1,
        "all-gather": 1 + peers,
    }


def test_experts_exchange_beside_the_sums() -> None:
    """Rows, choices, weights and which exist go out; the sums come back; tokens to the host."""
    mesh = MeshShape(1, 2, 2)
    config = config_of("linear")
    mixtures = config.num_layers - config.num_dense_layers
    found = collectives(programs("linear", mesh), mesh)
    assert found["all-reduce"] == 2 * config.num_layers + 1
    assert found["reduce-scatter"] <= mixtures
    assert found["all-gather"] <= 4 * mixtures + 2
    assert sum(found.values()) <= 2 * config.num_layers + 1 + 5 * mixtures + 2


def test_copies_need_no_exchange() -> None:
    mesh = MeshShape(4)
    assert collectives(programs("linear", mesh), mesh) == {"all-gather": 1}  # the tokens


@pytest.mark.parametrize(
    ("mesh", "prefill"),
    slow_but(
        [(MeshShape(1, 2, 2), 10), (MeshShape(1, 1, 8), 0)],
        product([MeshShape(1, 2, 2), MeshShape(1, 1, 8)], [0, 10]),
    ),
    ids=str,
)
def test_the_state_is_updated_in_place(mesh: MeshShape, prefill: int) -> None:
    made = programs("linear", mesh)
    state = made.new_state(SPEC)
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in state.layers)
    analysis = compiled(made, mesh, prefill=prefill).memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == share


@pytest.mark.parametrize(
    ("mesh", "sends"),
    slow_but(
        [(MeshShape(1, 2, 2), True), (MeshShape(2, 1, 4), False)],
        [(MeshShape(1, 2, 2), False), (MeshShape(1, 2, 2), True), (MeshShape(2, 1, 4), False)],
    ),
    ids=str,
)
def test_exact_mode_a_row_is_the_same_wherever_it_runs(
    mesh: MeshShape, sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt alone in the first shard, and in each shard, later rows, slots and pages."""
    monkeypatch.setattr(expert_exchange, "sends", lambda *_: sends)
    made = programs("linear", mesh, exact=True)
    rng = np.random.default_rng(5)
    words = rng.integers(0, 200, (3, 6)).tolist()

    def run(shard: int, slot: int, pages: list[int], *, company: bool) -> list[np.ndarray]:
        before = [Row(words[1][:3], 1, [23, 24], 0)] if company else []
        mine = Row(words[0], slot, pages, 0)
        others = [Row(words[2][:5], 5, [20, 21], 0)] if company else []
        layouts = [
            pack(
                [],
                [*before, mine] if i == shard else others,
                num_decode=0,
                num_prefill=10,
                num_segments=2,
                page_size=PAGE,
                pages_a_sequence=WIDTH,
            )
            for i in range(mesh.num_shards)
        ]
        knobs = jax.tree.map(
            lambda k: np.stack([k] * mesh.num_shards), sampler.knobs(2, (), ())
        )
        result = made.step(made.new_state(SPEC), stack(layouts), knobs)
        first = np.asarray(result.state.layers[0])
        return [
            np.asarray(result.logits)[shard, len(before)],
            np.split(first, mesh.num_shards)[shard][slot],
        ]

    alone = run(0, 2, [1, 2], company=False)
    for shard in range(mesh.num_shards):
        for got, want in zip(run(shard, 4, [9, 3], company=True), alone, strict=True):
            assert_same_bits(got, want)


def test_exact_sums_give_the_same_answers() -> None:
    mesh = MeshShape(1, 2, 4)
    for one, other in zip(
        run_on(programs("linear", mesh), "linear", mesh),
        run_on(programs("linear", mesh, exact=True), "linear", mesh),
        strict=True,
    ):
        for tokens, others in zip(one.tokens, other.tokens, strict=True):
            np.testing.assert_array_equal(tokens, others)
