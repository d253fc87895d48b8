"""A tiny model to train and short data for it."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import LATENT, write_tiny_model

from bailing_jax.config import ModelConfig
from bailing_jax.training.options import DataShare, TrainOptions
from bailing_jax.training.run import Origin
from bailing_jax.training.start import read_weights


def write_data(folder: Path) -> Path:
    """Lines of both kinds, short; a long text among them."""
    lines: list[dict[str, str]] = [
        {"prompt": f"{n} and {n + 1}?", "answer": f"{2 * n + 1}"} for n in range(20)
    ]
    lines += [{"text": f"one, {n}, two, {n * n}"} for n in range(20)]
    lines.append({"text": "the cat and the dog " * 40})
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_origin(folder: Path, *, weights: bool = False) -> Origin:
    """The latent model of the other tests, from scratch unless `weights`."""
    folder.mkdir(exist_ok=True)
    write_tiny_model(folder, LATENT)
    config = ModelConfig.from_hf(LATENT)
    return Origin(folder, LATENT, config, read_weights(folder, config) if weights else None)


def tiny_options(path: Path | str, /, **changed: object) -> TrainOptions:
    """A few small steps on the lines of `write_data`."""
    fields: dict[str, object] = {
        "data": (DataShare(str(path), 1),),
        "steps": 6,
        "rows": 256,
        "max_length": 96,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "prompt_loss": 0.1,
    }
    return TrainOptions(**{**fields, **changed})  # type: ignore[arg-type]
