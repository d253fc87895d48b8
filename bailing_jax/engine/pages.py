"""The ledger of cache pages: who owns which, on the host only.

Page 0 is NULL and never handed out. A request has as many pages as its tokens need; each time it
grows it gets a new handle, and the one before is stale.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageHandle:
    """The right to use pages, in the order of the sequence, until they are freed."""

    pages: tuple[int, ...]
    owner: int
    epoch: int


class PageLedger:
    """Hands out pages 1 to capacity."""

    def __init__(self, capacity: int, page_size: int) -> None:
        self.capacity = capacity
        self.page_size = page_size
        self._free = list(range(capacity, 0, -1))
        self._held: dict[int, PageHandle] = {}
        self._epoch = 0

    @property
    def num_free(self) -> int:
        """Pages that can be handed out."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, owner: int, num_tokens: int) -> PageHandle:
        """Pages for a sequence of up to num_tokens.

        Raises:
            ValueError: not enough are free, or the owner has pages.
        """
        count = self.pages_for(num_tokens)
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} of {self.capacity} free")
        if owner in self._held:
            raise ValueError(f"request {owner} already has pages")
        self._epoch += 1
        pages = tuple(self._free.pop() for _ in range(count))
        handle = PageHandle(pages, owner, self._epoch)
        self._held[owner] = handle
        return handle

    def grow(self, handle: PageHandle, num_tokens: int) -> PageHandle:
        """The same pages and as many more as a sequence of num_tokens needs; may be none.

        Raises:
            ValueError: not enough are free, or the handle is not the one in force.
        """
        self._check(handle)
        count = self.pages_for(num_tokens) - len(handle.pages)
        if count <= 0:
            return handle
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} of {self.capacity} free")
        self._epoch += 1
        pages = handle.pages + tuple(self._free.pop() for _ in range(count))
        grown = PageHandle(pages, handle.owner, self._epoch)
        self._held[handle.owner] = grown
        return grown

    def free(self, handle: PageHandle) -> None:
        """Take pages back.

        Raises:
            ValueError: the handle is not the one in force (freed twice, or stale).
        """
        self._check(handle)
        del self._held[handle.owner]
        self._free.extend(reversed(handle.pages))

    def _check(self, handle: PageHandle) -> None:
        held = self._held.get(handle.owner)
        if held != handle:
            raise ValueError(f"{handle} is not held; held: {held}")
