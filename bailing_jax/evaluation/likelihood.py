"""Negative log likelihoods of windows under one model, for one decay layer offset or both.

The weights are loaded once: the offset is no weight but a number the programs are traced with, so
both offsets share the arrays. No engine is started, only what scores a sequence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
    """What scores sequences with this decay layer offset; shares the loaded weights."""
    config = replace(loaded.config, decay_layer_offset=offset)
    model = nnx.merge(*nnx.split(loaded.model))
    model.config = config
    chunk = loaded.limits.prefill_chunk
    return Scorer(Programs(model), config, loaded.state_spec, chunk)


def nll(scorer: Scorer, windows: Sequence[Window], say: Say) -> list[float]:
    """The sum of negative log likelihoods over the scored tokens of each window, in nats.

    Args:
        scorer: from `scorer`.
        windows: of at least two tokens each.
        say: called with a line of progress now and then.

    Raises:
        UserError: a likelihood is no finite number, as of a model whose numbers overflow.
    """
    sums = []
    said = time.monotonic()
    for window in windows:
        logprobs = scorer.token_logprobs(window.ids)
        sums.append(-float(np.sum(logprobs[window.first - 1 :], dtype=np.float64)))
        if not math.isfinite(sums[-1]):
            raise UserError(
                f"window {len(sums) - 1} of {window.source}: its likelihood is {sums[-1]}",
                "The model's numbers overflow: try --dtype float32, and check its weights.",
            )
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            say(f"{len(sums)}/{len(windows)} windows")
    return sums
