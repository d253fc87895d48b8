"""Debug mode (BAILING_DEBUG=1): the invariants of `invariants` on every step, device included.

Before a step: plan, ledgers and layout are checked, whatever nobody owns any more and whatever was
just handed out is filled with NaN, and the state is copied to the host. After it: only the
slots and page rows named in it may differ, NULL is zero, and what its sequences got is finite. A
broken invariant ends the step with `InvariantError`.

Costs two copies of the state a step: for tests and for finding faults, not for work. The module
starts without jax, which only its work on arrays needs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bailing_jax.engine import invariants
from bailing_jax.engine.invariants import InvariantError, Part, Tally, held
from bailing_jax.errors import UserError
from bailing_jax.layer_plan import layer_plan

VARIABLE = "BAILING_DEBUG"


def is_on() -> bool:
    """Whether the environment asks for debug mode."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def check_processes() -> None:
    """Refuse debug mode where no process sees the whole state.

    Raises:
        UserError: the variable is set, and there are several processes.
    """
    import jax

    if is_on() and jax.process_count() > 1:
        raise UserError(
            f"{VARIABLE}: debug mode reads the whole state, which lies in "
            f"{jax.process_count()} processes here",
            f"Unset {VARIABLE}, or use one process.",
        )


def start(config: Any, page_size: int) -> Debug:
    """The checks of one engine; they do nothing unless debug mode is on."""
    return Debug(config, page_size, on=is_on())


@dataclass
class _Pending:
    """A step between `before` and `after`."""

    parts: list[Part]
    leaves: list[np.ndarray]


class Debug:
    """Checks around the steps of one engine.

    Args:
        config: the model's.
        page_size: tokens a page.
        on: False makes every method do nothing.
    """

    def __init__(self, config: Any, page_size: int, *, on: bool) -> None:
        self._config = config
        self._page_size = page_size
        self.on = on
        self._tally = Tally()
        self._step = 0
        # What was handed out when we last looked, each with the epoch of its owner's slot: None
        # before the first step.
        self._slots: dict[int, int] | None = None
        self._pages: dict[int, int] | None = None
        self._pending: _Pending | None = None

    @functools.cached_property
    def _recurrent(self) -> tuple[bool, ...]:
        """For each layer, whether it keeps slots; the others keep pages."""
        return tuple(spec.attention == "lightning" for spec in layer_plan(self._config))

    def before(self, plan: Any, layout: Any, state: Any, scheduler: Any) -> Any:
        """Check a step that is about to run; the state, poisoned where nobody's data is."""
        if not self.on:
            return state
        self._step += 1
        parts = invariants.parts_of(plan, layout, getattr(plan, "num_steps", 1))
        slots, pages = scheduler.slots, scheduler.pages
        invariants.check_ledgers(slots, pages, parts, self._step)
        invariants.check_layout(parts, layout, self._step)
        self._tally.check(parts, slots, self._step)
        state = self._poison(state, slots, pages)
        self._pending = _Pending(parts, [np.array(leaf) for leaf in state.layers])
        self._check_null(self._pending.leaves)
        return state

    def after(self, state: Any, logits: Any) -> None:
        """Check what the step left: the new state, and logits [D + P, vocab]."""
        if not self.on:
            return
        pending, self._pending = self._pending, None
        if pending is None:
            raise ValueError("after() without before()")
        leaves = [np.asarray(leaf) for leaf in state.layers]
        self._check_null(leaves)
        for layer, (was, now) in enumerate(zip(pending.leaves, leaves, strict=True)):
            if self._recurrent[layer]:
                self._check_slots(layer, was, now, pending.parts)
            else:
                self._check_pages(layer, was, now, pending.parts)
        self._check_logits(np.asarray(logits), pending.parts)
        self._tally.record(pending.parts)

    def _poison(self, state: Any, slots: Any, pages: Any) -> Any:
        """NaN in what is free and in what was handed out since the last step."""
        now_slots = {handle.slot: handle.epoch for handle in held(slots)}
        epochs = {handle.owner: handle.epoch for handle in held(slots)}
        now_pages = {page: epochs[h.owner] for h in held(pages) for page in h.pages}
        spoiled = {
            True: [i for i in range(1, slots.capacity + 1) if _is_new(i, now_slots, self._slots)],
            False: [i for i in range(1, pages.capacity + 1) if _is_new(i, now_pages, self._pages)],
        }
        self._slots, self._pages = now_slots, now_pages
        if not state.layers or not any(spoiled.values()):
            return state
        leaves = []
        for is_slots, leaf in zip(self._recurrent, state.layers, strict=True):
            array = np.array(leaf)
            array[spoiled[is_slots]] = np.nan
            leaves.append(_device_array(array))
        return type(state)(tuple(leaves))

    def _check_null(self, leaves: Sequence[np.ndarray]) -> None:
        for layer, leaf in enumerate(leaves):
            if _bits(leaf[0]).any():
                kind = "slot" if self._recurrent[layer] else "page"
                what = f"the NULL {kind} of layer {layer} is not zero"
                raise InvariantError("I8", what, step=self._step, slot=0)

    def _check_slots(
        self, layer: int, was: np.ndarray, now: np.ndarray, parts: Sequence[Part]
    ) -> None:
        changed = _rows_that_differ(was, now)
        owners = {part.slot: part for part in parts if part.count}
        for slot in changed.tolist():
            if slot not in owners:
                what = f"layer {layer}: the step wrote a slot of nobody in it"
                raise InvariantError("I4", what, step=self._step, slot=slot)
        for slot, part in owners.items():
            if not np.isfinite(now[slot].astype(np.float32)).all():
                raise self._not_finite(part, f"the state of layer {layer}")

    def _check_pages(
        self, layer: int, was: np.ndarray, now: np.ndarray, parts: Sequence[Part]
    ) -> None:
        owners = {page: part for part in parts for page in part.sequence.pages.pages}
        flat = was.shape[0] * self._page_size
        was, now = was.reshape(flat, -1), now.reshape(flat, -1)
        expected = {
            page * self._page_size + row
            for page, row in invariants.written(parts, self._page_size)
        }
        for row in _rows_that_differ(was, now).tolist():
            if row not in expected:
                page, within = divmod(row, self._page_size)
                part = owners.get(page)
                number = part.sequence.number if part else None
                what = f"layer {layer}: the step wrote row {within} of page {page}, not one of its"
                raise InvariantError("I4", what, step=self._step, request=number)
        for part in parts:
            # Of a call of several steps only the first is sure to have run.
            sure = list(invariants.written([part], self._page_size))
            sure = sure[:1] if part.is_decode else sure
            rows = [page * self._page_size + row for page, row in sure]
            if not np.isfinite(now[rows].astype(np.float32)).all():
                raise self._not_finite(part, f"the pages of layer {layer}")

    def _check_logits(self, logits: np.ndarray, parts: Sequence[Part]) -> None:
        for part in parts:
            if part.count and not np.isfinite(logits[part.logit_row]).all():
                raise self._not_finite(part, "its logits")

    def _not_finite(self, part: Part, what: str) -> InvariantError:
        fresh = part.sequence.num_computed == 0
        return InvariantError(
            "I5" if fresh else "I14",
            f"NaN or infinity in {what}" + " of a fresh sequence" * fresh,
            step=self._step,
            request=part.sequence.number,
            slot=part.slot,
        )


def apart(state: Any, num_shards: int) -> list[Any]:
    """The state of each shard, which lie side by side along the first axis; copies on the host."""
    if num_shards == 1:
        return [state]
    leaves = [np.asarray(leaf) for leaf in state.layers]
    split = [leaf.reshape(num_shards, -1, *leaf.shape[1:]) for leaf in leaves]
    return [type(state)(tuple(leaf[i] for leaf in split)) for i in range(num_shards)]


def together(states: Sequence[Any], like: Any) -> Any:
    """The states of all shards side by side, each leaf on the devices of that in `like`."""
    if len(states) == 1:
        return states[0]
    joined = (np.concatenate(leaves) for leaves in zip(*(s.layers for s in states), strict=True))
    placed = zip(joined, like.layers, strict=True)
    return type(like)(tuple(_device_array(leaf, old) for leaf, old in placed))


def _is_new(number: int, now: dict[int, int], before: dict[int, int] | None) -> bool:
    """Whether a slot or page was freed or handed out since; everything is at the start."""
    return before is None or before.get(number) != now.get(number)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def _rows_that_differ(was: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The indices on the first axis whose bits are not the same."""
    count = was.shape[0]
    return np.flatnonzero((_bits(was).reshape(count, -1) != _bits(now).reshape(count, -1)).any(1))


def _device_array(x: np.ndarray, like: Any = None) -> Any:
    import jax

    return jax.device_put(x, getattr(like, "sharding", None))
