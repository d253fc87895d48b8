"""Ways to spoil a checkpoint folder: each takes the folder and leaves it with one thing wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, pre_tokenizers

Spoil = Callable[[Path], object]


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def config(name: str = "config.json", **changes: object) -> Spoil:
    """Change keys of a JSON file; None takes a key away."""

    def spoil(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return spoil


def half_downloaded(folder: Path) -> None:
    shards = {f"w{i}": f"model-{i}-of-2.safetensors" for i in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    (folder / "model-2-of-2.safetensors.incomplete").write_bytes(b"\0" * 100)


def cut_short(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-1000])


def moved_into(name: str) -> Spoil:
    """The files lie deeper than the folder that is named."""

    def spoil(folder: Path) -> None:
        files = [*folder.iterdir()]
        (folder / name).mkdir(parents=True)
        for file in files:
            file.rename(folder / name / file.name)

    return spoil


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def native_without_manifest(folder: Path) -> None:
    for name in ("embed", "head", "layer-000"):
        shutil.copy(folder / "model.safetensors", folder / f"{name}.safetensors")
    (folder / "model.safetensors").unlink()


def orbax_export(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "orbax").mkdir()
    (folder / "manifest.json").write_text('{"format": "bailing-jax orbax", "version": 1}')


def hostile_tokenizer(folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    tokenizer.save(path)


def foreign_tokenizer(folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([f"word{i}" for i in range(41)])
    tokenizer.save(path)


def template(text: str) -> Spoil:
    return write("chat_template.jinja", text)
