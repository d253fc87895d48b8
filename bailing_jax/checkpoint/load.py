"""Reading a released checkpoint into the model's parameters, one at a time.

Names, shapes and dtypes are matched before any data is read; values are refused when not finite.
Host memory holds one parameter and one tensor beyond what has been handed to the device.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import BailingForCausalLM, build, param_dtype
from bailing_jax.params import Param
from convert.mapping import place
from convert.plan import Match, match
from convert.source import CheckpointSource

Progress = Callable[[int, int], None]


def match_checkpoint(config: ModelConfig, source: CheckpointSource) -> Match:
    """Pair the checkpoint's tensors with the model's parameters; see `convert.plan.match`."""
    return match(config, source.tensors, str(source.folder))


def load_model(
    config: ModelConfig,
    options: RuntimeOptions,
    source: CheckpointSource,
    plan: Match,
    progress: Progress,
) -> BailingForCausalLM:
    """Read every parameter.

    Args:
        config: the model.
        options: its dtype.
        source: the open checkpoint.
        plan: what `match_checkpoint` found.
        progress: called with (bytes read, bytes in all) after every parameter.

    Raises:
        UserError: a value is NaN or infinite, or a file changed or can't be read.
    """
    pairs_of = {param.path: pairs for param, pairs in plan.params}
    done = 0

    def make(param: Param) -> jax.Array:
        nonlocal done
        array = np.zeros(param.shape, param_dtype(param, options))
        for piece, info in pairs_of[param.path]:
            if info is not None:
                place(piece, source.read_finite(info.name), array)
                done += info.nbytes
        progress(done, plan.num_bytes)
        return jax.device_put(array)

    return build(config, options, make)
