"""What is to be planned for: how many sequences, how long, in which dtypes. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from bailing_jax.config import ModelConfig
from bailing_jax.engine.sizes import MAX_SEGMENTS
from bailing_jax.errors import bad_value
from bailing_jax.mesh import MeshShape

FP8 = "float8_e4m3fn"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, FP8: 1}
DEFAULT_NUM_SEQS = 32
DEFAULT_MODEL_LEN = 8192
DEFAULT_PREFILL_CHUNK = 512
DEFAULT_PROMPT = 1024
PAGE_SIZE = 64  # tokens, as in bailing_jax.state, which imports jax


@dataclass(frozen=True)
class Workload:
    """The load a plan is for.

    Attributes:
        max_num_seqs: sequences that run at once, on all devices together.
        max_model_len: tokens of one sequence, prompt and answer.
        prefill_chunk: prompt tokens a step and shard.
        prompt_tokens: of the prompt whose first token is timed; decode steps are timed with as
            many tokens before them.
        weight_dtype: of matrices.
        state_dtype: of the recurrent state.
        memory_fraction: the share of a device's memory that may be used.
    """

    max_num_seqs: int
    max_model_len: int
    prefill_chunk: int
    prompt_tokens: int
    weight_dtype: str
    state_dtype: str = "float32"
    memory_fraction: float = 0.9

    @property
    def dtype(self) -> str:
        """Of activations, pages and parameters that are no matrices."""
        return "bfloat16" if self.weight_dtype == FP8 else self.weight_dtype

    @property
    def pages_a_sequence(self) -> int:
        """Pages of a sequence at full length."""
        return -(-self.max_model_len // PAGE_SIZE)

    def decode_rows(self, mesh: MeshShape) -> int:
        """Sequences a shard has room for."""
        return -(-self.max_num_seqs // mesh.num_shards)

    def segments(self, mesh: MeshShape) -> int:
        """Prompts that one step of a shard may take in."""
        return min(self.decode_rows(mesh), MAX_SEGMENTS)


def workload(
    config: ModelConfig,
    *,
    max_num_seqs: int = DEFAULT_NUM_SEQS,
    max_model_len: int | None = None,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    prompt_tokens: int | None = None,
    weight_dtype: str | None = None,
    state_dtype: str = "float32",
    memory_fraction: float = 0.9,
) -> Workload:
    """A checked load; None takes the default.

    Raises:
        UserError: a value that can't be, or a length beyond what the model was made for.
    """
    numbers = {"max_num_seqs": max_num_seqs, "prefill_chunk": prefill_chunk}
    numbers |= {} if max_model_len is None else {"max_model_len": max_model_len}
    for name, value in numbers.items():
        if value < 1:
            raise bad_value(name, value, "an integer >= 1")
    if max_model_len is not None and max_model_len > config.max_positions:
        allowed = f"up to {config.max_positions} (max_position_embeddings of the model)"
        raise bad_value("max_model_len", max_model_len, allowed)
    length = max_model_len or min(config.max_positions, DEFAULT_MODEL_LEN)
    # Room for an answer as long as the prompt.
    prompt = min(DEFAULT_PROMPT, max(1, length // 2)) if prompt_tokens is None else prompt_tokens
    if not 1 <= prompt <= length:
        raise bad_value("prompt_tokens", prompt, f"an integer from 1 to {length} (max_model_len)")
    if weight_dtype is None:
        weight_dtype = "float32" if config.checkpoint_dtype == "float32" else "bfloat16"
    if weight_dtype not in ITEM_BYTES:
        raise bad_value("weight_dtype", weight_dtype, ", ".join(ITEM_BYTES))
    if state_dtype not in ("float32", "bfloat16"):
        raise bad_value("state_dtype", state_dtype, "float32, bfloat16")
    if not 0 < memory_fraction <= 1:
        raise bad_value("memory_fraction", memory_fraction, "a number > 0 and <= 1")
    return Workload(
        max_num_seqs, length, prefill_chunk, prompt, weight_dtype, state_dtype, memory_fraction
    )
