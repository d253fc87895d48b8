"""The arrays of a call: its plan laid out for the device, and what comes back, row by row.

On one device the arrays are those of one layout. Of several shards they have one more axis in
front, the shard; seen from the host the rows are numbered through, S x B, shard by shard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from bailing_jax.batch import BatchLayout, pack, stack
from bailing_jax.engine import sampler
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.programs import Ends, StepResult, no_ends
from bailing_jax.engine.sampler import Knobs
from bailing_jax.engine.shards import CallPlan
from bailing_jax.sampling_params import SamplingParams


class Call(NamedTuple):
    """A program on its way: the part of the plan it computes, how it was laid out, what it gives.

    `tokens`, `logits` and the new state of `result` may not be there yet.
    """

    plan: CallPlan
    layout: BatchLayout
    knobs: Knobs
    ends: Ends | None
    result: StepResult

    def tokens(self) -> np.ndarray:
        """int32 [steps, S x B]; waits for them."""
        tokens = np.array(self.result.tokens)
        return tokens if tokens.ndim == 2 else tokens.swapaxes(0, 1).reshape(tokens.shape[1], -1)

    def of_shard(self, shard: int) -> ShardRows:
        """What `refine` is told of the B rows of a shard."""
        layout, knobs, logits = self.layout, self.knobs, self.result.logits
        positions, rows = np.asarray(layout.positions), np.asarray(layout.logit_rows)
        if logits.ndim == 3:
            logits, positions, rows = logits[shard], positions[shard], rows[shard]
            knobs = Knobs(*(knob[shard] for knob in knobs))
        return ShardRows(logits, knobs, positions[rows] + 1)


class ShardRows(NamedTuple):
    """Logits [B, vocab], knobs [B] and the positions int32 [B] of the tokens to come."""

    logits: jax.Array
    knobs: Knobs
    positions: np.ndarray


def layouts(plan: CallPlan, limits: EngineLimits) -> list[BatchLayout]:
    """A layout for each shard, all of the call's size."""
    return [
        pack(
            part.decode_rows(),
            part.segment_rows(),
            num_decode=plan.size.decode_rows,
            num_prefill=plan.size.prefill_rows,
            num_segments=plan.size.segments,
            page_size=limits.page_size,
            pages_a_sequence=limits.pages_a_sequence,
        )
        for part in plan.shards
    ]


def joined(layouts: Sequence[BatchLayout]) -> BatchLayout:
    """What a program takes: of one shard its layout as it is."""
    return layouts[0] if len(layouts) == 1 else stack(layouts)


def knobs(plan: CallPlan, asked: Mapping[int, tuple[SamplingParams, int]]) -> Knobs:
    """Parameters and seeds by row of the call."""
    count = len(plan.shards)
    flat = sampler.knobs(count * plan.rows_a_shard, list(asked), list(asked.values()))
    return flat if count == 1 else Knobs(*(_by_shard(knob, count) for knob in flat))


def ends(plan: CallPlan, asked: Mapping[int, tuple[int, Collection[int]]]) -> Ends:
    """Tokens that may still come, and stop ids, by row of a call that only decodes."""
    count = len(plan.shards)
    found = no_ends(count * plan.size.decode_rows)
    for row, (room, stop_ids) in asked.items():
        found.room[row] = room
        found.stop_ids[row, : len(stop_ids)] = list(stop_ids)
    if count == 1:
        return found
    return Ends(_by_shard(np.asarray(found.room), count), _by_shard(found.stop_ids, count))


def _by_shard(rows: np.ndarray, count: int) -> np.ndarray:
    return rows.reshape(count, -1, *rows.shape[1:])
