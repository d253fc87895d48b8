"""Runs a model as exact mode does: a prefill call and a decode call, each of one fixed size.

A request is prefilled in the cells of the grid of `num_prefill` tokens and then fed its further
tokens one by one. `alone` runs it by itself on a clean state; `crowd` runs many at random:
arrivals, rows, slots, pages, company, NaN in whatever nobody owns, garbage in padding. What both
leave behind must be the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from driver import Sizes
from flax import nnx

from bailing_jax.batch import BatchLayout, pack
from bailing_jax.engine_options import EngineOptions
from bailing_jax.loading import load
from bailing_jax.row import Row
from bailing_jax.state import DecodeState, StateSpec, allocate

# Six sequences at once; a table of more than one KV block, a decode call of no round number.
SIZES = Sizes(
    num_decode=6,
    num_prefill=64,
    num_segments=4,
    num_slots=8,
    num_pages=40,
    page_size=32,
    pages_a_sequence=11,
)


@dataclass
class Run:
    """One request on its way, and the bits it left."""

    tokens: list[int]
    num_prompt: int
    slot: int = 0
    pages: list[int] = field(default_factory=list)
    done: int = 0
    logits: list[np.ndarray] = field(default_factory=list)
    left: list[np.ndarray] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.done == len(self.tokens)

    def row(self, count: int) -> Row:
        return Row(self.tokens[self.done : self.done + count], self.slot, self.pages, self.done)

    def cell(self, size: int) -> int:
        """The prompt tokens of the next grid cell; 0 once it decodes."""
        return max(0, min(size, self.num_prompt - self.done))


class ExactDriver:
    """A model and its two programs."""

    def __init__(
        self,
        folder: Path,
        sizes: Sizes = SIZES,
        *,
        dtype: str = "float32",
        state_dtype: str = "float32",
        overrides: dict[str, object] | None = None,
        exact: bool = True,
    ) -> None:
        options = EngineOptions(dtype=dtype, state_dtype=state_dtype, batch_invariant=exact)
        loaded = load(folder, options, overrides or {}, 0, lambda _line: None)
        self.config, self.sizes = loaded.config, sizes
        self._spec = StateSpec(
            num_slots=sizes.num_slots,
            num_pages=sizes.num_pages,
            page_dtype=dtype,
            state_dtype=state_dtype,
            page_size=sizes.page_size,
        )
        graphdef, params = nnx.split(loaded.model)

        def run(params, state, layout):
            x, state, _ = nnx.merge(graphdef, params)(state, layout)
            return nnx.merge(graphdef, params).logits(x[layout.logit_rows]), state

        self._params, self._run = params, jax.jit(run, donate_argnums=1)
        self.recurrent = [
            i for i, s in enumerate(allocate(self.config, self._spec).layers) if s.ndim == 4
        ]

    def clean(self) -> None:
        self.state = allocate(self.config, self._spec)

    def poison(self, owners: Sequence[Run]) -> None:
        """NaN in every slot and page nobody owns, NULL excepted."""
        slots = {0, *(run.slot for run in owners)}
        pages = {0, *(page for run in owners for page in run.pages)}
        leaves = []
        # In numpy: jax would compile a program for each number of places.
        for i, leaf in enumerate(self.state.layers):
            owned = slots if i in self.recurrent else pages
            array = np.array(leaf)
            array[sorted(set(range(len(array))) - owned)] = np.nan
            leaves.append(jax.device_put(array))
        self.state = DecodeState(tuple(leaves))

    def prefill(
        self, runs: Sequence[Run], garbage: np.random.Generator | None = None
    ) -> None:
        """The prefill call: D = 0, each run's next cell."""
        counts = [self._cell(run) for run in runs]
        layout = self._pack([], [run.row(n) for run, n in zip(runs, counts, strict=True)], False)
        self._spoil(layout, garbage, np.arange(sum(counts), self.sizes.num_prefill))
        self._step(layout, runs, counts)

    def decode(self, runs: Sequence[Run], garbage: np.random.Generator | None = None) -> None:
        """The decode call: T = 0, each run's next token."""
        layout = self._pack([run.row(1) for run in runs], [], True)
        self._spoil(layout, garbage, np.arange(len(runs), self.sizes.num_decode))
        self._step(layout, runs, [1] * len(runs))

    def alone(self, tokens: list[int], num_prompt: int) -> Run:
        """The request by itself in the first rows, slot and pages of a clean state."""
        self.clean()
        run = Run(tokens, num_prompt, 1, list(range(1, 1 + self._pages_for(tokens))))
        while not run.is_over:
            (self.prefill if self._cell(run) else self.decode)([run])
        run.left = self.owned(run)
        return run

    def owned(self, run: Run) -> list[np.ndarray]:
        """The bits of its slot, and of its tokens in its pages, layer by layer."""
        found = []
        for i, leaf in enumerate(self.state.layers):
            array = np.asarray(leaf)
            bits = array[run.slot] if i in self.recurrent else array[run.pages]
            if i not in self.recurrent:
                bits = bits.reshape(-1, *bits.shape[2:])[: run.done]
            found.append(np.ascontiguousarray(bits).view(np.uint8))
        return found

    def crowd(
        self, requests: Sequence[tuple[list[int], int]], rng: np.random.Generator
    ) -> list[Run]:
        """All of them, arriving, placed and ordered at random; the finished runs by request."""
        self.clean()
        runs = [Run(*request) for request in requests]
        order = rng.permutation(len(runs)).tolist()
        running: list[Run] = []
        self.poison([])
        while order or running:
            while order and self._fits(runs[order[-1]], running) and rng.random() < 0.6:
                running.append(self._admit(runs[order.pop()], running, rng))
            self._random_step(running, rng)
            for run in [run for run in running if run.is_over]:
                run.left = self.owned(run)
                running.remove(run)
            if rng.random() < 0.3:
                self.poison(running)
        return runs

    def _fits(self, run: Run, running: Sequence[Run]) -> bool:
        held = sum(len(r.pages) for r in running)
        has_pages = held + self._pages_for(run.tokens) < self.sizes.num_pages
        return has_pages and len(running) < self.sizes.num_decode

    def _admit(self, run: Run, running: Sequence[Run], rng: np.random.Generator) -> Run:
        slots = set(range(1, self.sizes.num_slots)) - {r.slot for r in running}
        taken = {page for r in running for page in r.pages}
        free = np.array(sorted(set(range(1, self.sizes.num_pages)) - taken))
        run.slot = int(rng.choice(sorted(slots)))
        run.pages = rng.permutation(free)[: self._pages_for(run.tokens)].tolist()
        return run

    def _random_step(self, running: Sequence[Run], rng: np.random.Generator) -> None:
        room, segments = self.sizes.num_prefill, []
        for i in rng.permutation(len(running)):
            run = running[i]
            if 0 < self._cell(run) <= room and len(segments) < self.sizes.num_segments:
                room -= self._cell(run)
                segments.append(run)
        decodes = [r for r in running if not self._cell(r) and rng.random() < 0.8]
        if segments:
            self.prefill([segments[i] for i in rng.permutation(len(segments))], rng)
        if decodes:
            self.decode([decodes[i] for i in rng.permutation(len(decodes))], rng)

    def _cell(self, run: Run) -> int:
        return run.cell(self.sizes.num_prefill)

    def _pages_for(self, tokens: Sequence[int]) -> int:
        return -(-len(tokens) // self.sizes.page_size)

    def _pack(self, decodes: list[Row], segments: list[Row], is_decode: bool) -> BatchLayout:
        sizes = self.sizes
        return pack(
            decodes,
            segments,
            num_decode=sizes.num_decode if is_decode else 0,
            num_prefill=0 if is_decode else sizes.num_prefill,
            num_segments=0 if is_decode else sizes.num_segments,
            page_size=sizes.page_size,
            pages_a_sequence=sizes.pages_a_sequence,
        )

    def _spoil(self, layout: BatchLayout, rng: np.random.Generator | None, pads) -> None:
        """Random tokens and positions in padding rows."""
        if rng is not None:
            np.asarray(layout.tokens)[pads] = rng.integers(0, self.config.vocab_size, len(pads))
            np.asarray(layout.positions)[pads] = rng.integers(0, 300, len(pads))

    def _step(self, layout: BatchLayout, runs: Sequence[Run], counts: Sequence[int]) -> None:
        logits, self.state = self._run(self._params, self.state, layout)
        for row, run, count in zip(np.asarray(logits), runs, counts, strict=False):
            run.logits.append(row)
            run.done += count


def assert_same_run(got: Run, want: Run) -> None:
    """Logits of every step, recurrent state and pages, bit for bit."""
    assert len(got.logits) == len(want.logits)
    for step, (a, b) in enumerate(zip(got.logits, want.logits, strict=True)):
        same = a.view(np.uint32) == b.view(np.uint32)
        assert same.all(), f"step {step}: {(~same).sum()} logits differ, {np.abs(a - b).max()}"
    for layer, (a, b) in enumerate(zip(got.left, want.left, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"layer {layer}")
