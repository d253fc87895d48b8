"""Chips and slices: names read, counts, and the least time of an exchange."""

from __future__ import annotations

import pytest

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.planning import topology
from bailing_jax.planning.chips import CHIPS
from bailing_jax.planning.topology import parse


@pytest.mark.parametrize(
    ("text", "chips", "devices", "hosts"),
    [
        ("v5e:1x1", 1, 1, 1),
        ("v6e:2x2", 4, 4, 1),
        ("v6e:8x8", 64, 64, 16),
        ("v5p:2x2x4", 16, 16, 4),
        ("v7x:2x2x4", 16, 32, 4),
        ("tpu7x:2x2x1", 4, 8, 1),
        ("H100:8", 8, 8, 1),
        ("h200:16", 16, 16, 2),
    ],
)
def test_counts(text: str, chips: int, devices: int, hosts: int) -> None:
    found = parse(text)
    assert (found.num_chips, found.num_devices, found.num_hosts) == (chips, devices, hosts)


def test_names() -> None:
    assert parse("tpu7x:2x2x1").name == "v7x:2x2x1"
    assert parse("v7x:2x2x1").libtpu_name == "tpu7x:2x2x1"
    assert parse("h100:8").libtpu_name == ""
    for chip in CHIPS.values():
        for found in topology.slices(chip):
            assert parse(found.name) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:2x2", "the chips are v5e, v5p, v6e, v7x, h100, h200"),
        ("", "the chips are"),
        ("v6e", "the slices of v6e are 1x1, 2x2"),
        ("v6e:", "the slices of v6e are"),
        ("v6e:3x3", "the slices of v6e are"),
        ("v6e:2x2x1", "the slices of v6e are"),
        ("v6e:²x2", "the slices of v6e are"),
        ("v5p:2x2", "the slices of v5p are 2x2x1"),
        ("h100:3", "numbers of GPUs (a host has 8) of h100 are 1, 2, 4, 8"),
        ("h100:2x4", "numbers of GPUs"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match="topology = ") as refused:
        parse(text)
    assert says in refused.value.message
    assert refused.value.exit_code == EXIT_USAGE
    assert refused.value.hint


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_slices_grow(chip: topology.Chip) -> None:
    counts = [found.num_chips for found in topology.slices(chip)]
    assert counts == sorted(set(counts))
    dimensions = {len(shape) for shape in chip.slices}
    assert dimensions == {1 if not chip.is_tpu else chip.links // 2}


def test_exchange_uses_the_links_of_the_best_place() -> None:
    # 16 devices as 4 x 4: two neighbours along each side, 2 + 2 hops to the farthest.
    v6e = parse("v6e:8x8")
    assert v6e.exchange_seconds(4e9, 16) == pytest.approx(4e9 / 4e11)
    assert v6e.exchange_seconds(4, 16) == pytest.approx(4e-6)
    # Two devices share one link.
    assert v6e.exchange_seconds(1e9, 2) == pytest.approx(1e9 / 1e11)
    assert v6e.exchange_seconds(1e9, 1) == 0.0
    assert v6e.exchange_seconds(0, 16) == 0.0


def test_devices_of_a_chip_are_neighbours() -> None:
    v7x = parse("v7x:2x2x4")
    assert v7x.exchange_seconds(1e9, 2) == 0.0  # one chip's: nothing leaves it
    # Behind an axis of two they lie on two chips, with one link of a device between them.
    assert v7x.exchange_seconds(1e9, 2, stride=2) == pytest.approx(1e9 / 50e9)


def test_gpus_of_several_hosts_use_the_network() -> None:
    inside = parse("h100:8").exchange_seconds(1e9, 8)
    assert inside == pytest.approx(1e9 / 450e9)
    across = parse("h100:16").exchange_seconds(1e9, 2, stride=8)
    assert across == pytest.approx(1e9 / 50e9)
