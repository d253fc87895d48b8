"""Negative log likelihoods of windows under one model, for one decay layer offset or several.

The weights are loaded once: the offset is no weight but a number the programs are traced with, so
all offsets share the arrays. No engine is started, only what scores a sequence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from flax import nnx

from bailing_jax.engine.programs import Programs
from bailing_jax.engine.scoring import Scorer
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation.windows import Window
from bailing_jax.layer_plan import layer_plan
from bailing_jax.loading import LoadedModel

PROGRESS_S = 5.0

Say = Callable[[str], None]
Keep = Callable[[int, Mapping[int, float]], None]


def check_offsets(loaded: LoadedModel) -> None:
    """Refuse to compare offsets where there is nothing they could change.

    Raises:
        UserError: the model has no lightning layer.
    """
    kinds = {layer.attention for layer in layer_plan(loaded.config)}
    if "lightning" not in kinds:
        raise UserError(
            f"--decay-layer-offset: {loaded.name} has no lightning layer, so nothing decays",
            "Leave it out.",
            EXIT_USAGE,
        )


def scorer(loaded: LoadedModel, offset: int) -> Scorer:
    """What scores sequences with this decay layer offset, any integer; shares the weights."""
    config = replace(loaded.config, decay_layer_offset=offset)
    model = nnx.merge(*nnx.split(loaded.model))
    model.config = config
    chunk = loaded.limits.prefill_chunk
    programs = Programs(model, loaded.placement)
    return Scorer(
        programs, config, loaded.state_spec, chunk, loaded.limits.num_shards, programs.new_state
    )


def nll(
    scorers: Mapping[int, Scorer], windows: Sequence[Window], keep: Keep, say: Say
) -> dict[int, list[float]]:
    """The sum of negative log likelihoods over the tokens of each window, in nats, by offset.

    Args:
        scorers: by offset, from `scorer`.
        windows: what is scored, each under all offsets before the next.
        keep: called with each window's number and sums as it is done.
        say: called with a line of progress now and then.

    Raises:
        UserError: a likelihood is no finite number, as of a model whose numbers overflow.
    """
    found: dict[int, list[float]] = {offset: [] for offset in scorers}
    said = time.monotonic()
    for number, window in enumerate(windows):
        sums = {offset: _sum(scorer, window, number) for offset, scorer in scorers.items()}
        for offset, value in sums.items():
            found[offset].append(value)
        keep(number, sums)
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            say(f"{number + 1}/{len(windows)} windows")
    return found


def _sum(scorer: Scorer, window: Window, number: int) -> float:
    value = -float(np.sum(scorer.token_logprobs(window.ids), dtype=np.float64))
    if not math.isfinite(value):
        raise UserError(
            f"window {number} of {window.source}: its likelihood is {value}",
            "The model's numbers overflow: try --dtype float32, and check its weights.",
        )
    return value
