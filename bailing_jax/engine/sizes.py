"""The static sizes of steps: each is a program to compile, so there are few.

A step that only decodes has room for a power of two of rows. One that prefills has room for every
sequence's decode row, one of a few numbers of prompt tokens, and a fixed number of segments. No
jax.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

MAX_SEGMENTS = 32
_PREFILL_SIZES = (64, 256, 1024)


class Limits(Protocol):
    """The part of `EngineLimits` that sizes depend on."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at once."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """Prefill tokens a step."""
        ...


class ProgramSize(NamedTuple):
    """Decode rows D, prefill rows T and prefill segments P of a step."""

    decode_rows: int
    prefill_rows: int
    segments: int

    def in_words(self) -> str:
        """Its rows, for a person who waits while it compiles."""
        decode = f"{self.decode_rows} decode row{'s' * (self.decode_rows != 1)}"
        prefill = f", {self.prefill_rows} prefill row{'s' * (self.prefill_rows != 1)}"
        return decode + prefill * bool(self.prefill_rows)


def max_segments(limits: Limits) -> int:
    """Segments a step has room for."""
    return min(limits.max_num_seqs, MAX_SEGMENTS)


def decode_size(limits: Limits, count: int) -> ProgramSize:
    """The step in which so many sequences decode and none prefills."""
    return ProgramSize(min(1 << (count - 1).bit_length(), limits.max_num_seqs), 0, 0)


def prefill_size(limits: Limits, tokens: int) -> ProgramSize:
    """The step that takes in so many prompt tokens, whoever decodes beside them."""
    rows = next((s for s in _PREFILL_SIZES if tokens <= s < limits.prefill_chunk), None)
    return ProgramSize(limits.max_num_seqs, rows or limits.prefill_chunk, max_segments(limits))


def prompt_programs(limits: Limits, prompt_tokens: int | None = None) -> tuple[ProgramSize, ...]:
    """The steps that one prompt compiles (of any length, when it is not known) and its answer."""
    chunk = limits.prefill_chunk
    counts = set(range(1, chunk + 1))
    if prompt_tokens is not None:
        counts = {min(prompt_tokens, chunk), prompt_tokens % chunk} - {0}
    return (*sorted({prefill_size(limits, count) for count in counts}), decode_size(limits, 1))


def job_programs(limits: Limits) -> tuple[ProgramSize, ...]:
    """The steps that `max_num_seqs` requests of any length can compile."""
    decodes = {decode_size(limits, count) for count in range(1, limits.max_num_seqs + 1)}
    prefills = {prefill_size(limits, count) for count in range(1, limits.prefill_chunk + 1)}
    return (*sorted(prefills), *sorted(decodes))
