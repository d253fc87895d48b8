"""The small model that ships with the package: a checkpoint folder like any other.

README.md beside this file is its model card; docs/small_model.md says how it was made.
"""

from __future__ import annotations

from pathlib import Path

from bailing_jax.errors import UserError

NAME = "the shipped small model"


def folder() -> Path:
    """Its checkpoint folder.

    Raises:
        UserError: the installation lacks the weights.
    """
    path = Path(__file__).parent
    if not (path / "model.safetensors.index.json").is_file():
        raise UserError(
            f"{path}: the small model's weights are not installed",
            "Install the package again, or give --model a checkpoint folder.",
        )
    return path
