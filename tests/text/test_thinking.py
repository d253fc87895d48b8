"""Laws of splitting thinking from answer: no cut matters, and no character is lost or doubled."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bailing_jax.text.thinking import (
    CLOSE,
    OPEN,
    Piece,
    ThinkingSplitter,
    prompt_opens_thinking,
    split,
)

# Tags, their ruins and white space, so that nearly every text comes close to a boundary.
FRAGMENTS = (OPEN, CLOSE, "<", "</", "</thi", "<think", "nk>", "<t", "\n", " ", "\u2003", "a", "é")
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    ends = [*sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def parts(pieces: list[Piece]) -> tuple[str, str]:
    thinking = "".join(piece.text for piece in pieces if piece.is_thinking)
    return thinking, "".join(piece.text for piece in pieces if not piece.is_thinking)


def streamed(pieces: list[str], starts_inside: bool) -> list[Piece]:
    splitter = ThinkingSplitter(starts_inside)
    shown = [piece for text in pieces for piece in splitter.push(text)]
    shown += splitter.flush()
    assert splitter.flush() == []
    return shown


def by_expression(text: str, starts_inside: bool) -> tuple[str, str]:
    """The same rules, said in another way."""
    opening = "()" if starts_inside else rf"(\s*){OPEN}"
    match = re.fullmatch(rf"{opening}(.*?)(?:{CLOSE}\s*(.*))?", text, re.DOTALL)
    return ("", text) if match is None else (match[1] + match[2], match[3] or "")


@given(TEXTS, st.lists(st.integers(0, 100), max_size=12), st.booleans())
def test_no_cut_changes_the_parts(text: str, places: list[int], starts_inside: bool) -> None:
    want = by_expression(text, starts_inside)
    assert split(text, starts_inside) == want
    assert parts(streamed(cut(text, places), starts_inside)) == want
    assert parts(streamed(list(text), starts_inside)) == want


@given(TEXTS, st.booleans())
def test_no_character_is_lost_or_doubled(text: str, starts_inside: bool) -> None:
    """The parts with the tags between them, and blanks after the closing one, are the text."""
    pieces = streamed(list(text), starts_inside)
    kinds = [piece.is_thinking for piece in pieces]
    assert kinds == sorted(kinds, reverse=True)
    thinking, answer = parts(pieces)
    blanks = 0 if starts_inside else len(thinking) - len(thinking.lstrip())
    tag = "" if starts_inside else OPEN
    heads = [thinking[:n] + tag + thinking[n:] for n in range(blanks + 1)]
    tail = "" if not answer and CLOSE not in text else rf"{CLOSE}\s*{re.escape(answer)}"
    thought = any(re.fullmatch(re.escape(head) + tail, text) for head in heads)
    assert thought or (text == answer and not thinking and not starts_inside)


@given(TEXTS, st.booleans())
def test_only_what_may_be_a_tag_is_held_back(text: str, starts_inside: bool) -> None:
    """After every character: what is not shown yet is the beginning of a tag, or a blank start."""
    splitter = ThinkingSplitter(starts_inside)
    shown: list[Piece] = []
    for end, character in enumerate(text, 1):
        shown += splitter.push(character)
        whole = parts(streamed([text[:end]], starts_inside))
        held = "".join(whole).removeprefix("".join(parts(shown)))
        tag = CLOSE if splitter.is_thinking else OPEN
        assert tag.startswith(held.lstrip() if not shown else held)
        assert held != tag


@pytest.mark.parametrize(
    ("text", "starts_inside", "want"),
    [
        ("<think>\nwhy\n</think>\n\nyes", False, ("\nwhy\n", "yes")),
        ("why</think>\n\nyes\n", True, ("why", "yes\n")),
        ("\n <think>why</think>yes", False, ("\n why", "yes")),
        ("why, never closed </thin", True, ("why, never closed </thin", "")),
        ("<think>a</think>b <think>c</think> d", False, ("a", "b <think>c</think> d")),
        ("a</think>b</think> c", True, ("a", "b</think> c")),
        ("<think>a<think>b</think>c", False, ("a<think>b", "c")),
        ("The tag <think> opens, </think> closes", False, ("", "The tag <think> opens, </think> "
                                                           "closes")),
        ("a</think>b", False, ("", "a</think>b")),
        ("<think></think>yes", False, ("", "yes")),
        ("</think> \n\u2003", True, ("", "")),
        ("<thin", False, ("", "<thin")),
        (" \n", False, ("", " \n")),
        ("  yes", False, ("", "  yes")),
        ("<</think>yes", True, ("<", "yes")),
        ("<</</think>yes", True, ("<</", "yes")),
        ("", True, ("", "")),
        ("", False, ("", "")),
    ],
)  # fmt: skip
def test_examples(text: str, starts_inside: bool, want: tuple[str, str]) -> None:
    assert split(text, starts_inside) == want
    assert parts(streamed(list(text), starts_inside)) == want


def test_it_says_whether_it_is_inside() -> None:
    splitter = ThinkingSplitter(starts_inside=False)
    assert not splitter.is_thinking
    assert splitter.push("<think>a") == [Piece("a", True)]
    assert splitter.is_thinking
    assert splitter.push("b</think>") == [Piece("b", True)]
    assert not splitter.is_thinking
    assert splitter.push("\nc<think>") == [Piece("c<think>", False)]
    assert not splitter.is_thinking
    assert ThinkingSplitter(starts_inside=True).is_thinking


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<role>ASSISTANT</role><think>", True),
        ("<role>ASSISTANT</role>\n<think>\n", True),
        ("<think> \t\n\n", True),
        ("<role>ASSISTANT</role>", False),
        ("<think></think>\n", False),
        ("<think>\nwell", False),
        ("think>", False),
        ("", False),
    ],
)
def test_a_prompt_that_ends_with_the_tag_opens_the_thinking(prompt: str, opens: bool) -> None:
    assert prompt_opens_thinking(prompt) is opens
