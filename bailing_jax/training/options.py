"""What a training run is: everything that decides its losses, in one frozen record.

A checkpoint stores it, and a run goes on from a checkpoint only with the same record: otherwise
"resumed" would mean "another run".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bailing_jax.errors import bad_value

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class DataShare:
    """A source of samples and its share of the rows and of the loss.

    Attributes:
        name: "word-problems", "problem-runs", "recall", or a JSONL file.
        share: positive; shares are normalised to sum to 1.
    """

    name: str
    share: float


@dataclass(frozen=True)
class TrainOptions:
    """Choices of one run.

    Attributes:
        data: the sources.
        steps: optimizer steps.
        rows: tokens a step, all sources together; split by share.
        accumulate: parts a step is computed in, to save memory; their gradients are summed.
        max_length: longest sample in tokens; longer ones are left out.
        learning_rate: at the end of the warm-up.
        final_learning_rate: at the end of the cosine, as a fraction of `learning_rate`.
        warmup_steps: of the linear warm-up.
        weight_decay: of matrices; norms, biases and embeddings have none.
        beta2: of Adam's second moment.
        clip_norm: largest norm of the gradient.
        prompt_loss: weight of a prompt token's loss; an answer token's is 1.
        bias_rate: step of the routers' selection bias towards even load, in units of score.
        balance_loss: weight of the load balance loss; 0 leaves it out.
        dtype: of the computation; weights and moments are float32.
        remat: compute activations again in the backward pass instead of keeping them.
        seed: of weights and data.
    """

    data: tuple[DataShare, ...]
    steps: int
    rows: int = 16384
    accumulate: int = 1
    max_length: int = 2048
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.02
    warmup_steps: int = 200
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip_norm: float = 1.0
    prompt_loss: float = 0.01
    bias_rate: float = 1e-3
    balance_loss: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: which option, its value, and what is allowed.
        """
        if not self.data:
            raise bad_value("data", [], "at least one source")
        for source in self.data:
            _between(f"share of {source.name}", source.share, 0, float("inf"), low_open=True)
        for name in ("steps", "rows", "accumulate", "max_length"):
            _between(name, getattr(self, name), 1, 2**31)
        if self.rows % self.accumulate:
            raise bad_value("accumulate", self.accumulate, f"a divisor of rows ({self.rows})")
        _between("learning_rate", self.learning_rate, 0, 1, low_open=True)
        for name in ("final_learning_rate", "prompt_loss"):
            _between(name, getattr(self, name), 0, 1)
        _between("warmup_steps", self.warmup_steps, 0, self.steps)
        for name in ("weight_decay", "bias_rate", "balance_loss"):
            _between(name, getattr(self, name), 0, 100)
        _between("beta2", self.beta2, 0, 1, high_open=True)
        _between("clip_norm", self.clip_norm, 0, float("inf"), low_open=True)
        _between("seed", self.seed, 0, 2**63)
        if self.dtype not in DTYPES:
            raise bad_value("dtype", self.dtype, ", ".join(DTYPES))

    def shares(self) -> tuple[DataShare, ...]:
        """The sources with shares that sum to 1."""
        total = sum(source.share for source in self.data)
        return tuple(dataclasses.replace(s, share=s.share / total) for s in self.data)

    def to_json(self) -> dict[str, object]:
        """Plain values, for the record beside a checkpoint."""
        return dataclasses.asdict(self)


def _between(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        sign = ">" if low_open else ">="
        limit = "" if high == float("inf") else f" and {'<' if high_open else '<='} {high:g}"
        raise bad_value(name, value, f"a number {sign} {low:g}{limit}")
