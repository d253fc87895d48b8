"""Reading whole token sequences: logits, hidden states and log probabilities at every position.

The same layers and the same prefill chunks as generation, on a state of its own with one slot,
so that scoring never touches a running request. Results leave the device chunk by chunk. Of several
shards the first one scores, and the others run padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from bailing_jax import plugins
from bailing_jax.batch import BatchLayout, pack, stack
from bailing_jax.config import ModelConfig
from bailing_jax.engine.programs import Programs
from bailing_jax.errors import EXIT_DOES_NOT_FIT, UserError
from bailing_jax.layer_plan import layer_plan
from bailing_jax.row import Row
from bailing_jax.state import DecodeState, StateSpec, allocate

MAX_RESULT_BYTES = 4 * 2**30
# Below this many rows another program costs more to compile than it saves.
_SMALLEST = 64
# The only sequence of a scorer's state; of several shards, which lie one behind the other, the
# first one's.
_SLOT = 1


class _Chunk(NamedTuple):
    """Tokens [start, stop) of the sequence in the first rows of a layout with T prefill rows."""

    rows: slice
    num_prefill: int
    layout: BatchLayout


class Scorer:
    """Scores one sequence at a time.

    Args:
        programs: the compiled model.
        config: its config.
        spec: dtypes and page size of the state; sizes follow the sequence.
        chunk: prefill tokens a step.
        num_shards: that the programs run.
        new_state: as `Engine` takes it.
    """

    def __init__(
        self,
        programs: Programs,
        config: ModelConfig,
        spec: StateSpec,
        chunk: int,
        num_shards: int = 1,
        new_state: Callable[[StateSpec], DecodeState] | None = None,
    ) -> None:
        self._programs = programs
        self._config = config
        self._spec = spec
        self._chunk = chunk
        self._num_shards = num_shards
        self._new_state = new_state

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T, vocab].

        Raises:
            UserError: the result would exceed 4 GiB.
        """
        out = _result((len(token_ids), self._config.vocab_size), "logits")
        state, steps = self._steps(token_ids)
        for rows, _, layout in steps:
            part, state = self._programs.all_logits(state, layout)
            out[rows] = self._first(part)[: rows.stop - rows.start]
        return out

    def hidden_states(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [layers + 1, T, d]: the embedding, then the stream after each layer.

        Raises:
            UserError: the result would exceed 4 GiB.
        """
        config = self._config
        shape = (config.num_layers + 1, len(token_ids), config.hidden_size)
        out = _result(shape, "hidden states")
        state, steps = self._steps(token_ids)
        for rows, _, layout in steps:
            part, state = self._programs.hidden_states(state, layout)
            out[:, rows] = self._first(part)[:, : rows.stop - rows.start]
        return out

    def token_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T - 1]: the log probability of every token but the first."""
        out = np.zeros(len(token_ids) - 1, np.float32)
        state, steps = self._steps(token_ids[:-1])
        for rows, num_prefill, layout in steps:
            targets = np.zeros((self._num_shards, num_prefill), np.int32)
            targets[0, : rows.stop - rows.start] = token_ids[rows.start + 1 : rows.stop + 1]
            wanted = targets if self._num_shards > 1 else targets[0]
            part, state = self._programs.token_logprobs(state, layout, wanted)
            out[rows] = self._first(part)[: rows.stop - rows.start]
        return out

    def recurrent_states(self, token_ids: Sequence[int]) -> dict[int, np.ndarray]:
        """The recurrent state float32 [N, K, V] of every lightning layer after all tokens."""
        state, steps = self._steps(token_ids)
        for _, _, layout in steps:
            state = self._programs.fold(state, layout)
        # Without the zeros behind V; what a replaced layer keeps is its own.
        own = self._config.lightning if plugins.layer("lightning") is None else None
        width = None if own is None else own.head_dim
        return {
            layer: self._programs.slot_states(leaf, _SLOT)[..., :width].astype(np.float32)
            for layer, (spec, leaf) in enumerate(
                zip(layer_plan(self._config), state.layers, strict=True)
            )
            if spec.attention == "lightning"
        }

    def _first(self, result: jax.Array) -> jax.Array:
        """The first shard's."""
        return result if self._num_shards == 1 else result[0]

    def _steps(self, token_ids: Sequence[int]) -> tuple[DecodeState, Iterator[_Chunk]]:
        """A fresh state, and the chunks."""
        page_size = self._spec.page_size
        # Powers of two, so that texts of many lengths share a few programs.
        num_pages = 1 << (-(-max(len(token_ids), 1) // page_size) - 1).bit_length()
        spec = replace(self._spec, num_slots=2, num_pages=num_pages + 1)

        def layout(rows: list[Row], num_prefill: int) -> BatchLayout:
            return pack(
                [],
                rows,
                num_decode=0,
                num_prefill=num_prefill,
                num_segments=1,
                page_size=page_size,
                pages_a_sequence=num_pages,
            )

        def chunks() -> Iterator[_Chunk]:
            for start in range(0, len(token_ids), self._chunk):
                rows = slice(start, min(start + self._chunk, len(token_ids)))
                row = Row(list(token_ids[rows]), _SLOT, range(1, num_pages + 1), start)
                count = rows.stop - rows.start
                size = min(max(_SMALLEST, 1 << (count - 1).bit_length()), self._chunk)
                made = layout([row], size)
                if self._num_shards > 1:
                    made = stack([made, *[layout([], size)] * (self._num_shards - 1)])
                yield _Chunk(rows, size, made)

        new_state = self._new_state or (lambda spec: allocate(self._config, spec))
        return new_state(spec), chunks()


def _result(shape: tuple[int, ...], what: str) -> np.ndarray:
    size = 4 * int(np.prod(shape, dtype=np.int64))
    if size > MAX_RESULT_BYTES:
        raise UserError(
            f"{what} {list(shape)} in float32 are {size / 2**30:.1f} GiB; the limit is 4 GiB",
            "Score fewer tokens at a time, or use token_logprobs.",
            EXIT_DOES_NOT_FIT,
        )
    return np.zeros(shape, np.float32)
