"""The files whose likelihood is measured: plain text, or JSON lines as training reads them.

A plain text is one document. A line of FILE.jsonl is a document by itself, {"text": ...}, or
{"prompt": ..., "answer": ...} for the chat template: the form a chat model knows. No jax.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bailing_jax.errors import EXIT_USAGE, UserError

MAX_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Texts:
    """What one file holds.

    Attributes:
        name: of the file.
        documents: texts, and (prompt, answer) pairs.
    """

    name: str
    documents: list[str | tuple[str, str]]


def read(path: Path) -> Texts:
    """A file's documents.

    Raises:
        UserError: it can't be read, is empty, too long or not UTF-8, or a line of JSON is wrong.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"--data {path}: longer than {MAX_BYTES} bytes", "Cut it.", EXIT_USAGE)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--data {path}: cannot be read: {error.strerror}", "Check the path.", EXIT_USAGE
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {path}: not UTF-8 (byte {error.start})", "Save it as UTF-8.", EXIT_USAGE
        ) from error
    if not text.strip():
        raise UserError(f"--data {path}: empty", "Give a text.", EXIT_USAGE)
    if path.suffix != ".jsonl":
        return Texts(str(path), [text])
    from bailing_jax.training.samples import read_lines

    return Texts(str(path), read_lines(path, has_chat=True))
