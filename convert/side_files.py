"""The small files that go with the weights: which are copied, and the checks that they are sound.

`side_files(folder, vocab_size)` goes by an allow-list: the tokenizer's files, the generation
config, the chat template, the model card and the licence. All else (remote code, pickles,
sub-folders) is left behind by name and never opened. JSON is read strictly, token ids must have
a row in the model, and tokenizer.json is tried on hostile texts in a child process with limits:
its regular expressions are a download's, and some run for years. Copying is the converter's.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bailing_jax.errors import UserError
from convert.source import CONFIG_NAME, INDEX_NAME, read_small
from convert.strict_json import DOWNLOAD_AGAIN, malformed, parse_json, show

MAX_BYTES = 16 * 2**20
MAX_VOCABULARY_BYTES = 64_000_000  # what bailing_jax.text.tokenizer reads
TIME_LIMIT_S = 10.0  # a real tokenizer of 157,000 tokens needs half a second
MAX_MEMORY_BYTES = 2 * 2**30  # the largest file needs less than one

_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_JSON = (
    "tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "generation_config.json", "chat_template.json",
)  # fmt: skip
_TEXTS = (
    "merges.txt", "chat_template.jinja", "README.md", "LICENSE", "LICENSE.*", "LICENCE*", "NOTICE*",
)  # fmt: skip
# Neither copied nor left behind: the converter reads them, or writes its own.
_CONVERTED = (CONFIG_NAME, INDEX_NAME, "manifest.json", "*.safetensors")

# The closing quote is optional so that a string without one costs one pass, not one per quote.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ESCAPE_OR_BRACKET = re.compile(rb"\\.|[\[\]{}]", re.DOTALL)

# What the child runs, with the file as its input. As in the engine, nothing is cut, padded or
# added. A probe ends in what makes greedy expressions go back; one has every ASCII character.
_PROGRAM = """
import contextlib, json, resource, sys
from tokenizers import Tokenizer

memory, seconds = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
with contextlib.suppress(ValueError, OSError):  # macOS has this limit, but may not set it
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
n = 20000
probes = [
    "a" * n + "!", " " * n + "a", "7" * n + "x", "\\n" * n + "a", "!" * n + "a",
    "a " * (n // 2) + "!", "aB7 .\\n'\\u4e2d" * (n // 8) + "!", "e\\u0301" * (n // 2) + "!",
    "".join(chr(code) * 200 + "\\0" for code in range(32, 127)),
]
try:
    tokenizer = Tokenizer.from_buffer(sys.stdin.buffer.read())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for probe in probes:
        tokenizer.decode(tokenizer.encode(probe, add_special_tokens=False).ids)
    added = tokenizer.get_added_tokens_decoder()
    answer = {"ids": {token.content: token_id for token_id, token in added.items()}}
except BaseException as error:  # a panic of the library is no Exception
    answer = {"error": str(error)[:500] or type(error).__name__}
print(json.dumps(answer))
"""


def side_files(folder: Path, vocab_size: int) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The content of the files to copy, by name, and the names of what is left behind.

    Both are sorted; folders left behind end in "/". Weights, their index, config.json,
    manifest.json and hidden entries are in neither.

    Raises:
        UserError: a file to be copied leaves the folder, is not an ordinary one, is too large,
            damaged or slow, or has token ids other than 0 to vocab_size - 1.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        problem = f"not a readable folder: {error.strerror}"
        raise malformed(folder, problem, "Give the checkpoint's folder.") from error
    copied: dict[str, bytes] = {}
    left: list[str] = []
    for name in names:
        if name.startswith(".") or _matches(name, _CONVERTED):
            continue
        # A name that cannot be printed is no release's, whatever it begins with.
        if name.isprintable() and _matches(name, _JSON + _TEXTS):
            copied[name] = _checked(folder / name, vocab_size)
        else:
            shown = name if name.isprintable() else ascii(name)[1:-1]
            left.append(shown + "/" * os.path.isdir(folder / name))
    return copied, tuple(left)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _checked(path: Path, vocab_size: int) -> bytes:
    """The file's content, which is what was checked: the file may change."""
    limit = MAX_VOCABULARY_BYTES if path.name in _VOCABULARIES else MAX_BYTES
    raw = read_small(path, "the file", limit)
    if path.name not in _JSON:
        return raw
    document = parse_json(_escape_brackets(raw), path, "the file")
    if path.name == "tokenizer.json":
        _check_tokenizer(path, document, raw, vocab_size)
    elif path.name in ("vocab.json", "added_tokens.json"):
        _check_ids(path, "", document, vocab_size, {})
    elif path.name == "generation_config.json":
        _check_generation_config(path, document, vocab_size)
    return raw


def _escape_brackets(raw: bytes) -> bytes:
    """The same JSON with the brackets inside its strings spelt as escapes."""

    # `parse_json` counts all brackets as nesting, and tokens may open hundreds and close none.
    def escape(match: re.Match[bytes]) -> bytes:
        text = match[0]
        if text[:1] == b'"':
            return _ESCAPE_OR_BRACKET.sub(escape, text)
        # An escape stays as it is: a wrong one must stay wrong.
        return text if text[:1] == b"\\" else b"\\u%04x" % ord(text)

    return _JSON_STRING.sub(escape, raw)


def _check_tokenizer(path: Path, document: Mapping[str, Any], raw: bytes, vocab_size: int) -> None:
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not vocab:
        raise malformed(path, "model.vocab must be a non-empty object from token to id")
    added = _added_tokens(path, document.get("added_tokens", []))
    owners: dict[int, str] = {}
    _check_ids(path, "model.vocab ", vocab, vocab_size, owners)
    _check_ids(path, "added_tokens ", added, vocab_size, owners)
    ids = _try_out(path, raw)
    for name, token_id in added.items():
        # The library numbers added tokens itself, whatever the file says.
        if ids.get(name) != token_id:
            problem = f"= {token_id}, but the tokenizers library makes it {ids.get(name)}"
            hint = "Added ids must go on from those of model.vocab, in order. " + DOWNLOAD_AGAIN
            raise malformed(path, f"added_tokens {show(name)} {problem}", hint)


def _added_tokens(path: Path, tokens: object) -> dict[str, Any]:
    if not isinstance(tokens, list):
        raise malformed(path, f"added_tokens must be a list, got {show(tokens)}")
    ids: dict[str, Any] = {}
    for index, token in enumerate(tokens):
        name = token.get("content") if isinstance(token, dict) else None
        if not isinstance(name, str) or not name:
            raise malformed(path, f"added_tokens[{index}] must have a content, got {show(token)}")
        if name in ids:
            raise malformed(path, f"added_tokens[{index}]: {show(name)} appears twice")
        ids[name] = token.get("id")
    return ids


def _check_ids(
    path: Path, field: str, ids: Mapping[str, Any], vocab_size: int, owners: dict[int, str]
) -> None:
    """Check that all are ids of the model, none of them another name's in `owners`; add them."""
    for name, token_id in ids.items():
        if not _is_id(token_id, vocab_size):
            raise _no_id(path, f"{field}{show(name)}", token_id, vocab_size)
        owner = owners.setdefault(token_id, name)
        if owner != name:
            raise malformed(path, f"{field}{show(name)} = {token_id} is the id of {show(owner)}")


def _check_generation_config(path: Path, document: Mapping[str, Any], vocab_size: int) -> None:
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = document.get(field)
        ids = value if isinstance(value, list) and field == "eos_token_id" else [value]
        for token_id in ids:
            if value is not None and not _is_id(token_id, vocab_size):
                raise _no_id(path, field, token_id, vocab_size)


def _is_id(value: object, vocab_size: int) -> bool:
    # `type() is int`: True and 3.0 are no ids, whatever Python says.
    return type(value) is int and 0 <= value < vocab_size


def _no_id(path: Path, field: str, value: object, vocab_size: int) -> UserError:
    problem = f"{field} = {show(value)}; allowed: the model's ids, 0 to {vocab_size - 1}"
    hint = "It and config.json must come from the same release. " + DOWNLOAD_AGAIN
    return malformed(path, problem, hint)


def _try_out(path: Path, raw: bytes) -> dict[str, int]:
    """Let a child load the tokenizer and encode the probes: its ids of the added tokens."""
    hint = "Its rules or regular expressions are broken or hostile. " + DOWNLOAD_AGAIN
    # `-P` keeps the working folder off the path: the child imports from where we do.
    python_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # The child's own limit on its time is for when nobody is left to end it.
    limits = [str(MAX_MEMORY_BYTES), str(math.ceil(TIME_LIMIT_S) + 1)]
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", _PROGRAM, *limits],
            input=raw,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": python_path, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for this process to handle
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        problem = f"takes more than {TIME_LIMIT_S:g} s to encode a few texts"
        raise malformed(path, problem, hint) from error
    if child.returncode:
        raise malformed(path, f"ends the tokenizers library (status {child.returncode})", hint)
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise malformed(path, f"the tokenizers library fails: {show(answer['error'])}", hint)
    return answer["ids"]
