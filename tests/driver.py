"""Runs a model step by step under full control: who shares a step, which slot, which cut.

One program of fixed size serves every step, and it returns everything: the residual stream and
the logits of every row, and the state. Laws compare runs that must not differ; the reference
compares every row with float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bailing_jax.batch import BatchLayout, pack
from bailing_jax.engine_options import EngineOptions
from bailing_jax.loading import LoadedModel, load
from bailing_jax.row import Row
from bailing_jax.state import DecodeState, StateSpec, allocate


@dataclass
class Request:
    """One sequence: its tokens, where its state is, and what the model said at each position."""

    tokens: list[int]
    slot: int
    pages: list[int]
    done: int = 0
    logits: list[np.ndarray] = field(default_factory=list)
    stream: list[np.ndarray] = field(default_factory=list)

    def all_logits(self) -> np.ndarray:
        return np.concatenate(self.logits)

    def all_hidden(self) -> np.ndarray:
        return np.concatenate(self.stream, axis=1)


@dataclass(frozen=True)
class Sizes:
    num_decode: int = 3
    num_prefill: int = 16
    num_segments: int = 3
    num_slots: int = 7
    num_pages: int = 40
    page_size: int = 4
    pages_a_sequence: int = 12


class Driver:
    """A model and its one program."""

    def __init__(
        self,
        folder: Path,
        sizes: Sizes | None = None,
        *,
        overrides: dict[str, object] | None = None,
        state_dtype: str = "float32",
        kernels: str = "auto",
    ) -> None:
        self.folder = folder
        engine_options = EngineOptions(
            dtype="float32", state_dtype=state_dtype, kernels=kernels
        )
        self.loaded: LoadedModel = load(
            folder, engine_options, overrides or {}, 0, lambda _line: None
        )
        self.config = self.loaded.config
        self.sizes = sizes or Sizes()
        self._spec = StateSpec(
            num_slots=self.sizes.num_slots,
            num_pages=self.sizes.num_pages,
            page_dtype=self.loaded.runtime.dtype,
            state_dtype=state_dtype,
            page_size=self.sizes.page_size,
        )
        graphdef, self._params = nnx.split(self.loaded.model)

        def run(params, state, layout):
            model = nnx.merge(graphdef, params)
            x, state, stream = model(state, layout)
            return jnp.stack(stream).astype(jnp.float32), model.logits(x), state

        self._run = jax.jit(run)
        self.reset()

    def reset(self) -> None:
        """A zero state."""
        self.state = allocate(self.config, self._spec)

    def set_recurrent(self, states: Sequence[np.ndarray]) -> None:
        """Put these arrays in the place of the recurrent states, in the order of the layers."""
        layers = list(self.state.layers)
        for layer, state in zip(self.recurrent_layers(), states, strict=True):
            layers[layer] = jnp.asarray(state, layers[layer].dtype)
        self.state = DecodeState(tuple(layers))

    def poison(self, keep: Sequence[Request] = ()) -> None:
        """Fill every slot and page that nobody in `keep` owns with NaN, NULL excepted."""
        slots = {0, *(request.slot for request in keep)}
        pages = {0, *(page for request in keep for page in request.pages)}
        leaves = []
        # In numpy: jax would compile a program for each number of places.
        for leaf, owned in self._owned(slots, pages):
            array = np.array(leaf)
            array[sorted(set(range(len(array))) - owned)] = np.nan
            leaves.append(jax.device_put(array))
        self.state = DecodeState(tuple(leaves))

    def unowned(self, owners: Sequence[Request]) -> list[np.ndarray]:
        """The bits of every slot and page nobody owns, NULL included, leaf by leaf."""
        slots = {request.slot for request in owners}
        pages = {page for request in owners for page in request.pages}
        return [
            np.asarray(leaf)[sorted(set(range(leaf.shape[0])) - owned)].view(np.uint8)
            for leaf, owned in self._owned(slots, pages)
        ]

    def _owned(self, slots: set[int], pages: set[int]) -> list[tuple[jax.Array, set[int]]]:
        recurrent = self.recurrent_layers()
        return [
            (leaf, slots if layer in recurrent else pages)
            for layer, leaf in enumerate(self.state.layers)
        ]

    def recurrent_layers(self) -> list[int]:
        """The lightning layers: those whose leaf is [slots, heads, K, V]."""
        return [i for i, leaf in enumerate(self.state.layers) if leaf.ndim == 4]

    def recurrent_state(self, request: Request) -> dict[int, np.ndarray]:
        """The request's recurrent state by layer."""
        return {
            layer: np.asarray(self.state.layers[layer][request.slot].astype(jnp.float32))
            for layer in self.recurrent_layers()
        }

    def step(
        self,
        decodes: Sequence[Request] = (),
        segments: Sequence[tuple[Request, int]] = (),
        *,
        garbage: np.random.Generator | None = None,
    ) -> None:
        """One step: one token for each of `decodes`, so many for each of `segments`.

        `garbage` fills the padding rows with random tokens and positions.
        """
        sizes, layout = self.sizes, self._layout(decodes, segments)
        if garbage is not None:
            used = sizes.num_decode + sum(count for _, count in segments)
            pads = np.r_[len(decodes) : sizes.num_decode, used : len(layout.tokens)]
            np.asarray(layout.tokens)[pads] = garbage.integers(
                0, self.config.vocab_size, len(pads)
            )
            np.asarray(layout.positions)[pads] = garbage.integers(0, 1000, len(pads))
        stream, logits, self.state = self._run(self._params, self.state, layout)
        stream, logits = np.asarray(stream), np.asarray(logits)
        start = 0
        for i, request in enumerate(decodes):
            self._take(request, stream, logits, i, 1)
        start = sizes.num_decode
        for request, count in segments:
            self._take(request, stream, logits, start, count)
            start += count

    def program(self) -> str:
        """The program of a step as jax has traced it."""
        return str(jax.make_jaxpr(self._run)(self._params, self.state, self._layout((), ())))

    def prefill(self, request: Request, *cuts: int) -> Request:
        """Fold in all its tokens, alone, cut at `cuts` and wherever a step is full."""
        ends = sorted({*cuts, len(request.tokens)})
        while request.done < len(request.tokens):
            end = next(e for e in ends if e > request.done)
            count = min(end - request.done, self.sizes.num_prefill)
            self.step(segments=[(request, count)])
        return request

    def _layout(
        self, decodes: Sequence[Request], segments: Sequence[tuple[Request, int]]
    ) -> BatchLayout:
        sizes = self.sizes
        return pack(
            [self._row(request, 1) for request in decodes],
            [self._row(request, count) for request, count in segments],
            num_decode=sizes.num_decode,
            num_prefill=sizes.num_prefill,
            num_segments=sizes.num_segments,
            page_size=sizes.page_size,
            pages_a_sequence=sizes.pages_a_sequence,
        )

    def _row(self, request: Request, count: int) -> Row:
        tokens = request.tokens[request.done : request.done + count]
        return Row(tokens, request.slot, request.pages, request.done)

    @staticmethod
    def _take(
        request: Request, stream: np.ndarray, logits: np.ndarray, start: int, count: int
    ) -> None:
        request.logits.append(logits[start : start + count])
        request.stream.append(stream[:, start : start + count])
        request.done += count
