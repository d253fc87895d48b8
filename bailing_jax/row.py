"""What one sequence brings to a step, in host terms. No jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one sequence brings to a step: its new tokens and where its state is.

    Attributes:
        tokens: the new token ids; exactly one for a decode row.
        slot: its slot, never 0.
        pages: its pages in order, enough for context + tokens.
        context: the tokens its state holds already; 0 starts it afresh.
    """

    tokens: Sequence[int]
    slot: int
    pages: Sequence[int]
    context: int
