"""The accelerators the planner knows: what their makers publish, a figure a line with its source.

Rates are peaks that no program reaches: what is worked out from them is a bound. A *device* is what
jax calls one; a tpu7x chip has two, and every figure here is a device's.

Sources: [1] cloud.google.com/tpu/docs, the page of each generation. [2] libtpu 0.0.42: the size in
"exceeds available HBM" when a program asks for more. [3] NVIDIA's data sheets of the H100 and H200
SXM modules, dense rates. [4] `nvidia-smi`, memory.total. [5] jax-ml.github.io/scaling-book, part 3:
"about 1 us a hop" of TPU links. [6] NVIDIA's DGX H100 and H200: a 400 Gb/s adapter a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        name: as in `--topology`.
        libtpu_name: what libtpu calls it; "" for a GPU.
        hbm_bytes: of a device, as far as programs may use it.
        hbm_rate: bytes/s a device.
        bf16_rate: FLOP/s a device, bfloat16 in, float32 out. Weights in fp8 are widened to bfloat16
            before they are multiplied, so this is their rate too.
        link_rate: bytes/s one way over one link of a device.
        links: of a device.
        hop_seconds: the least time a message takes over one link, however small.
        devices_a_chip: what jax counts.
        chips_a_host: of one process.
        slices: shapes that can be had, the smallest first.
        host_link_rate: bytes/s one way out of a device to another host; `link_rate` where links
            go from host to host.
    """

    name: str
    libtpu_name: str
    hbm_bytes: int
    hbm_rate: float
    bf16_rate: float
    link_rate: float
    links: int
    hop_seconds: float
    devices_a_chip: int
    chips_a_host: int
    slices: tuple[tuple[int, ...], ...]
    host_link_rate: float

    @property
    def is_tpu(self) -> bool:
        """Whether its devices lie on a torus."""
        return bool(self.libtpu_name)


_TPU_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # [1]
_TPU_3D = (  # [1]: single slices up to 16x16x16
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8),
    (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16),
)  # fmt: skip
_HOSTS = ((1,), (2,), (4,), (8,), (16,), (32,), (64,))

_V5E = Chip(
    name="v5e",
    libtpu_name="v5e",
    hbm_bytes=int(15.75 * _GIB),  # [2]; 16 GB [1]
    hbm_rate=819e9,  # [1]
    bf16_rate=197e12,  # [1]
    link_rate=50e9,  # [1]: 400 GB/s both ways over four ports
    links=4,  # [1]: ports
    hop_seconds=1e-6,  # [5]
    devices_a_chip=1,
    chips_a_host=4,  # [2]: processes of a described slice
    slices=_TPU_2D,
    host_link_rate=50e9,
)
_V5P = Chip(
    name="v5p",
    libtpu_name="v5p",
    hbm_bytes=int(95.74 * _GIB),  # [2]; 95 GiB [1]
    hbm_rate=2765e9,  # [1]
    bf16_rate=459e12,  # [1]
    link_rate=100e9,  # [1]: 1200 GB/s both ways over six ports
    links=6,  # [1]: a 3D torus
    hop_seconds=1e-6,  # [5]
    devices_a_chip=1,  # [2]: both cores are one device
    chips_a_host=4,  # [1]
    slices=_TPU_3D,
    host_link_rate=100e9,
)
_V6E = Chip(
    name="v6e",
    libtpu_name="v6e",
    hbm_bytes=int(31.25 * _GIB),  # [2]; 32 GB [1]
    hbm_rate=1638e9,  # [1]: 1640 and 1638 GB/s, by page
    bf16_rate=918e12,  # [1]
    link_rate=100e9,  # [1]: 800 GB/s both ways over four ports
    links=4,  # [1]: ports
    hop_seconds=1e-6,  # [5]
    devices_a_chip=1,
    chips_a_host=4,  # [2]
    slices=_TPU_2D,
    host_link_rate=100e9,
)
_TPU7X = Chip(
    name="v7x",
    libtpu_name="tpu7x",
    hbm_bytes=int(94.75 * _GIB),  # [2]: of one of the chip's two devices; 192 GiB a chip [1]
    hbm_rate=7380e9 / 2,  # [1]: a chip
    bf16_rate=2307e12 / 2,  # [1]: a chip
    link_rate=100e9 / 2,  # [1]: 1200 GB/s both ways a chip over six ports, shared by two devices
    links=6,  # [1]: a 3D torus
    hop_seconds=1e-6,  # [5]
    devices_a_chip=2,  # [1], [2]
    chips_a_host=4,  # [1]
    slices=_TPU_3D,
    host_link_rate=100e9 / 2,
)
_H100 = Chip(
    name="h100",
    libtpu_name="",
    hbm_bytes=81559 << 20,  # [4]
    hbm_rate=3350e9,  # [3]
    bf16_rate=989e12,  # [3]
    link_rate=450e9,  # [3]: NVLink, 900 GB/s both ways, through switches
    links=1,
    hop_seconds=0.0,  # not published
    devices_a_chip=1,
    chips_a_host=8,
    slices=_HOSTS,
    host_link_rate=50e9,  # [6]
)
_H200 = Chip(
    name="h200",
    libtpu_name="",
    hbm_bytes=143771 << 20,  # [4]
    hbm_rate=4800e9,  # [3]
    bf16_rate=989e12,  # [3]
    link_rate=450e9,  # [3]
    links=1,
    hop_seconds=0.0,  # not published
    devices_a_chip=1,
    chips_a_host=8,
    slices=_HOSTS,
    host_link_rate=50e9,  # [6]
)

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {chip.name: chip for chip in (_V5E, _V5P, _V6E, _TPU7X, _H100, _H200)}
)
# Other names for them.
ALIASES: Mapping[str, str] = MappingProxyType({"tpu7x": "v7x", "v5litepod": "v5e"})
