"""Seeds for requests that name none: others in every run, the same in every process of one.

Processes that share a model run the same steps, so a number that one of them makes up by itself
would part them: process 0 makes one up for all, once.
"""

from __future__ import annotations

import jax
import numpy as np


class FreshSeeds:
    """A seed a call; every process must make the same calls in the same order."""

    def __init__(self) -> None:
        self._source: np.random.SeedSequence | None = None

    def next(self) -> int:
        """An integer from 0 to 2**64 - 1. With several processes the first call is a collective."""
        if self._source is None:
            self._source = np.random.SeedSequence(_entropy())
        (child,) = self._source.spawn(1)
        return int(child.generate_state(1, np.uint64)[0])


def _entropy() -> list[int]:
    """128 bits of the operating system's, those of process 0 where there are several."""
    own = np.random.SeedSequence().generate_state(4)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        own = np.asarray(multihost_utils.broadcast_one_to_all(own))
    return own.tolist()
