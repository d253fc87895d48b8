"""The mesh: how many devices share a model, and along which axes they divide it.

    data     copies of everything, each with sequences of its own
    expert   sequences of its own too; the routed experts are divided among them
    tensor   one sequence's heads, widths, vocabulary (and what is left to divide of the experts)

A shard is one index of data x expert: a set of devices that work on the same rows, with slots and
pages numbered locally. Plain numbers, checked against a config before any device is asked; no jax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from bailing_jax.config import ModelConfig
from bailing_jax.errors import UserError, bad_value

_FORM = "data=D,expert=E,tensor=T, each an integer >= 1 (1 where left out)"


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, value: Mapping[str, int] | str | None) -> MeshShape:
        """Read an option's value, `data=8,expert=8,tensor=4` or a mapping; None: one device.

        Raises:
            UserError: an unknown or repeated axis, or a size that is no integer >= 1.
        """
        if value is None:
            return cls()
        if not isinstance(value, Mapping | str):
            raise bad_value("mesh", value, _FORM)
        pairs = value.items() if isinstance(value, Mapping) else _pairs(value)
        sizes: dict[str, int] = {}
        known = [field.name for field in fields(cls)]
        for name, size in pairs:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise bad_value("mesh", value, _FORM)
            if name not in known or name in sizes:
                raise bad_value("mesh", value, _FORM)
            sizes[name] = size
        return cls(**sizes)

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.data * self.expert * self.tensor

    @property
    def num_shards(self) -> int:
        """Sets of devices with rows of their own."""
        return self.data * self.expert

    def __str__(self) -> str:
        return f"data={self.data},expert={self.expert},tensor={self.tensor}"


def _pairs(text: str) -> Iterator[tuple[str, object]]:
    for part in text.split(","):
        name, _, size = part.partition("=")
        digits = size.strip()
        yield name.strip(), int(digits) if digits.isascii() and digits.isdigit() else digits


def tensor_axes(config: ModelConfig, mesh: MeshShape) -> tuple[int, int]:
    """How the tensor axis divides the routed experts: by whole experts, then by their width.

    Returns:
        (whole, width), whole * width = tensor: the most whole experts that `expert` leaves to
        divide evenly, the rest divides the width of each.
    """
    for whole in range(mesh.tensor, 0, -1):
        if mesh.tensor % whole == 0 and config.moe.num_experts % (mesh.expert * whole) == 0:
            return whole, mesh.tensor // whole
    return 1, mesh.tensor


def check_mesh(config: ModelConfig, mesh: MeshShape) -> None:
    """Refuse a mesh that does not divide the model.

    Raises:
        UserError: names the axis, what it must divide, and the sizes that would do.
    """
    for axis, what, number, even in _rules(config, mesh):
        size: int = getattr(mesh, axis)
        if even(number, size):
            continue
        allowed = [n for n in range(1, number + 1) if even(number, n)]
        raise UserError(
            f"mesh: {axis}={size} does not divide {what} ({number})",
            f"{axis} can be {', '.join(map(str, allowed))} for this number.",
            2,
            options=("mesh",),
        )


def divides(config: ModelConfig, mesh: MeshShape) -> bool:
    """Whether `check_mesh` has nothing to say."""
    return all(even(number, getattr(mesh, axis)) for axis, _, number, even in _rules(config, mesh))


def _rules(config: ModelConfig, mesh: MeshShape):
    """(axis, what it divides, how many there are, whether a size does)."""

    def even(number: int, size: int) -> bool:
        return number % size == 0

    def even_or_copied(number: int, size: int) -> bool:
        return number % size == 0 or size % number == 0

    moe = config.moe
    yield "expert", "the routed experts (num_experts)", moe.num_experts, even
    if config.lightning is not None:
        heads = config.lightning.num_heads
        yield "tensor", "the heads of lightning attention (num_attention_heads)", heads, even
    softmax = config.gqa or config.mla
    if softmax is not None:
        yield "tensor", "the attention heads (num_attention_heads)", softmax.num_heads, even
    if config.gqa is not None:
        kv_heads = config.gqa.num_kv_heads
        yield "tensor", "the key-value heads (num_key_value_heads)", kv_heads, even_or_copied
    if config.num_dense_layers:
        yield "tensor", "the width of dense layers (intermediate_size)", config.dense_width, even
    if moe.shared_width:
        yield "tensor", "the width of the shared experts", moe.shared_width, even
    yield "tensor", "the vocabulary (vocab_size)", config.vocab_size, even
    _, width = tensor_axes(config, mesh)

    def even_width(number: int, size: int) -> bool:
        rest = size // tensor_axes(config, MeshShape(mesh.data, mesh.expert, size))[0]
        return number % rest == 0

    if width > 1:
        yield "tensor", "the width of the experts", moe.expert_width, even_width


def meshes(config: ModelConfig, num_devices: int) -> tuple[MeshShape, ...]:
    """Every mesh of so many devices that divides the model, few data copies first."""
    found = []
    for data in _divisors(num_devices):
        for expert in _divisors(num_devices // data):
            mesh = MeshShape(data, expert, num_devices // data // expert)
            if divides(config, mesh):
                found.append(mesh)
    return tuple(found)


def auto_mesh(config: ModelConfig, num_devices: int) -> MeshShape:
    """All devices: the largest `tensor` that divides model and devices, copies for the rest."""
    found = (mesh for mesh in meshes(config, num_devices) if mesh.expert == 1)
    return max(found, key=lambda mesh: mesh.tensor)


def check_devices(mesh: MeshShape, available: int) -> None:
    """Refuse a mesh of more devices than there are.

    Raises:
        UserError: with both numbers.
    """
    if mesh.num_devices > available:
        there = "is 1" if available == 1 else f"are {available}"
        raise UserError(
            f"mesh: {mesh} is {mesh.num_devices} devices; there {there}",
            'Give a smaller mesh, or "auto". To try one on a CPU, set XLA_FLAGS='
            f"--xla_force_host_platform_device_count={mesh.num_devices}",
            2,
            options=("mesh",),
        )


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)
