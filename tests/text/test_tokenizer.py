"""Laws of the tokenizer: streamed = decoded, ours = the library's, text never becomes control."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import ORDINARY_ADDED_TOKENS, SPECIAL_TOKENS, write_tiny_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from bailing_jax.errors import UserError
from bailing_jax.text import tokenizer as tokenizer_module
from bailing_jax.text.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 320
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL_TOKENS, *ORDINARY_ADDED_TOKENS, "<", "role>", " ", "\n", "the 42"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(path, VOCAB_SIZE)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    loaded = load_tokenizer(folder, VOCAB_SIZE)
    assert loaded is not None
    return loaded


def change(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of tokenizer.json with some of its fields replaced."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (target / "tokenizer.json").write_text(json.dumps({**content, **fields}), encoding="utf-8")
    return target


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, VOCAB_SIZE) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_broken_file_is_a_user_error_naming_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


def test_file_above_the_cap_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="allowed: up to 1000"):
        load_tokenizer(folder, VOCAB_SIZE)


def test_ids_must_have_rows_in_the_model(folder: Path, tokenizer: Tokenizer) -> None:
    largest = tokenizer.token_id("</think>")
    assert largest is not None
    assert load_tokenizer(folder, largest + 1) is not None
    with pytest.raises(UserError, match=f"largest token id is {largest}; .* 0 to {largest - 1}"):
        load_tokenizer(folder, largest)


def test_truncation_and_padding_in_the_file_are_ignored(folder: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding: dict[str, Any] = {"strategy": {"Fixed": 64}, "direction": "Right"}
    padding |= {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    path = change(folder, tmp_path, truncation=truncation, padding=padding)
    loaded = load_tokenizer(path, VOCAB_SIZE)
    assert loaded is not None
    assert len(loaded.encode("1234567")) == 7


def test_nothing_is_added_and_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode("hello 42") == [
        tokenizer.token_id(token) for token in ("hello", "Ġ", "4", "2")
    ]


def test_special_ids_and_token_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == {tokenizer.token_id(name) for name in SPECIAL_TOKENS}
    assert tokenizer.token_id("no such token") is None


def test_special_strings_are_text_unless_allowed(tokenizer: Tokenizer) -> None:
    text = "a<role>b<|role_end|>"
    as_text = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(as_text)
    assert tokenizer.decode(as_text) == text
    as_control = tokenizer.encode(text, allow_special=True)
    assert as_control == [
        tokenizer.token_id(token) for token in ("a", "<role>", "b", "<|role_end|>")
    ]
    assert tokenizer.decode(as_control) == "ab"


def test_turn_markers_listed_as_ordinary_tokens_are_control_tokens(
    folder: Path, tmp_path: Path
) -> None:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    path = change(folder, tmp_path, added_tokens=[{**token, "special": False} for token in added])
    loaded = load_tokenizer(path, VOCAB_SIZE)
    assert loaded is not None
    assert loaded.special_ids == {loaded.token_id(name) for name in SPECIAL_TOKENS}
    assert not loaded.special_ids & set(loaded.encode("<role>SYSTEM</role>"))


def test_lone_surrogate_is_a_user_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


@settings(deadline=None)
@given(text=UNICODE)
def test_text_survives_encode_and_decode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(pieces=PIECES)
def test_allow_special_equals_the_library(
    folder: Path, tokenizer: Tokenizer, pieces: list[str]
) -> None:
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    text = "".join(pieces)
    expected = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, allow_special=True) == expected


@settings(deadline=None)
@given(pieces=PIECES)
def test_stripping_special_tokens_equal_the_library(folder: Path, pieces: list[str]) -> None:
    names = ["<m>", "<n>"]
    libraries = [LibraryTokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2)]
    for library in libraries:
        library.add_special_tokens([AddedToken("<m>", lstrip=True), AddedToken("<n>", rstrip=True)])
    text = "".join(piece + names[len(piece) % 2] for piece in pieces)
    expected = libraries[0].encode(text, add_special_tokens=False).ids
    assert Tokenizer(libraries[1]).encode(text, allow_special=True) == expected


@settings(deadline=None)
@given(pieces=PIECES)
def test_guarded_text_has_no_control_tokens(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces).replace("\ue000", "")
    guarded = tokenizer.guard(text, "\ue000")
    ids = tokenizer.encode_guarded(f"<role>{guarded}</role>", "\ue000")
    assert ids[0] == tokenizer.token_id("<role>")
    assert ids[-1] == tokenizer.token_id("</role>")
    assert ids[1:-1] == tokenizer.encode(text)


def test_names_that_overlap_are_all_guarded(folder: Path) -> None:
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["|ab|", "|ba|"])
    loaded = Tokenizer(library)
    ids = loaded.encode_guarded(loaded.guard("|ab|ba|ab|", "\ue000"), "\ue000")
    assert not loaded.special_ids & set(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=60))
def test_streamed_text_equals_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids)
    assert stream.flush() == ""


@settings(deadline=None)
@given(text=UNICODE)
def test_streamed_characters_are_whole(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    shown = ""
    for token_id in tokenizer.encode(text.replace("\ufffd", "")):
        shown += stream.push(token_id)
        assert "\ufffd" not in shown
    assert shown == text.replace("\ufffd", "")


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The ids of the single-byte tokens, found through characters that contain the bytes."""
    table: dict[int, int] = {}
    for code in (*range(0x800), 0x800, 0x10000):
        raw = chr(code).encode()
        ids = tokenizer.encode(chr(code))
        if len(ids) == len(raw):
            table.update(zip(raw, ids, strict=True))
    return table


@settings(max_examples=300, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from([b"a", b"\x80", b"\xc3", b"\xc3\xa9", b"\xf0\x90", b"\xe0"]),
                  st.integers(1, 24)),
        max_size=6,
    )
)  # fmt: skip
def test_runs_of_invalid_bytes_stream_as_they_decode(
    tokenizer: Tokenizer, byte_ids: dict[int, int], runs: list[tuple[bytes, int]]
) -> None:
    ids = [byte_ids[byte] for data, count in runs for byte in data * count]
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte", "special", "padding"])
def test_streaming_is_linear_in_tokens_without_text(
    tokenizer: Tokenizer, byte_ids: dict[int, int], name: str
) -> None:
    role_end = tokenizer.token_id("<|role_end|>")
    assert role_end is not None
    token_id = {"byte": byte_ids[0x80], "special": role_end, "padding": VOCAB_SIZE - 1}[name]
    stream = tokenizer.stream()
    start = time.monotonic()
    for _ in range(20_000):  # half a minute if the whole run were decoded at every step
        stream.push(token_id)
    assert time.monotonic() - start < 3
