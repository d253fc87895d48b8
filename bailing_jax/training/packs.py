"""Packs: samples laid one after another into a step of static size, made ahead by processes.

A pack of a source holds at most `rows` tokens and `segments` samples. Its number decides its
content: sample indices of pack n start at n * MAX_SAMPLES. No jax here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.training.samples import Sample, Source, SourceSpec, open_source

if TYPE_CHECKING:
    import multiprocessing.context

MAX_SAMPLES = 1 << 20  # more than any pack holds, left-out samples included
WINDOW_STEP = 64
_PROBES = 400


@dataclass(frozen=True)
class PackSize:
    """Static sizes of a source's packs.

    Attributes:
        rows: tokens.
        segments: samples.
        window: tokens of the longest sample that is taken, less the last.
    """

    rows: int
    segments: int
    window: int


@dataclass(frozen=True)
class Pack:
    """One pack; rows beyond the samples are zero and weigh nothing.

    Attributes:
        tokens: int32 [rows], inputs.
        targets: int32 [rows], the token after each.
        weights: float32 [rows], of the targets.
        lengths: rows of each sample.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    lengths: tuple[int, ...]


def measure(source: Source, name: str, rows: int, max_length: int) -> PackSize:
    """Sizes that waste little, from the lengths of the source's first samples.

    Raises:
        UserError: hardly any sample is short enough, or rows hold none.
    """
    # Probed indices lie before those of any pack in use: packs count from 1.
    lengths = [len(source.sample(index).tokens) - 1 for index in range(_PROBES)]
    kept = [n for n in lengths if 1 <= n <= max_length]
    if len(kept) < _PROBES // 2:
        raise UserError(
            f"{name}: {_PROBES - len(kept)} of {_PROBES} samples do not have 2 to "
            f"{max_length + 1} tokens",
            "Raise --max-length, or shorten the samples.",
            EXIT_USAGE,
        )
    longest = max(kept) * 21 // 20  # later ones may be longer
    window = min(max_length, math.ceil(longest / WINDOW_STEP) * WINDOW_STEP)
    if rows < window:
        raise UserError(
            f"{name}: its share of a step is {rows} tokens, its samples have up to {window}",
            "Raise --rows or its share, or lower --max-length or --accumulate.",
            EXIT_USAGE,
        )
    segments = math.ceil(1.1 * rows / (sum(kept) / len(kept))) + 2
    return PackSize(rows, segments, window)


def make_pack(source: Source, number: int, size: PackSize) -> Pack:
    """Pack `number` (from 1): samples in order until the next does not fit."""
    chosen: list[Sample] = []
    used = 0
    for index in range(number * MAX_SAMPLES, (number + 1) * MAX_SAMPLES):
        sample = source.sample(index)
        length = len(sample.tokens) - 1
        if not 1 <= length <= size.window:
            continue
        if used + length > size.rows:
            break
        chosen.append(sample)
        used += length
        if len(chosen) == size.segments:
            break

    def joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        out = np.zeros(size.rows, dtype)
        out[:used] = np.concatenate(parts)
        return out

    return Pack(
        tokens=joined([s.tokens[:-1] for s in chosen], np.int32),
        targets=joined([s.tokens[1:] for s in chosen], np.int32),
        weights=joined([s.weights[1:] for s in chosen], np.float32),
        lengths=tuple(len(s.tokens) - 1 for s in chosen),
    )


class PackStream:
    """Packs of every source in order, made by `workers` processes ahead of their use.

    A step takes `accumulate` packs of each source. With no workers packs are made on demand.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        sizes: Sequence[PackSize],
        accumulate: int,
        workers: int,
    ) -> None:
        self._specs, self._sizes, self._accumulate = list(specs), list(sizes), accumulate
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            import multiprocessing

            # Not forked: this process has started threads and may hold an accelerator.
            context: multiprocessing.context.BaseContext = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                workers, context, initializer=_open_sources, initargs=(self._specs,)
            )
        else:
            self._here = [open_source(spec) for spec in self._specs]

    def __enter__(self) -> PackStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def steps(self, first: int, last: int) -> Iterator[list[list[Pack]]]:
        """For each step first..last-1 the packs [source][part]."""
        ahead: list[list[list[Callable[[], Pack]]]] = []
        depth = 1 + 3 * self._workers // (len(self._specs) * self._accumulate)
        for step in range(first, last):
            while len(ahead) < depth and step + len(ahead) < last:
                ahead.append(self._ask(step + len(ahead)))
            yield [[part() for part in parts] for parts in ahead.pop(0)]

    def _ask(self, step: int) -> list[list[Callable[[], Pack]]]:
        numbers = range(1 + step * self._accumulate, 1 + (step + 1) * self._accumulate)
        return [[self._one(source, n) for n in numbers] for source in range(len(self._specs))]

    def _one(self, source: int, number: int) -> Callable[[], Pack]:
        size = self._sizes[source]
        if self._pool is None:
            return lambda: make_pack(self._here[source], number, size)
        future: Future[Pack] = self._pool.submit(_make, source, number, size)
        return future.result


_sources: list[Source] = []


def _open_sources(specs: Sequence[SourceSpec]) -> None:
    """Open a process's sources, once."""
    _sources[:] = [open_source(spec) for spec in specs]


def _make(source: int, number: int, size: PackSize) -> Pack:
    return make_pack(_sources[source], number, size)
