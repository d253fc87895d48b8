"""The choices an engine is started with, checked once; what can't be done is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bailing_jax.config import ModelConfig
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.errors import bad_value
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.layers.parallel import Parallel
from bailing_jax.mesh import MeshShape, auto_mesh, check_devices, check_mesh
from bailing_jax.state import PAGE_SIZE
from pallas_kernels import dispatch
from pallas_kernels.lightning_attention.api import CHUNK_SIZE

DTYPES = ("float32", "bfloat16")
DEFAULT_NUM_SEQS = 8
DEFAULT_MODEL_LEN = 4096
DEFAULT_PREFILL_CHUNK = 512
_OPERATORS = (
    "lightning_prefill",
    "lightning_decode",
    "paged_attention",
    "latent_attention",
    "expert_mlp",
)


@dataclass(frozen=True)
class EngineOptions:
    """Everything but the model itself. None takes the default.

    Attributes:
        dtype: of weights and activations; None: float32 on a CPU, else the checkpoint's (bfloat16
            for a float16 one).
        state_dtype: of the recurrent state.
        rope_dtype: of q and k after RoPE; None: as `dtype`.
        max_num_seqs: sequences that run at once, over all shards of a mesh; rounded up to as many
            in each.
        max_model_len: tokens of one sequence; None: the model's own limit, at most 4096.
        prefill_chunk: prefill tokens a step.
        memory_fraction: the share of memory that may be used.
        mesh: devices along `data`, `expert` and `tensor`; "auto": all there are; None: one, or of
            several processes "auto".
        kernels: "auto" or the name of one implementation of all operators.
        batch_invariant: exact mode: a request's bits depend on nothing but itself.
    """

    dtype: str | None = None
    state_dtype: str = "float32"
    rope_dtype: str | None = None
    max_num_seqs: int = DEFAULT_NUM_SEQS
    max_model_len: int | None = None
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    memory_fraction: float = 0.9
    mesh: Mapping[str, int] | str | None = None
    kernels: str = "auto"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("dtype", "rope_dtype"):
            value = getattr(self, name)
            if value is not None and value not in DTYPES:
                raise bad_value(name, value, ", ".join(DTYPES))
        if self.state_dtype not in DTYPES:
            raise bad_value("state_dtype", self.state_dtype, ", ".join(DTYPES))
        for name in ("max_num_seqs", "max_model_len", "prefill_chunk"):
            value = getattr(self, name)
            if name == "max_model_len" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad_value(name, value, "an integer >= 1")
        if not _is_fraction(self.memory_fraction):
            raise bad_value("memory_fraction", self.memory_fraction, "a number > 0 and <= 1")
        _ = self.mesh_shape
        if not isinstance(self.batch_invariant, bool):
            raise bad_value("batch_invariant", self.batch_invariant, "True, False")
        with_exact = " (with batch_invariant)" * self.batch_invariant
        # A name is for all operators, so all of them must have it.
        first, *rest = (
            dispatch.implementations(operator, exact=self.batch_invariant)
            for operator in _OPERATORS
        )
        names = ("auto", *(name for name in first if all(name in found for found in rest)))
        if self.kernels not in names:
            raise bad_value("kernels", self.kernels, ", ".join(names) + with_exact)
        if self.batch_invariant and max(self.prefill_chunk, CHUNK_SIZE) % min(
            self.prefill_chunk, CHUNK_SIZE
        ):
            # Prompts are cut at multiples of prefill_chunk; chunks of the recurrence must lie on
            # one grid from token 0 whatever the cuts.
            allowed = f"a multiple of {CHUNK_SIZE} or a divisor of it{with_exact}"
            raise bad_value("prefill_chunk", self.prefill_chunk, allowed)

    @property
    def mesh_shape(self) -> MeshShape:
        """The mesh; one device as long as "auto" or None is not resolved.

        Raises:
            UserError: no mesh is written so.
        """
        return MeshShape() if self.mesh == "auto" else MeshShape.parse(self.mesh)

    def resolved(
        self, config: ModelConfig, num_devices: int, num_processes: int = 1
    ) -> EngineOptions:
        """The same with the mesh that "auto" or None comes to, checked against model and devices.

        Args:
            config: the model.
            num_devices: those of all processes.
            num_processes: that run the model together.

        Raises:
            UserError: the mesh does not divide the model, or there are fewer devices.
        """
        is_auto = self.mesh == "auto" or (self.mesh is None and num_processes > 1)
        mesh = auto_mesh(config, num_devices) if is_auto else self.mesh_shape
        check_mesh(config, mesh)
        check_devices(mesh, num_devices)
        return replace(self, mesh=str(mesh))

    def runtime(self, config: ModelConfig, platform: str) -> RuntimeOptions:
        """What the layers need to know."""
        dtype = self.dtype
        if dtype is None:
            # A CPU computes float32 as fast and shows differences of the model, not of rounding.
            wide = platform == "cpu" or config.checkpoint_dtype == "float32"
            dtype = "float32" if wide else "bfloat16"
        return RuntimeOptions(
            dtype=dtype,
            rope_dtype=self.rope_dtype,
            kernels=self.kernels,
            exact=self.batch_invariant,
            parallel=Parallel.of(config, self.mesh_shape, ordered=self.batch_invariant),
        )

    def limits(self, config: ModelConfig) -> EngineLimits:
        """The static sizes of an engine, of each of its shards.

        Raises:
            UserError: max_model_len exceeds what the model was made for.
        """
        length = self.max_model_len or min(config.max_positions, DEFAULT_MODEL_LEN)
        if length > config.max_positions:
            raise bad_value(
                "max_model_len",
                length,
                f"up to {config.max_positions} (max_position_embeddings; hf_overrides changes it)",
                options=("hf_overrides",),
            )
        num_shards = self.mesh_shape.num_shards
        return EngineLimits(
            -(-self.max_num_seqs // num_shards),
            length,
            self.prefill_chunk,
            PAGE_SIZE,
            exact=self.batch_invariant,
            num_shards=num_shards,
        )


def _is_fraction(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= 1
