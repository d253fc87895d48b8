"""A conversation in a file: a JSON list of messages, each an object of role and content.

There may be a system message at the beginning; then questions and answers alternate, and the last
question may still be without an answer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from bailing_jax.errors import EXIT_USAGE, UserError

MAX_FILE_BYTES = 64_000_000


def read_messages(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation.

    Raises:
        UserError: the file can't be read or is none; names file, field and value.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _wrong(f"{path}: longer than {MAX_FILE_BYTES} bytes")
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _wrong(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{path}: not JSON: {error}") from error
    if not isinstance(messages, list):
        raise _wrong(f"{path}: {messages!r:.40}; allowed: a list of messages, as /save writes it")
    role = None
    for i, message in enumerate(messages):
        where = f"{path}: messages[{i}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise _wrong(f"{where} = {message!r:.60}; allowed: an object of role and content")
        allowed = {None: ("system", "user"), "user": ("assistant",)}.get(role, ("user",))
        role = message["role"]
        if role not in allowed:
            raise _wrong(f"{where}: role = {role!r:.40}; allowed here: {' or '.join(allowed)}")
        if not isinstance(message["content"], str):
            raise _wrong(f"{where}: content = {message['content']!r:.40}; allowed: a string")
    return messages


def write_messages(path: Path, messages: list[dict[str, str]]) -> None:
    """Write a file that does not exist yet; whole, or not at all.

    Raises:
        UserError: it exists, or can't be written.
    """
    # backslashreplace: a lone surrogate becomes its JSON escape.
    text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        if os.path.lexists(path):
            raise _wrong(f"{path}: exists; it was not overwritten", "Choose another name.")
        try:
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _wrong(f"{path}: cannot be written: {error.strerror}") from error


def _wrong(message: str, hint: str = "") -> UserError:
    return UserError(message, hint, EXIT_USAGE)
