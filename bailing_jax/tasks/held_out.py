"""Which things belong to the test split: a stable hash decides, the same in every process.

A thing is held out when the 64-bit BLAKE2b of its name is 0 modulo `one_in`, so about one in
`one_in` things is, and no list of them needs to be kept. Also the random numbers of the tasks,
which use only what Python promises never to change: a string seed and `Random.random`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random
from typing import Literal, TypeVar

from bailing_jax.errors import bad_value

Split = Literal["train", "test"]
SPLITS = ("train", "test")
Item = TypeVar("Item")


def is_held_out(name: str, one_in: int) -> bool:
    """Whether the thing of this name belongs to the test split, true for one in `one_in`."""
    digest = blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0


def random_of(task: str, seed: int, split: Split, index: int) -> Callable[[], float]:
    """The uniform random numbers in [0, 1) of one problem.

    Raises:
        UserError: a split of another name, or a seed or index that is negative.
    """
    if split not in SPLITS:
        raise bad_value("split", split, "'train' or 'test'")
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise bad_value(name, value, "0 or greater")
    return Random(f"{task}:{seed}:{split}:{index}").random


def between(low: int, high: int, random: Callable[[], float]) -> int:
    """An integer in low..high, both included."""
    return low + int(random() * (high - low + 1))


def pick(items: Sequence[Item], random: Callable[[], float]) -> Item:
    """One of the items."""
    return items[int(random() * len(items))]


def pick_distinct(items: Sequence[Item], count: int, random: Callable[[], float]) -> list[Item]:
    """`count` of the items, each at most once, in random order."""
    left = list(items)
    for i in range(count):
        j = i + int(random() * (len(left) - i))
        left[i], left[j] = left[j], left[i]
    return left[:count]
