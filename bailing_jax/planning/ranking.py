"""The meshes of a topology, best first, and the smallest slice on which a model fits.

Those that fit come first; among them the order is decode tokens/s with messages and products
taking turns, then time to first token, then fewer devices along `tensor`. Of those that do not
fit, the one that lacks least comes first. Plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.mesh import MeshShape, check_mesh, meshes
from bailing_jax.planning.footprint import Footprint, footprint
from bailing_jax.planning.model import PlannedModel
from bailing_jax.planning.roofline import Roofline, roofline
from bailing_jax.planning.topology import Topology, slices
from bailing_jax.planning.workload import Workload


@dataclass(frozen=True)
class Candidate:
    """A mesh with what it needs and how fast it could be."""

    topology: Topology
    mesh: MeshShape
    footprint: Footprint
    roofline: Roofline
    allowed_bytes: int

    @property
    def fits(self) -> bool:
        """Whether a device has room, every sequence at full length."""
        return self.footprint.total_bytes <= self.allowed_bytes

    @property
    def order(self) -> tuple[object, ...]:
        """Sorts the best first."""
        bounds = self.roofline
        # Of those that don't fit, the one that lacks the least.
        lacking = max(0, self.footprint.total_bytes - self.allowed_bytes)
        return (
            lacking,
            -bounds.decode_in_turns,
            bounds.first_token_seconds,
            self.mesh.tensor,
            self.mesh.data,
        )


def candidate(
    model: PlannedModel, topology: Topology, mesh: MeshShape, load: Workload
) -> Candidate:
    """One mesh of a topology, worked out."""
    return Candidate(
        topology,
        mesh,
        footprint(model, topology.chip, mesh, load),
        roofline(model, topology, mesh, load),
        int(topology.chip.hbm_bytes * load.memory_fraction),
    )


def ranked(model: PlannedModel, topology: Topology, load: Workload) -> tuple[Candidate, ...]:
    """Every mesh of all devices of a topology, the best first.

    Raises:
        UserError: no mesh of so many devices divides the model.
    """
    shapes = meshes(model.config, topology.num_devices)
    found = [candidate(model, topology, mesh, load) for mesh in shapes]
    if not found:
        raise UserError(
            f"topology = {topology.name!r}: no mesh of {topology.num_devices} devices divides the "
            "model",
            "Give another topology.",
            EXIT_USAGE,
            options=("topology",),
        )
    return tuple(sorted(found, key=lambda found: found.order))


def chosen(
    model: PlannedModel, topology: Topology, mesh: str, load: Workload
) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The mesh that is meant ("auto": the best), and all of them, the best first.

    Raises:
        UserError: the mesh does not divide the model or has another number of devices.
    """
    if mesh == "auto":
        every = ranked(model, topology, load)
        return every[0], every
    shape = MeshShape.parse(mesh)
    if shape.num_devices != topology.num_devices:
        raise UserError(
            f"mesh = {mesh!r} has {shape.num_devices} devices, {topology.name} has "
            f"{topology.num_devices}",
            "Give a mesh of that many, or auto.",
            EXIT_USAGE,
            options=("mesh",),
        )
    check_mesh(model.config, shape)
    return candidate(model, topology, shape, load), ranked(model, topology, load)


def smallest_slice(model: PlannedModel, topology: Topology, load: Workload) -> Candidate | None:
    """The best mesh of the smallest slice of the same chips that has room, if any has."""
    for found in slices(topology.chip):
        if meshes(model.config, found.num_devices):
            best = ranked(model, found, load)[0]
            if best.fits:
                return best
    return None


def best_mesh(model: PlannedModel, topology: Topology, load: Workload) -> MeshShape:
    """The mesh to take on these devices when none is named.

    Raises:
        UserError: no mesh of so many devices divides the model.
    """
    return ranked(model, topology, load)[0].mesh
