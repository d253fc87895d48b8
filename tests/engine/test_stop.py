"""Laws of stop handling: what is shown ends before the first stop string, however it was split."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import write_tiny_tokenizer

from bailing_jax.engine.stop import StopMatcher
from bailing_jax.errors import UserError
from bailing_jax.text.tokenizer import Tokenizer, load_tokenizer

EOS, STOP, OTHER = 1, 2, 3

LETTERS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)
SPLITS = st.lists(st.integers(0, 30), max_size=10)


def matcher(
    stops: list[str] | None = None, ignore_eos: bool = False, max_tokens: int = 1000
) -> StopMatcher:
    return StopMatcher(stops or [], {STOP}, ignore_eos, {EOS}, max_tokens)


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the stop string that is complete first begins (the longest of those)."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths)
    return None


def longest_beginning(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


@settings(max_examples=500, deadline=None)
@given(text=LETTERS, stops=STOPS, cuts=SPLITS)
def test_shown_text_ends_before_the_first_stop_string(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stopping = matcher(stops)
    shown, given_so_far, finished = "", "", None
    for piece in split(text, cuts):
        result = stopping.push(OTHER, piece)
        shown += result.text
        given_so_far += piece
        if result.finish_reason:
            finished = result.finish_reason
            break
        # Nothing is held that could already be shown.
        assert shown == given_so_far[: len(given_so_far) - longest_beginning(given_so_far, stops)]
    shown += stopping.flush()
    end = first_stop(text, stops)
    assert shown == text[:end]
    assert finished == (None if end is None else "stop")
    assert stopping.flush() == ""


@settings(deadline=None)
@given(text=LETTERS, stops=STOPS, cuts=SPLITS)
def test_the_budget_ends_with_length_and_shows_what_was_held(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    pieces = split(text, cuts)
    stopping = matcher(stops, max_tokens=len(pieces))
    shown, reason = "", None
    for piece in pieces:
        result = stopping.push(OTHER, piece)
        shown += result.text
        reason = result.finish_reason
        if reason:
            break
    end = first_stop(text, stops)
    assert shown + stopping.flush() == text[:end]
    assert reason == ("length" if end is None else "stop")


@settings(deadline=None)
@given(before=LETTERS, stops=STOPS, end_id=st.sampled_from([EOS, STOP]))
def test_an_end_id_shows_what_was_held_but_not_its_own_text(
    before: str, stops: list[str], end_id: int
) -> None:
    if first_stop(before, stops) is not None:
        return
    stopping = matcher(stops)
    shown = stopping.push(OTHER, before).text
    result = stopping.push(end_id, "the text of the end")
    assert shown + result.text == before
    assert result.finish_reason == "stop"
    assert stopping.flush() == ""


def test_the_string_complete_first_counts_and_of_those_the_longest() -> None:
    assert matcher(["bcd", "c"]).push(OTHER, "abcd").text == "ab"
    assert matcher(["c", "bc"]).push(OTHER, "abcd").text == "a"


def test_ignore_eos_leaves_stop_ids_in_force() -> None:
    stopping = matcher(ignore_eos=True)
    assert stopping.push(EOS, "").finish_reason is None
    assert not stopping.ends_with(EOS)
    assert stopping.ends_with(STOP)
    assert stopping.push(STOP, "").finish_reason == "stop"


def test_stop_comes_before_length_at_the_last_token() -> None:
    assert matcher(max_tokens=1).push(EOS, "").finish_reason == "stop"
    assert matcher(["ab"], max_tokens=1).push(OTHER, "xab").finish_reason == "stop"
    assert matcher(["ab"], max_tokens=1).push(OTHER, "xa").finish_reason == "length"


def test_without_a_tokenizer_ids_and_the_budget_stop() -> None:
    stopping = matcher(max_tokens=3)
    results = [stopping.push(OTHER, None) for _ in range(3)]
    assert [result.text for result in results] == ["", "", ""]
    assert [result.finish_reason for result in results] == [None, None, "length"]
    assert matcher().push(EOS, None).finish_reason == "stop"


def test_text_the_stream_still_held_is_matched_too() -> None:
    stopping = matcher(["b\ufffd"])
    assert stopping.push(OTHER, "ab").text == "a"
    assert stopping.flush("\ufffd") == ""


def test_push_after_the_end_is_a_programming_error() -> None:
    stopping = matcher(max_tokens=1)
    stopping.push(OTHER, "a")
    with pytest.raises(ValueError, match="length"):
        stopping.push(OTHER, "b")


@pytest.mark.parametrize(
    ("stops", "max_tokens", "match"),
    [
        ([""], 1, "of 0 characters; allowed: 1 to 256"),
        (["a" * 257], 1, "of 257 characters"),
        (["a"] * 17, 1, "stop = 17 strings; allowed: up to 16"),
        ([], 0, "max_tokens = 0; allowed: 1 or more"),
    ],
)
def test_limits(stops: list[str], max_tokens: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        matcher(stops, max_tokens=max_tokens)


def test_the_largest_stop_strings_are_allowed() -> None:
    matcher([chr(ord("a") + i) * 256 for i in range(16)])


def test_matching_is_linear_on_the_worst_text() -> None:
    stopping = matcher(["a" * n + "b" for n in range(240, 256)], max_tokens=10**6)
    start = time.monotonic()
    shown = "".join([stopping.push(OTHER, "aaaa").text for _ in range(50_000)])
    assert shown + stopping.flush() == "aaaa" * 50_000
    assert time.monotonic() - start < 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("stop")
    write_tiny_tokenizer(folder)
    loaded = load_tokenizer(folder, 320)
    assert loaded is not None
    return loaded


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 319), max_size=40),
    stops=st.lists(st.text("aethé。\ufffd ", min_size=1, max_size=3), max_size=3),
    max_tokens=st.integers(1, 40),
)
def test_a_streamed_answer_is_the_decoded_one_up_to_its_stop(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], max_tokens: int
) -> None:
    eos = tokenizer.token_id("<|role_end|>")
    assert eos is not None
    stopping = StopMatcher(stops, [], False, [eos], max_tokens)
    stream = tokenizer.stream()
    shown, taken = "", []
    for token_id in ids:
        text = None if stopping.ends_with(token_id) else stream.push(token_id)
        result = stopping.push(token_id, text)
        shown += result.text
        taken.append(token_id)
        if result.finish_reason:
            break
    shown += stopping.flush(stream.flush())
    whole = tokenizer.decode(taken)
    assert shown == whole[: first_stop(whole, stops)]


def test_a_stop_string_split_inside_a_character(tokenizer: Tokenizer) -> None:
    stopping = matcher(["。"])
    stream = tokenizer.stream()
    results = [stopping.push(i + 1000, stream.push(i)) for i in tokenizer.encode("ab。")]
    assert "".join(result.text for result in results) == "ab"
    assert results[-1].finish_reason == "stop"
