"""The ledger of recurrent slots: who owns which, on the host only.

Slot 0 is NULL and never handed out. A handle names slot, owner and epoch; the epoch grows with
every hand-out, so a stale handle can't free a slot that somebody else has got since.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SlotHandle:
    """The right to use a slot until it is freed."""

    slot: int
    owner: int
    epoch: int


class SlotLedger:
    """Hands out slots 1 to capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity, 0, -1))
        self._held: dict[int, SlotHandle] = {}
        self._epoch = 0

    @property
    def num_free(self) -> int:
        """Slots that can be handed out."""
        return len(self._free)

    def allocate(self, owner: int) -> SlotHandle:
        """A free slot.

        Raises:
            ValueError: none is free, or the owner has one.
        """
        if not self._free:
            raise ValueError(f"all {self.capacity} slots are taken")
        if owner in self._held:
            raise ValueError(f"request {owner} already has a slot")
        self._epoch += 1
        handle = SlotHandle(self._free.pop(), owner, self._epoch)
        self._held[owner] = handle
        return handle

    def free(self, handle: SlotHandle) -> None:
        """Take a slot back.

        Raises:
            ValueError: the handle is not the one in force (freed twice, or stale).
        """
        held = self._held.get(handle.owner)
        if held != handle:
            raise ValueError(f"{handle} is not held; held: {held}")
        del self._held[handle.owner]
        self._free.append(handle.slot)
