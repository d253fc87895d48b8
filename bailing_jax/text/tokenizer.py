"""The checkpoint's tokenizer.json: text to token ids, and token ids back to text as they come.

`load_tokenizer(folder, vocab_size)` -> `Tokenizer`: `encode`, `decode`, `stream`. Nothing is ever
added around a text (this family prepends no bos). A token is a *control token* when the file marks
it special. Text becomes control tokens in one place only, `encode_guarded`, by exact match of
their names; every other stretch goes through the library with special tokens switched off. The
library cuts text at these same places, so ordinary tokenisation does not change. Chat templates
and messages are `chat.py`'s; which ids end an answer is the engine's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bailing_jax.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as LibraryTokenizer

FILE_NAME = "tokenizer.json"
MAX_FILE_BYTES = 64_000_000

# The family's turn markers are control tokens even in a file that lists them as ordinary ones:
# otherwise a message could open a turn of its own.
_TURN_MARKERS = ("<role>", "</role>", "<|role_end|>", "<|startoftext|>", "<|endoftext|>")

# A UTF-8 character has at most 4 bytes, a token at least one.
_MAX_TOKENS_PER_CHARACTER = 4
# White space as the library's regular expressions know it: Python's `\s` has four more.
_BLANK = r"[^\S\x1c-\x1f]"


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in `folder`, or None when it has no tokenizer.json.

    Raises:
        UserError: the file is too large, broken, or has ids the model has no row for.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes; allowed: up to {MAX_FILE_BYTES}",
            exit_code=EXIT_USAGE,
        )
    from tokenizers import Tokenizer as LibraryTokenizer

    try:
        library = LibraryTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(
            f"{path}: not a tokenizer: {error}",
            "Copy the file again from the released checkpoint.",
            EXIT_USAGE,
        ) from error
    largest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise UserError(
            f"{path}: its largest token id is {largest}; the model has ids 0 to {vocab_size - 1}",
            "tokenizer.json and config.json must come from the same checkpoint.",
            EXIT_USAGE,
        )
    return Tokenizer(library)


class Tokenizer:
    """Text to ids and back; safe to share between threads, for nothing changes after loading."""

    def __init__(self, library: LibraryTokenizer) -> None:
        """Take over `library`, changing its settings."""
        # What the file says about training-time batches must not cut or pad a prompt.
        library.no_truncation()
        library.no_padding()
        listed = {token.content for token in library.get_added_tokens_decoder().values()}
        library.add_special_tokens([name for name in _TURN_MARKERS if name in listed])
        library.encode_special_tokens = True  # the library now reads special tokens as text
        self._library = library
        markers = [
            (token_id, token)
            for token_id, token in library.get_added_tokens_decoder().items()
            if token.special
        ]
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, _ in markers)
        # `guard` could not break a name of a single character: such a token is text only.
        markers = [marker for marker in markers if len(marker[1].content) > 1]
        markers.sort(key=lambda marker: -len(marker[1].content))  # the longest name wins
        self._marker_ids = [token_id for token_id, _ in markers]
        self._marker = _pattern([_marker_pattern(token) for _, token in markers], "%s")
        # The lookahead consumes one character, so names that overlap are all found.
        self._marker_start = _pattern([re.escape(t.content) for _, t in markers], "(?=%s)(.)")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`; names of control tokens in it are text unless `allow_special`."""
        return self.encode_guarded(text) if allow_special else self._encode_plain(text)

    def guard(self, text: str, mark: str) -> str:
        """`text` with the name of every control token in it broken by `mark`.

        `mark` is one character that occurs nowhere else in what will be encoded.
        """
        return self._marker_start.sub(lambda match: match[1] + mark, text)

    def encode_guarded(self, text: str, mark: str = "") -> list[int]:
        """The ids of `text`: whole names are control tokens, those that `guard` broke are text."""
        ids: list[int] = []
        end = 0
        for match in self._marker.finditer(text):
            ids += self._encode_plain(text[end : match.start()], mark)
            ids.append(self._marker_ids[(match.lastindex or 0) - 1])
            end = match.end()
        return ids + self._encode_plain(text[end:], mark)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._library.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A new stream that turns one sequence's ids into text as they come."""
        return TextStream(self._library, self.special_ids)

    def token_id(self, text: str) -> int | None:
        """The id of the token written exactly `text`, or None."""
        return self._library.token_to_id(text)

    def _encode_plain(self, text: str, mark: str = "") -> list[int]:
        if mark:
            text = text.replace(mark, "")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid Unicode: it has the lone surrogate {text[error.start]!r}",
                "Decode the input as UTF-8 before passing it on.",
                EXIT_USAGE,
            ) from error
        try:
            return self._library.encode(text, add_special_tokens=False).ids if text else []
        except BaseException as error:
            # The library's panics are no Exception, and their class can't be imported.
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"{FILE_NAME} can't split this text: {error}",
                "Shorten the text, or take the file of the released checkpoint.",
                EXIT_USAGE,
            ) from error


class TextStream:
    """Text of one sequence, id by id: the pieces of `push` and `flush` add up to `decode(ids)`.

    A piece never ends inside a UTF-8 character: its bytes wait for the tokens that complete it.
    """

    def __init__(self, library: LibraryTokenizer, skipped: frozenset[int]) -> None:
        """Start at the beginning of a text; `skipped` ids have none."""
        self._library = library
        self._skipped = skipped
        self._waiting: list[int] = []
        self._restart()

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often that of the token itself; may be empty."""
        # Ids without text (control tokens, padding rows of the vocabulary) must not pile up in
        # the library's stream, which decodes all that waits at every step.
        if token_id in self._skipped or self._library.id_to_token(token_id) is None:
            return ""
        self._waiting.append(token_id)
        text = self._stream.step(self._library, token_id)
        if text is not None:
            self._waiting.clear()
            return text
        if len(self._waiting) % (4 * _MAX_TOKENS_PER_CHARACTER) == 0:
            return self._release()
        return ""

    def flush(self) -> str:
        """The text of what still waits, when no more ids come."""
        text = self._decode(self._waiting)
        self._waiting.clear()
        self._restart()
        return text

    def _release(self) -> str:
        """Text of a run of invalid bytes, which the library would hold (and decode) for ever."""
        whole = self._decode(self._waiting)
        for tail_length in range(1, _MAX_TOKENS_PER_CHARACTER + 1):
            head, tail = self._waiting[:-tail_length], self._waiting[-tail_length:]
            text = self._decode(head)
            # Both halves decode alone as they do together: no character spans the cut.
            if text + self._decode(tail) == whole:
                self._waiting.clear()
                self._restart()
                return text + "".join([self.push(token_id) for token_id in tail])
        return ""

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=True)

    def _restart(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)


def _pattern(alternatives: list[str], form: str) -> re.Pattern[str]:
    return re.compile(form % "|".join(alternatives) if alternatives else "(?!)", re.DOTALL)


def _marker_pattern(token: AddedToken) -> str:
    """One group with the token's name; a stripping token swallows the blanks beside it."""
    # The look-behind keeps the search linear.
    before = f"(?<!{_BLANK}){_BLANK}*" if token.lstrip else ""
    after = f"{_BLANK}*" if token.rstrip else ""
    return f"{before}({re.escape(token.content)}){after}"
