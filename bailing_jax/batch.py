"""BatchLayout: one packed step, and the only place that knows who comes first.

A step is `D` decode rows (sequences with state and one new token), then `T` prefill rows that
hold `P` packed segments. D, T and P are static sizes; everything else is an array. Rows and
slots are split and joined by the methods here and nowhere else: an operator gets one region
together with that region's own slots and pages, never an offset into a mixed array.

Padding: decode rows and segments beyond the real ones name slot 0 and page 0 (both NULL), and
prefill rows beyond `cu_seqlens[-1]` belong to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bailing_jax.row import Row


class Region(NamedTuple):
    """Where the sequences of one region keep their state.

    Attributes:
        slots: int32 [B].
        page_table: int32 [B, W].
        context_lengths: int32 [B], tokens cached before this step.
        cu_seqlens: int32 [B + 1] for segments, None for decode rows.
        is_fresh: bool [B] for segments, None for decode rows.
    """

    slots: jax.Array
    page_table: jax.Array
    context_lengths: jax.Array
    cu_seqlens: jax.Array | None
    is_fresh: jax.Array | None


RunRegion = Callable[..., tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchLayout:
    """One step: decode rows first, then prefill rows. `pack` fills it with numpy arrays.

    Attributes:
        tokens: int32 [D + T].
        positions: int32 [D + T].
        decode_slots: int32 [D], 0 for padding rows.
        decode_pages: int32 [D, W].
        decode_contexts: int32 [D], tokens cached before this step.
        segment_slots: int32 [P], 0 for padding segments.
        segment_pages: int32 [P, W].
        segment_contexts: int32 [P].
        cu_seqlens: int32 [P + 1], relative to the prefill rows.
        is_fresh: bool [P], whether a segment starts its sequence.
        logit_rows: int32 [D + P], the row of each sequence's last token.
    """

    tokens: jax.Array
    positions: jax.Array
    decode_slots: jax.Array
    decode_pages: jax.Array
    decode_contexts: jax.Array
    segment_slots: jax.Array
    segment_pages: jax.Array
    segment_contexts: jax.Array
    cu_seqlens: jax.Array
    is_fresh: jax.Array
    logit_rows: jax.Array

    @property
    def num_decode(self) -> int:
        """D, the number of decode rows, padding included."""
        return self.decode_slots.shape[-1]

    @property
    def num_prefill(self) -> int:
        """T, the number of prefill rows, padding included."""
        return self.tokens.shape[-1] - self.num_decode

    def decode_rows(self, x: jax.Array) -> jax.Array:
        """The decode rows of x [D + T, ...]."""
        return x[: self.num_decode]

    def prefill_rows(self, x: jax.Array) -> jax.Array:
        """The prefill rows of x [D + T, ...]."""
        return x[self.num_decode :]

    def join(self, decode: jax.Array, prefill: jax.Array) -> jax.Array:
        """Put decode rows [D, ...] and prefill rows [T, ...] back together."""
        return jnp.concatenate([decode, prefill])

    def decode_region(self) -> Region:
        """Slots and pages of the decode rows."""
        return Region(self.decode_slots, self.decode_pages, self.decode_contexts, None, None)

    def prefill_region(self) -> Region:
        """Slots and pages of the prefill segments."""
        return Region(
            self.segment_slots,
            self.segment_pages,
            self.segment_contexts,
            self.cu_seqlens,
            self.is_fresh,
        )

    def by_region(
        self, run: RunRegion, state: jax.Array, *arrays: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Run an operator on the decode rows and on the prefill rows, each with its own places.

        Args:
            run: (region, state, *rows) -> (y [rows, ...], state).
            state: what both regions read and write, in slots or pages that differ.
            arrays: each [D + T, ...].

        Returns:
            y [D + T, ...] and the state. A region of static size 0 is not run.
        """
        outputs = []
        for rows, region in (
            (self.decode_rows, self.decode_region()),
            (self.prefill_rows, self.prefill_region()),
        ):
            parts = [rows(x) for x in arrays]
            if parts[0].shape[0]:
                y, state = run(region, state, *parts)
                outputs.append(y)
        return (self.join(*outputs) if len(outputs) == 2 else outputs[0]), state

    def exists(self) -> jax.Array:
        """bool [D + T]: rows that are somebody's token."""
        prefill = jnp.arange(self.num_prefill) < self.cu_seqlens[-1]
        return jnp.concatenate([self.decode_slots != 0, prefill])


def pack(
    decodes: Sequence[Row],
    segments: Sequence[Row],
    *,
    num_decode: int,
    num_prefill: int,
    num_segments: int,
    page_size: int,
    pages_a_sequence: int,
) -> BatchLayout:
    """Lay out one step of static size (num_decode, num_prefill, num_segments) on the host.

    Raises:
        ValueError: the rows do not fit, share a slot, name NULL, lack pages, or a decode row
            has no state or not exactly one token.
    """
    _check(decodes, segments, (num_decode, num_prefill, num_segments), page_size, pages_a_sequence)
    tokens = np.zeros(num_decode + num_prefill, np.int32)
    positions = np.zeros_like(tokens)
    cu_seqlens = np.zeros(num_segments + 1, np.int32)
    logit_rows = np.zeros(num_decode + num_segments, np.int32)
    for i, row in enumerate(decodes):
        tokens[i], positions[i], logit_rows[i] = row.tokens[0], row.context, i
    start = 0
    for i, row in enumerate(segments):
        stop = start + len(row.tokens)
        here = slice(num_decode + start, num_decode + stop)
        tokens[here] = row.tokens
        positions[here] = row.context + np.arange(len(row.tokens))
        cu_seqlens[i + 1 :] = stop
        logit_rows[num_decode + i] = max(num_decode + stop - 1, 0)
        start = stop
    decode_slots, decode_pages, decode_contexts = _places(decodes, num_decode, pages_a_sequence)
    segment_slots, segment_pages, segment_contexts = _places(
        segments, num_segments, pages_a_sequence
    )
    is_fresh = np.zeros(num_segments, bool)
    is_fresh[: len(segments)] = [row.context == 0 for row in segments]
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "positions": positions,
        "decode_slots": decode_slots,
        "decode_pages": decode_pages,
        "decode_contexts": decode_contexts,
        "segment_slots": segment_slots,
        "segment_pages": segment_pages,
        "segment_contexts": segment_contexts,
        "cu_seqlens": cu_seqlens,
        "is_fresh": is_fresh,
        "logit_rows": logit_rows,
    }
    return BatchLayout(**arrays)


def stack(layouts: Sequence[BatchLayout]) -> BatchLayout:
    """The layouts of several shards as one, each array with a leading axis [shards, ...].

    Slots and pages stay each shard's own. Only the static sizes can be asked of such a layout;
    its methods speak of one shard's arrays.

    Raises:
        ValueError: none, or static sizes that differ.
    """
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layouts)


def _places(rows: Sequence[Row], size: int, width: int) -> tuple[np.ndarray, ...]:
    slots = np.zeros(size, np.int32)
    pages = np.zeros((size, width), np.int32)
    contexts = np.zeros(size, np.int32)
    for i, row in enumerate(rows):
        slots[i], contexts[i] = row.slot, row.context
        pages[i, : len(row.pages)] = row.pages
    return slots, pages, contexts


def _check(
    decodes: Sequence[Row],
    segments: Sequence[Row],
    sizes: tuple[int, int, int],
    page_size: int,
    width: int,
) -> None:
    new_tokens = sum(len(row.tokens) for row in segments)
    if len(decodes) > sizes[0] or new_tokens > sizes[1] or len(segments) > sizes[2]:
        raise ValueError(
            f"{len(decodes)} decode rows, {new_tokens} prefill tokens and {len(segments)} "
            f"segments do not fit a step of {sizes}"
        )
    rows = [*decodes, *segments]
    for kind in ("slot", "page"):
        used = [row.slot for row in rows] if kind == "slot" else [p for r in rows for p in r.pages]
        if len(set(used)) != len(used) or min(used, default=1) <= 0:
            raise ValueError(f"{kind}s of a step must be distinct and not NULL: {sorted(used)}")
    for row in rows:
        if row.context < 0:
            raise ValueError(f"slot {row.slot}: context {row.context} < 0")
        have, need = len(row.pages), -(-(row.context + len(row.tokens)) // page_size)
        if not need <= have <= width:
            raise ValueError(f"slot {row.slot}: {have} pages, needs {need}, at most {width}")
    for row in decodes:
        if row.context < 1 or len(row.tokens) != 1:
            raise ValueError(
                f"slot {row.slot}: a decode row has state and one new token, got context "
                f"{row.context} and {len(row.tokens)} tokens"
            )


