"""Laws of the slot and page ledgers: one owner each, NULL nobody's, nothing given back twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.pages import PageHandle, PageLedger
from bailing_jax.engine.slots import SlotHandle, SlotLedger

NUM_SLOTS, NUM_PAGES, PAGE_SIZE = 5, 11, 4
OWNERS = st.integers(1, 9)


class Ledgers(RuleBasedStateMachine):
    """Any order of hand-outs and returns by owners that come back under the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.pages = SlotLedger(NUM_SLOTS), PageLedger(NUM_PAGES, PAGE_SIZE)
        self.slot_of: dict[int, SlotHandle] = {}
        self.pages_of: dict[int, PageHandle] = {}
        self.old_slots: list[SlotHandle] = []
        self.old_pages: list[PageHandle] = []

    @rule(owner=OWNERS)
    def take_a_slot(self, owner: int) -> None:
        if owner in self.slot_of or len(self.slot_of) == NUM_SLOTS:
            with pytest.raises(ValueError, match=r"already has a slot|are taken"):
                self.slots.allocate(owner)
            return
        handle = self.slots.allocate(owner)
        assert handle.owner == owner
        assert handle.slot not in {held.slot for held in self.slot_of.values()}
        self.slot_of[owner] = handle

    @rule(owner=OWNERS, num_tokens=st.integers(1, 5 * PAGE_SIZE))
    def take_pages(self, owner: int, num_tokens: int) -> None:
        count = -(-num_tokens // PAGE_SIZE)
        free = NUM_PAGES - sum(len(held.pages) for held in self.pages_of.values())
        if owner in self.pages_of or count > free:
            with pytest.raises(ValueError, match=r"already has pages|pages wanted"):
                self.pages.allocate(owner, num_tokens)
            return
        handle = self.pages.allocate(owner, num_tokens)
        assert handle.owner == owner
        assert len(handle.pages) == count
        assert len(handle.pages) * PAGE_SIZE >= num_tokens
        self.pages_of[owner] = handle

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data())
    def give_a_slot_back(self, data: st.DataObject) -> None:
        handle = self.slot_of.pop(data.draw(st.sampled_from(sorted(self.slot_of))))
        self.slots.free(handle)
        self.old_slots.append(handle)

    @precondition(lambda self: self.pages_of)
    @rule(data=st.data())
    def give_pages_back(self, data: st.DataObject) -> None:
        handle = self.pages_of.pop(data.draw(st.sampled_from(sorted(self.pages_of))))
        self.pages.free(handle)
        self.old_pages.append(handle)

    @precondition(lambda self: self.old_slots)
    @rule(data=st.data())
    def give_a_slot_back_again(self, data: st.DataObject) -> None:
        """Also when the same owner holds the same slot again (R029)."""
        with pytest.raises(ValueError, match="is not held"):
            self.slots.free(data.draw(st.sampled_from(self.old_slots)))

    @precondition(lambda self: self.old_pages)
    @rule(data=st.data())
    def give_pages_back_again(self, data: st.DataObject) -> None:
        with pytest.raises(ValueError, match="is not held"):
            self.pages.free(data.draw(st.sampled_from(self.old_pages)))

    @invariant()
    def free_and_held_make_up_the_pool(self) -> None:
        slots = [held.slot for held in self.slot_of.values()]
        pages = [page for held in self.pages_of.values() for page in held.pages]
        for used, num_free, capacity in (
            (slots, self.slots.num_free, NUM_SLOTS),
            (pages, self.pages.num_free, NUM_PAGES),
        ):
            assert len(set(used)) == len(used)
            assert set(used) <= set(range(1, capacity + 1))
            assert num_free == capacity - len(used)


# 60 runs of up to 40 operations.
Ledgers.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestR023AnyOrderOfHandOutsAndReturns = Ledgers.TestCase


def test_r026_bursts_and_idling_lose_nothing() -> None:
    slots, pages = SlotLedger(NUM_SLOTS), PageLedger(NUM_PAGES, PAGE_SIZE)
    for burst in range(1000):
        held = [(slots.allocate(i), pages.allocate(i, 1 + (burst + i) % 8)) for i in range(5)]
        for slot, page in held[:: 1 if burst % 2 else -1]:
            slots.free(slot)
            pages.free(page)
        assert (slots.num_free, pages.num_free) == (NUM_SLOTS, NUM_PAGES)


def test_r027_handles_hold_plain_integers() -> None:
    """A view into an array could change under its holder."""
    assert type(SlotLedger(3).allocate(1).slot) is int
    assert {type(page) for page in PageLedger(8, 4).allocate(1, 17).pages} == {int}


def test_r029_a_stale_handle_cannot_free_its_owners_next_slot() -> None:
    slots, pages = SlotLedger(1), PageLedger(2, 4)
    slot, page = slots.allocate(7), pages.allocate(7, 8)
    slots.free(slot)
    pages.free(page)
    slot_again, page_again = slots.allocate(7), pages.allocate(7, 8)
    assert (slot_again.slot, page_again.pages) == (slot.slot, page.pages)
    with pytest.raises(ValueError, match="is not held"):
        slots.free(slot)
    with pytest.raises(ValueError, match="is not held"):
        pages.free(page)
    assert (slots.num_free, pages.num_free) == (0, 0)


@pytest.mark.parametrize("num_seqs", [1, 3, 8])
@pytest.mark.parametrize("model_len", [1, 63, 64, 65, 1000])
def test_r030_the_pools_have_room_for_exactly_what_is_handed_out(
    num_seqs: int, model_len: int
) -> None:
    """Every sequence at full length, and one slot and one page more: NULL."""
    limits = EngineLimits(num_seqs, model_len, prefill_chunk=16, page_size=64)
    spec = limits.state_spec("float32", "float32")
    slots, pages = SlotLedger(num_seqs), PageLedger(spec.num_pages - 1, spec.page_size)
    handles = [(slots.allocate(i), pages.allocate(i, model_len)) for i in range(num_seqs)]
    assert max(slot.slot for slot, _ in handles) == spec.num_slots - 1
    assert max(max(page.pages) for _, page in handles) == spec.num_pages - 1
    assert {len(page.pages) for _, page in handles} == {limits.pages_a_sequence}
    with pytest.raises(ValueError, match="taken"):
        slots.allocate(num_seqs)
    with pytest.raises(ValueError, match="wanted"):
        pages.allocate(num_seqs, 1)
