"""Debug mode: each invariant is broken on purpose and named; sound steps pass.

A model that only writes stands for the device: one layer of slots, one of pages.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import greedy, linear_llm

from bailing_jax.batch import BatchLayout, pack
from bailing_jax.engine.debug import Debug, is_on
from bailing_jax.engine.invariants import InvariantError
from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.scheduler import Sequence, StepPlan
from bailing_jax.engine.slots import SlotLedger
from bailing_jax.state import DecodeState

PAGE_SIZE, SLOTS, PAGES, WIDTH = 4, 4, 12, 5


class World:
    """Ledgers, a state, three requests, and the debug mode that watches them."""

    def __init__(self) -> None:
        self.slots, self.pages = SlotLedger(SLOTS), PageLedger(PAGES, PAGE_SIZE)
        self.state = DecodeState(
            (
                np.zeros((SLOTS + 1, 2, 3, 3), np.float32),
                np.zeros((PAGES + 1, PAGE_SIZE, 5), np.float32),
            )  # type: ignore[arg-type]
        )
        self.debug = Debug(None, PAGE_SIZE, on=True)
        self.debug.__dict__["_recurrent"] = (True, False)
        self.running = [self.start(n, [n * 10 + i for i in range(6)]) for n in (1, 2, 3)]

    def start(self, number: int, tokens: list[int]) -> Sequence:
        sequence = Sequence(number, tokens, len(tokens) - 2, 16)
        sequence.slot = self.slots.allocate(number)
        sequence.pages = self.pages.allocate(number, 16)
        return sequence

    def stop(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        assert sequence.pages is not None
        self.slots.free(sequence.slot)
        self.pages.free(sequence.pages)

    def plan(self, decodes: list[Sequence], segments: list[tuple[Sequence, int]]) -> StepPlan:
        return StepPlan(tuple(decodes), tuple(segments))

    def layout(self, plan: StepPlan) -> BatchLayout:
        return pack(
            plan.decode_rows(),
            plan.segment_rows(),
            num_decode=3,
            num_prefill=12,
            num_segments=3,
            page_size=PAGE_SIZE,
            pages_a_sequence=WIDTH,
        )

    def step(
        self,
        plan: StepPlan,
        *,
        layout: Callable[[BatchLayout], Any] = lambda layout: layout,
        device: Callable[[list[np.ndarray]], None] = lambda leaves: None,
        logits: Callable[[np.ndarray], None] = lambda logits: None,
    ) -> None:
        """One step; the arguments spoil the layout, the new state, the logits."""
        laid_out = layout(self.layout(plan))
        scheduler = SimpleNamespace(slots=self.slots, pages=self.pages)
        state = self.debug.before(plan, laid_out, self.state, scheduler)
        leaves = [np.array(leaf) for leaf in state.layers]
        counts = [(s, 1) for s in plan.decodes] + list(plan.segments)
        for sequence, count in counts:
            if count:
                self.fold(leaves, sequence, count)
        device(leaves)
        out = np.zeros((6, 7), np.float32)
        logits(out)
        self.state = DecodeState(tuple(leaves))  # type: ignore[arg-type]
        self.debug.after(self.state, out)
        for sequence, count in counts:
            sequence.num_computed += count

    def fold(self, leaves: list[np.ndarray], sequence: Sequence, count: int) -> None:
        """What a right model does: select the fresh, fold, append."""
        assert sequence.slot is not None
        assert sequence.pages is not None
        start, slot = sequence.num_computed, sequence.slot.slot
        old = np.zeros((2, 3, 3), np.float32) if start == 0 else leaves[0][slot]
        new = sequence.tokens[start : start + count]
        leaves[0][slot] = old * 0.5 + sum(new) + 1
        for position in range(start, start + count):
            page = sequence.pages.pages[position // PAGE_SIZE]
            leaves[1][page, position % PAGE_SIZE] = position + 1

    def warm(self) -> tuple[Sequence, Sequence, Sequence]:
        """Two requests past their prompts, the third fresh."""
        a, b, c = self.running
        self.step(self.plan([], [(a, 4), (b, 3)]))
        self.step(self.plan([a], [(b, 1)]))
        return a, b, c

    def everybody(self) -> StepPlan:
        a, b, c = self.running
        return self.plan([a, b], [(c, 4)])


@pytest.fixture
def world() -> World:
    return World()


def expect(invariant: str, request: int | None = None, slot: int | None = None) -> Any:
    """The named error; request and slot where they are known."""
    return _Expected(invariant, request, slot)


class _Expected:
    def __init__(self, invariant: str, request: int | None, slot: int | None) -> None:
        self.want = (invariant, request, slot)
        self.raises = pytest.raises(InvariantError, match=rf"^{invariant} \w+: step \d+")

    def __enter__(self) -> None:
        self.caught = self.raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        suppressed = bool(self.raises.__exit__(*error))
        found = (self.caught.value.invariant, self.caught.value.request, self.caught.value.slot)
        assert found == self.want, str(self.caught.value)
        return suppressed


def changed(name: str, index: Any, value: int) -> Callable[[BatchLayout], BatchLayout]:
    """The layout with one entry of one array changed."""

    def change(layout: BatchLayout) -> BatchLayout:
        array = np.array(getattr(layout, name))
        array[index] = value
        return dataclasses.replace(layout, **{name: array})

    return change


def test_sound_steps_pass_and_freed_slots_come_back(world: World) -> None:
    a, _, c = world.warm()
    world.step(world.everybody())
    world.stop(a)
    d = world.start(4, [7] * 6)  # in the slot and pages of the first
    world.step(world.plan([], [(d, 4), (c, 0)]))
    world.step(world.plan([d, c], []))


def test_r020_a_slot_just_handed_out_and_what_is_free_hold_nan(world: World) -> None:
    a, b, _ = world.warm()
    world.stop(b)
    d = world.start(4, [7] * 6)
    assert d.slot is not None
    assert d.pages is not None
    world.step(world.plan([a], []))
    slots, pages = world.state.layers
    assert np.isnan(slots[d.slot.slot]).all()
    assert np.isnan(slots[4]).all()
    assert np.isnan(pages[list(d.pages.pages)]).all()
    assert np.isfinite(slots[0]).all()


def test_r010_swapped_slots_of_two_rows(world: World) -> None:
    a, b, _ = world.warm()
    with expect("I4", 1, a.slot.slot):  # type: ignore[union-attr]
        world.step(world.everybody(), layout=changed("decode_slots", 0, b.slot.slot))  # type: ignore[union-attr]


def test_r019_a_row_that_names_anothers_page(world: World) -> None:
    a, b, _ = world.warm()
    with expect("I4", 2, b.slot.slot):  # type: ignore[union-attr]
        world.step(world.everybody(), layout=changed("decode_pages", (1, 0), a.pages.pages[0]))  # type: ignore[union-attr]


def test_r029_a_stale_handle(world: World) -> None:
    a, _, _ = world.warm()
    stale = a.slot
    assert stale is not None
    world.slots.free(stale)
    world.slots.allocate(a.number)  # the same slot, another epoch
    with expect("I4", 1, stale.slot):
        world.step(world.everybody())


@pytest.mark.parametrize("slot", [3, 4])
def test_r037_a_step_that_writes_a_slot_not_in_it(world: World, slot: int) -> None:
    """A parked request's, and a free one."""
    a, b, _ = world.warm()

    def device(leaves: list[np.ndarray]) -> None:
        leaves[0][slot, 1, 2, 0] = 5

    with expect("I4", None, slot):
        world.step(world.plan([a, b], []), device=device)


@pytest.mark.parametrize(("whose", "row"), [(0, 0), (2, 1), (None, 0)])
def test_a_step_that_writes_a_page_row_behind_it(
    world: World, whose: int | None, row: int
) -> None:
    """A token folded in long ago, a parked request's page, a free page."""
    a, b, _ = world.warm()
    if whose is None:
        world.stop(world.running[2])
        page = world.pages._free[0]
    else:
        page = world.running[whose].pages.pages[0]  # type: ignore[union-attr]

    def device(leaves: list[np.ndarray]) -> None:
        leaves[1][page, row, 0] = -3

    with expect("I4", 1 if whose == 0 else None):
        world.step(world.plan([a, b], []), device=device)


def test_r016_fresh_flag_of_a_continued_segment(world: World) -> None:
    a, _, _ = world.running
    world.step(world.plan([], [(a, 2)]))
    with expect("I5", 1, 1):
        world.step(world.plan([], [(a, 2)]), layout=changed("is_fresh", 0, 1))


def test_r012_old_content_that_reaches_a_fresh_sequence(world: World) -> None:
    """The model reads the slot though the sequence is fresh: the poison shows."""
    _, _, c = world.warm()

    def device(leaves: list[np.ndarray]) -> None:
        leaves[0][3] = leaves[0][3] * np.nan

    with expect("I5", 3, 3):
        world.step(world.plan([], [(c, 4)]), device=device)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_counter_that_ran_ahead_or_behind(world: World, by: int) -> None:
    a, _, _ = world.running
    world.step(world.plan([], [(a, 3)]))
    a.num_computed += by
    with expect("I6", 1, 1):
        world.step(world.plan([], [(a, 1)]))


def test_r081_tokens_that_are_not_those_folded_in(world: World) -> None:
    a, _, _ = world.warm()
    a.tokens[2] += 1
    with expect("I6", 1, 1):
        world.step(world.plan([a], []))


@pytest.mark.parametrize(
    ("array", "index"), [("tokens", 0), ("positions", 1), ("decode_contexts", 0), ("logit_rows", 1)]
)
def test_r039_fed_tokens_positions_and_rows_are_the_requests_own(
    world: World, array: str, index: int
) -> None:
    world.warm()
    with expect("I6", index + 1, index + 1):
        world.step(world.everybody(), layout=changed(array, index, 2))


def test_r024_a_slot_that_leaked(world: World) -> None:
    world.warm()
    world.slots._free.pop()
    with expect("I7"):
        world.step(world.everybody())


def test_r027_a_page_handed_out_twice(world: World) -> None:
    a, _, _ = world.warm()
    world.pages._free.append(a.pages.pages[1])  # type: ignore[union-attr]
    with expect("I7"):
        world.step(world.everybody())


def test_r022_two_rows_of_one_slot(world: World) -> None:
    """Laid out by hand: `pack` refuses it."""
    a, _, _ = world.warm()
    layout = world.layout(world.plan([a], []))
    twice = {}
    for name in ("decode_slots", "decode_pages", "decode_contexts", "tokens", "positions"):
        array = np.array(getattr(layout, name))
        array[1] = array[0]
        twice[name] = array
    layout = dataclasses.replace(layout, **twice, logit_rows=np.arange(6, dtype=np.int32))
    scheduler = SimpleNamespace(slots=world.slots, pages=world.pages)
    with expect("I7"):
        world.debug.before(world.plan([a, a], []), layout, world.state, scheduler)


@pytest.mark.parametrize(
    ("array", "index"),
    [
        ("decode_slots", 2),
        ("decode_pages", (2, 0)),
        ("segment_slots", 1),
        ("segment_pages", (2, 1)),
    ],
)
def test_r035_padding_that_names_a_place(world: World, array: str, index: Any) -> None:
    world.warm()
    with expect("I8"):
        world.step(world.everybody(), layout=changed(array, index, 4))


@pytest.mark.parametrize("layer", [0, 1])
def test_r036_padding_that_writes_the_null_place(world: World, layer: int) -> None:
    world.warm()

    def device(leaves: list[np.ndarray]) -> None:
        leaves[layer].reshape(-1)[3] = 1

    with expect("I8", None, 0):
        world.step(world.everybody(), device=device)


def test_r013_a_prompt_taken_for_a_decode(world: World) -> None:
    a, _, _ = world.running
    world.step(world.plan([], [(a, 2)]))
    with expect("I9", 1, 1):
        world.step(world.plan([a], []))


def test_r018_segments_that_end_too_soon(world: World) -> None:
    a, b, _ = world.running
    with expect("I9"):
        world.step(world.plan([], [(a, 2), (b, 2)]), layout=changed("cu_seqlens", 1, 1))


def test_r102_nan_in_a_requests_logits(world: World) -> None:
    world.warm()

    def logits(out: np.ndarray) -> None:
        out[1, 4] = np.nan

    with expect("I14", 2, 2):
        world.step(world.everybody(), logits=logits)


@pytest.mark.parametrize("layer", [0, 1])
def test_r102_infinity_in_what_a_request_leaves(world: World, layer: int) -> None:
    a, _, _ = world.warm()
    page = a.pages.pages[a.num_computed // PAGE_SIZE]  # type: ignore[union-attr]

    def device(leaves: list[np.ndarray]) -> None:
        if layer == 0:
            leaves[0][1, 0, 0, 0] = np.inf
        else:
            leaves[1][page, a.num_computed % PAGE_SIZE, 0] = np.inf

    with expect("I14", 1, 1):
        world.step(world.everybody(), device=device)


def test_r102_nan_in_the_logits_of_padding_is_nobodys(world: World) -> None:
    world.warm()

    def logits(out: np.ndarray) -> None:
        out[2] = out[4] = np.nan

    world.step(world.everybody(), logits=logits)


def test_it_is_on_in_tests_and_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_on()
    for value, want in (("0", False), ("", False), ("1", True)):
        monkeypatch.setenv("BAILING_DEBUG", value)
        assert is_on() is want
    monkeypatch.delenv("BAILING_DEBUG")
    assert not is_on()


def test_off_it_touches_nothing(world: World) -> None:
    debug = Debug(None, PAGE_SIZE, on=False)
    state = object()
    assert debug.before(None, None, state, None) is state
    debug.after(None, None)


def test_the_host_part_starts_no_jax() -> None:
    code = (
        "import sys, json; import bailing_jax.engine.debug, bailing_jax.engine.invariants; "
        "print(json.dumps([m for m in sys.modules if m in ('jax', 'jaxlib', 'flax')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_r020_the_engine_calls_it_around_every_step() -> None:
    """A freed slot of a real model holds NaN one step later, and nobody's answer changes."""
    llm = linear_llm()
    first = llm.generate([[1, 2, 3], [4, 5]], greedy(3))
    steps = llm._engine._debug._step
    again = llm.generate([[4, 5], [1, 2, 3]], greedy(3))
    assert llm._engine._debug._step > steps
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in again[::-1]]
    slots = np.asarray(llm._engine._state.layers[0])
    assert np.isnan(slots[1:].reshape(len(slots) - 1, -1)).all(1).any()
