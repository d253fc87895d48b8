"""What a user chooses about how a model runs, as opposed to what the model is."""

from __future__ import annotations

from dataclasses import dataclass

from bailing_jax.layers.parallel import ONE, Parallel


@dataclass(frozen=True)
class RuntimeOptions:
    """Choices shared by all layers.

    Attributes:
        dtype: of weights and activations: "float32", "bfloat16" or "float16".
        rope_dtype: the dtype RoPE hands q and k on in ("float32" keeps them wide into
            attention); None follows `dtype`.
        kernels: "auto" or the name of one implementation for all operators.
        exact: operators run in their exact form: a row's bits depend on its own sequence and on
            the static sizes of the step, never on who shares it.
        parallel: the devices that share the model.
    """

    dtype: str
    rope_dtype: str | None = None
    kernels: str = "auto"
    exact: bool = False
    parallel: Parallel = ONE

    @property
    def rotated_dtype(self) -> str:
        """The dtype of q and k after RoPE."""
        return self.rope_dtype or self.dtype
