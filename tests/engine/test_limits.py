"""Sizes of each of several shards, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hf_configs import V2, read

from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine_options import EngineOptions

CONFIG = read(V2)


@pytest.mark.parametrize(
    ("mesh", "asked", "each", "shards"),
    [(None, 10, 10, 1), ("tensor=4", 10, 10, 1), ("data=2,expert=2", 10, 3, 4),
     ("data=2,tensor=8", 10, 5, 2), ("expert=8", 3, 1, 8)],
)  # fmt: skip
def test_max_num_seqs_is_the_total_rounded_up_over_the_shards(
    mesh: str | None, asked: int, each: int, shards: int
) -> None:
    options = EngineOptions(max_num_seqs=asked)
    object.__setattr__(options, "mesh", mesh)  # whatever meshes a start-up allows
    limits = options.limits(CONFIG)
    assert (limits.max_num_seqs, limits.num_shards) == (each, shards)
    assert asked <= limits.total_num_seqs == each * shards < asked + shards


def test_what_is_said_of_shards_has_each_and_all() -> None:
    limits = EngineLimits(3, 128, 16, 64, num_shards=4)
    words = limits.shards_in_words(10, 2_500_000)
    assert words == (
        "4 shards, each with 3 sequences, 6 pages and 2.5 MB of state: in all 12 sequences "
        "(max_num_seqs = 10, rounded up), 24 pages and 10.0 MB"
    )
    assert "rounded" not in limits.shards_in_words(12, 1)
    assert replace(limits, max_num_pages=2).shards_in_words(12, 1).count("8 pages") == 1
