"""The static sizes of steps: each is a program to compile, so there are at most twelve.

A step that only decodes has room for a power of two of rows. One that prefills has room for every
sequence's decode row, one of a few numbers of prompt tokens, and a fixed number of segments. In
exact mode decode and prefill are calls of their own: one size for decode, whatever the company, and
for each piece of a prompt the smallest prefill that has room for it alone. No jax.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

MAX_PROGRAMS = 12
MAX_SEGMENTS = 32


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

    @property
    def exact(self) -> bool:
        """Whether the size of a step must follow from each of its sequences alone."""
        ...

    @property
    def small_prefills(self) -> tuple[int, ...]:
        """Prefill rows a step may have besides `prefill_chunk`, ascending."""
        ...


class ProgramSize(NamedTuple):
    """Decode rows D, prefill rows T and prefill segments P of a step."""

    decode_rows: int
    prefill_rows: int
    segments: int

    def in_words(self) -> str:
        """Its rows, for a person who waits while it compiles."""
        parts = [
            f"{rows} {what} row{'s' * (rows != 1)}"
            for what, rows in (("decode", self.decode_rows), ("prefill", self.prefill_rows))
            if rows
        ]
        return ", ".join(parts)


def max_segments(limits: Limits) -> int:
    """Segments a step has room for."""
    return min(limits.max_num_seqs, MAX_SEGMENTS)


def decode_sizes(limits: Limits) -> tuple[ProgramSize, ...]:
    """Every step that only decodes, from the smallest.

    Where powers of two are more than there is room for, small ones go first: what a step of few
    rows costs is the weights it reads, not its rows.
    """
    largest = limits.max_num_seqs
    rows = [] if limits.exact else [1 << i for i in range((largest - 1).bit_length())]
    rows.append(largest)
    while len(rows) > MAX_PROGRAMS - len(prefill_rows(limits)):
        gone = 1
        while gone < len(rows) - 1 and len(rows) > MAX_PROGRAMS - len(prefill_rows(limits)):
            del rows[gone]
            gone += 1
    return tuple(ProgramSize(count, 0, 0) for count in rows)


def prefill_sizes(limits: Limits) -> tuple[ProgramSize, ...]:
    """Every step that takes in prompt tokens, from the smallest."""
    decode_rows = 0 if limits.exact else limits.max_num_seqs
    return tuple(
        ProgramSize(decode_rows, rows, max_segments(limits)) for rows in prefill_rows(limits)
    )


def prefill_rows(limits: Limits) -> tuple[int, ...]:
    """The numbers of prefill rows a step may have, ascending."""
    small = (rows for rows in limits.small_prefills if rows < limits.prefill_chunk)
    return (*small, limits.prefill_chunk)


def decode_size(limits: Limits, count: int) -> ProgramSize:
    """The step in which so many sequences decode and none prefills."""
    return next(size for size in decode_sizes(limits) if size.decode_rows >= count)


def prefill_size(limits: Limits, tokens: int) -> ProgramSize:
    """The step that takes in so many prompt tokens, whoever decodes beside them.

    In exact mode the tokens of one piece: those that share its call are of the same size.
    """
    return next(size for size in prefill_sizes(limits) if size.prefill_rows >= tokens)


def prompt_programs(limits: Limits, prompt_tokens: int | None = None) -> tuple[ProgramSize, ...]:
    """The steps that one prompt compiles (of any length, when it is not known) and its answer."""
    chunk = limits.prefill_chunk
    counts = set(range(1, chunk + 1))
    if prompt_tokens is not None:
        counts = {min(prompt_tokens, chunk), prompt_tokens % chunk} - {0}
    return (*sorted({prefill_size(limits, count) for count in counts}), decode_size(limits, 1))


def job_programs(limits: Limits) -> tuple[ProgramSize, ...]:
    """The steps that `max_num_seqs` requests of any length can compile."""
    return (*prefill_sizes(limits), *decode_sizes(limits))
