"""Every mesh gives the single device's answers; runs on eight simulated devices."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from checks import assert_same_bits
from mesh_models import CONFIGS, Seen, config_of, programs, run_alone, run_on
from slow import slow_but
from tolerances import TOLERANCES

from bailing_jax.engine.programs import NOTHING
from bailing_jax.layers import expert_exchange, expert_send
from bailing_jax.layers.parallel import Parallel
from bailing_jax.mesh import MeshShape, meshes

# The others take minutes, and differ from these in nothing but sizes.
USUAL = {
    "linear": [(1, 1, 8), (2, 2, 2)],
    "latent": [(2, 4, 1)],
    "softmax": [(1, 3, 2)],
}
MESHES = [
    pytest.param(
        name,
        mesh,
        marks=[] if (mesh.data, mesh.expert, mesh.tensor) in USUAL[name] else pytest.mark.slow,
        id=f"{name}-{mesh}",
    )
    for name in CONFIGS
    for devices in (8, 6, 4, 3, 2)
    for mesh in meshes(config_of(name), devices)
]


@functools.cache
def alone(name: str) -> list[Seen]:
    one = programs(name)
    return [run_alone(one, shard) for shard in range(8)]


def test_there_are_eight_devices() -> None:
    assert len(jax.devices()) == 8
    assert sum(not case.marks for case in MESHES) == sum(map(len, USUAL.values()))


def test_the_exchange_in_blocks_and_parts_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 13 rows a shard one at a time is gathered (13 is prime), and two of the four worked on."""
    config = config_of("linear")
    row = config.hidden_size * 8
    monkeypatch.setattr(expert_exchange, "_GATHERED_BYTES", 4 * row)
    results = config.hidden_size * config.moe.num_experts_per_token * 8
    monkeypatch.setattr(expert_exchange, "_RESULT_BYTES", 2 * results)
    compare("linear", MeshShape(1, 4, 2))


@pytest.mark.parametrize(
    ("name", "mesh", "quota"),
    slow_but(
        [("linear", MeshShape(1, 4, 2), 1), ("latent", MeshShape(2, 4), 4)],
        [
            (name, mesh, quota)
            for name, mesh in (
                ("linear", MeshShape(1, 4, 2)),
                ("softmax", MeshShape(1, 2, 4)),
                ("latent", MeshShape(2, 4)),
            )
            for quota in (1, 4)
        ],
    ),
    ids=str,
)
def test_choices_that_are_sent_give_the_same(
    name: str, mesh: MeshShape, quota: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round and in many, with whole experts and parts of their width on a line."""
    monkeypatch.setattr(expert_exchange, "sends", lambda *_: True)
    monkeypatch.setattr(expert_send, "quota_of", lambda *_: quota)
    compare(name, mesh)


def test_many_shards_send_and_few_gather() -> None:
    assert not expert_exchange.sends(Parallel(expert=16), 8)
    assert expert_exchange.sends(Parallel(expert=17), 8)
    assert "gathered from 16 shards" in expert_exchange.in_words(Parallel(expert=16), 8, "tpu")
    assert "sent" in (words := expert_exchange.in_words(Parallel(expert=17), 8, "tpu"))
    assert "(ragged all-to-all)" in words
    assert "ragged" not in expert_exchange.in_words(Parallel(expert=17), 8, "cpu")
    # Eight choices a row among 64 shards: an even share is an eighth, and there is room for two.
    assert expert_send.quota_of(Parallel(expert=64), 1024, 8) == 256
    assert expert_send.quota_of(Parallel(expert=64, tensor_experts=4), 1024, 8) == 64
    assert expert_send.quota_of(Parallel(expert=64), 8, 8) == 4


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_r091_a_mesh_gives_the_answers_of_one_device(name: str, mesh: MeshShape) -> None:
    compare(name, mesh)


def compare(name: str, mesh: MeshShape) -> None:
    """All shards' schedules on the mesh, each against one device."""
    runs = run_on(programs(name, mesh), name, mesh)
    for shard, seen in enumerate(runs):
        want = alone(name)[shard]
        for got, tokens in zip(seen.tokens, want.tokens, strict=True):
            np.testing.assert_array_equal(got, tokens)
        for call, (got, logits) in enumerate(zip(seen.logits, want.logits, strict=True)):
            # Of a decode call the last step's; a shard whose rows ended before has no part in it.
            steps = max(int((run.tokens[call] != NOTHING).any(axis=1).sum()) for run in runs)
            rows = seen.tokens[call][steps - 1] != NOTHING
            np.testing.assert_allclose(
                got[rows], logits[rows], rtol=0, atol=TOLERANCES["mesh_logits"]
            )
        for layer, (got, leaf) in enumerate(zip(seen.state, want.state, strict=True)):
            # Who has no rows leaves no trace: the poison of free slots and pages is as it was.
            poison = np.isnan(leaf)
            assert_same_bits(got[poison], leaf[poison])
            scale = np.abs(leaf[~poison]).max()
            error = np.abs(got[~poison] - leaf[~poison]).max()
            assert error <= TOLERANCES["law_state"] * scale, (layer, error / scale)
        # Bit for bit where no sum of several devices comes before.
        exact = len(want.state) if mesh.expert == 1 else 1
        for got, leaf in zip(seen.state[:exact], want.state[:exact], strict=True):
            if mesh.tensor == 1:
                assert_same_bits(got, leaf)
