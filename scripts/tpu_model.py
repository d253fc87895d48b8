"""The shipped small model's steps, traced for a TPU that need not be there."""

from __future__ import annotations

import json
from collections.abc import Callable

import jax

from bailing_jax import small_model
from bailing_jax.batch import BatchLayout, pack
from bailing_jax.config import ModelConfig
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.programs import Programs
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.model import abstract
from bailing_jax.state import DecodeState, leaf_shapes

LIMITS = EngineLimits(max_num_seqs=128, max_model_len=512, prefill_chunk=256, page_size=64)
SEGMENTS = 4

Place = Callable[[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]


def traced_steps(place: Place = lambda shape: shape) -> dict[str, jax.stages.Traced]:
    """The decode step of 128 rows, and the mixed one with 256 prefill rows, in bfloat16.

    Trace inside the mesh of the device that is meant; `place` says where weights and state lie.
    """
    folder = small_model.folder()
    hf_config = json.loads((folder / "config.json").read_text())
    config = ModelConfig.from_hf(hf_config, {}, where=str(folder))
    programs = Programs(abstract(config, RuntimeOptions(dtype="bfloat16")))
    leaves = tuple(place(jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in programs.leaves)
    spec = LIMITS.state_spec("bfloat16", "float32", "tpu")
    state = DecodeState(tuple(place(leaf) for leaf in leaf_shapes(config, spec)))
    layouts = {"decode": _layout(0, 0), "mixed": _layout(LIMITS.prefill_chunk, SEGMENTS)}
    return {name: programs.trace_step(leaves, state, layout) for name, layout in layouts.items()}


def _layout(num_prefill: int, num_segments: int) -> BatchLayout:
    return pack(
        [],
        [],
        num_decode=LIMITS.max_num_seqs,
        num_prefill=num_prefill,
        num_segments=num_segments,
        page_size=LIMITS.page_size,
        pages_a_sequence=LIMITS.pages_a_sequence,
    )
