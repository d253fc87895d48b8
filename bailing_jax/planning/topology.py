"""A slice of TPUs or a group of GPUs by name, `v6e:8x8` or `h100:8`, and what its links can carry.

Counts are chips. The time of a collective is the bound for the best place its devices could have
in the slice, alone on the links: bytes over the links that such a place uses, and no less than a
hop takes times the hops to the farthest device. No jax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.planning.chips import ALIASES, CHIPS, Chip


@dataclass(frozen=True)
class Topology:
    """Chips of one kind, connected in a shape.

    Attributes:
        chip: the kind.
        shape: chips along each dimension; GPUs have one.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def libtpu_name(self) -> str:
        """As libtpu calls it; "" for GPUs."""
        return f"{self.chip.libtpu_name}:{self.name.partition(':')[2]}" if self.chip.is_tpu else ""

    @property
    def num_chips(self) -> int:
        """Chips in all."""
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """Devices as jax counts them."""
        return self.num_chips * self.chip.devices_a_chip

    @property
    def num_hosts(self) -> int:
        """Machines, each a process."""
        return -(-self.num_chips // self.chip.chips_a_host)

    def exchange_seconds(self, num_bytes: float, devices: int, stride: int = 1) -> float:
        """The least time in which every device of a group sends and gets so many bytes.

        Args:
            num_bytes: that leave each device.
            devices: of the group.
            stride: devices of the mesh axes inside this one, which lie closer together.
        """
        if devices == 1 or num_bytes == 0:
            return 0.0
        chip = self.chip
        if not chip.is_tpu:
            crosses = devices * stride > chip.chips_a_host
            return num_bytes / (chip.host_link_rate if crosses else chip.link_rate)
        # The devices of one chip are neighbours along the innermost axis first.
        on_a_chip = max(1, chip.devices_a_chip // stride)
        sides = _near_equal(-(-devices // on_a_chip), len(self.shape))
        # Along a side of two there is one neighbour, along a longer one there are two.
        links = sum(min(side - 1, 2) for side in sides)
        hops = sum(side // 2 for side in sides)
        if not links:  # the devices of one chip: nothing leaves it
            return 0.0
        return max(num_bytes / (links * chip.link_rate), hops * chip.hop_seconds)


def parse(text: str) -> Topology:
    """Read `v6e:8x8`, `v7x:2x2x4` or `h100:8`.

    Raises:
        UserError: an unknown chip, or a shape that can't be had.
    """
    name, colon, size = text.strip().lower().partition(":")
    chip = CHIPS.get(ALIASES.get(name, name))
    if chip is None:
        raise _refused(text, f"the chips are {', '.join(CHIPS)} (tpu7x is v7x)", "v6e:8x8")
    shape = tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in size.split("x"))
    if not colon or shape not in chip.slices:
        shapes = ", ".join("x".join(map(str, shape)) for shape in chip.slices)
        what = "slices" if chip.is_tpu else "numbers of GPUs (a host has 8)"
        raise _refused(text, f"the {what} of {chip.name} are {shapes}", slices(chip)[1].name)
    return Topology(chip, shape)


def slices(chip: Chip) -> tuple[Topology, ...]:
    """Every topology of a chip, the smallest first."""
    return tuple(Topology(chip, shape) for shape in chip.slices)


def _refused(text: str, allowed: str, example: str) -> UserError:
    return UserError(
        f"topology = {text[:40]!r}; {allowed}",
        f"Give chip:shape, such as {example}; the counts are chips.",
        EXIT_USAGE,
        options=("topology",),
    )


def _near_equal(number: int, sides: int) -> tuple[int, ...]:
    """A number as a product of so many factors, as near to each other as they can be."""
    if sides == 1:
        return (number,)
    first = next(f for f in range(round(number ** (1 / sides)), 0, -1) if number % f == 0)
    return (first, *_near_equal(number // first, sides - 1))
