"""Telling an answer's thinking from its text: `<think> ... </think>` and then the answer.

Where the chat template ends the prompt with the opening tag, the answer begins inside. Otherwise
the tag counts only at the very beginning, after white space at most: further on it is text that
speaks about tags. The first closing tag ends the thinking, what follows is plain text, and a
block that is never closed is all thinking. Tags belong to neither part, nor does the white space
after the closing one; white space before the opening one is thinking. No jax.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Piece(NamedTuple):
    """A stretch of text, never empty, and which part of the answer it belongs to."""

    text: str
    is_thinking: bool


class ThinkingSplitter:
    """Splits one answer as it streams: `push` every piece, then `flush` once at the end.

    The parts do not depend on where the text was cut. Held back is only what may be the beginning
    of a tag, and white space at the start of an answer that may yet open its thinking.
    """

    def __init__(self, starts_inside: bool) -> None:
        """`starts_inside`: the prompt ends with the opening tag."""
        self._place: Literal["start", "thinking", "gap", "answer"] = (
            "thinking" if starts_inside else "start"
        )
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends inside the thinking."""
        return self._place == "thinking"

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text` completes."""
        text, self._held = self._held + text, ""
        pieces: list[Piece] = []
        if self._place == "start":
            text = self._start(text, pieces)
        if self._place == "thinking":
            text = self._think(text, pieces)
        if self._place == "gap":
            text = text.lstrip()
            self._place = "answer" if text else "gap"
        if self._place == "answer":
            _add(pieces, text, is_thinking=False)
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back, when no more text comes."""
        pieces: list[Piece] = []
        _add(pieces, self._held, is_thinking=self.is_thinking)
        self._held = ""
        return pieces

    def _start(self, text: str, pieces: list[Piece]) -> str:
        """Decide how the answer begins, if that can be said yet; what is left of `text`."""
        body = text.lstrip()
        if body.startswith(OPEN):
            self._place = "thinking"
            _add(pieces, text[: len(text) - len(body)], is_thinking=True)
            return body.removeprefix(OPEN)
        if OPEN.startswith(body):
            self._held = text
            return ""
        self._place = "answer"
        return text

    def _think(self, text: str, pieces: list[Piece]) -> str:
        """Take thinking up to the closing tag; what is left of `text`."""
        thinking, tag, rest = text.partition(CLOSE)
        if tag:
            self._place = "gap"
        else:
            # The tag has one "<", so only what follows the last one can be its beginning.
            before, bracket, after = text.rpartition("<")
            if CLOSE.startswith(bracket + after):
                thinking, self._held = before, bracket + after
        _add(pieces, thinking, is_thinking=True)
        return rest


def split(text: str, starts_inside: bool) -> tuple[str, str]:
    """The thinking and the answer of a whole text, by the same rules."""
    splitter = ThinkingSplitter(starts_inside)
    pieces = splitter.push(text) + splitter.flush()
    thinking = "".join(piece.text for piece in pieces if piece.is_thinking)
    return thinking, "".join(piece.text for piece in pieces if not piece.is_thinking)


def prompt_opens_thinking(prompt_text: str) -> bool:
    """Whether a rendered prompt ends with the opening tag, so that its answer begins inside."""
    return prompt_text.rstrip().endswith(OPEN)


def _add(pieces: list[Piece], text: str, *, is_thinking: bool) -> None:
    if text:
        pieces.append(Piece(text, is_thinking))
