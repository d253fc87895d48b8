"""What is measured of a file: documents, windows, and the text a chat model gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE
from tiny_tokenizer import write_tiny_tokenizer

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation.texts import Texts, read
from bailing_jax.evaluation.windows import _cut, windows_of, worked_problems
from bailing_jax.tasks.word_problems import word_problem
from bailing_jax.text.chat import ChatTemplate, load_chat_template
from bailing_jax.text.tokenizer import Tokenizer, load_tokenizer

Text = tuple[Tokenizer, ChatTemplate]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    tokenizer, template = load_tokenizer(folder, VOCAB_SIZE), load_chat_template(folder)
    assert tokenizer is not None
    assert template is not None
    return tokenizer, template


@given(st.integers(2, 300), st.integers(2, 50))
def test_every_token_but_the_first_counts_once(num: int, length: int) -> None:
    """But for a rest at the end that fills no window."""
    windows = _cut("x", range(num), length)
    scored = [token for window in windows for token in window.ids[1:]]
    assert scored == list(range(1, 1 + len(scored)))
    assert {len(window.ids) for window in windows} == {min(num, length)}
    assert num - 1 - len(scored) < length - 1 or num < length
    assert all(window.num_scored == len(window.ids) - 1 for window in windows)


def test_a_plain_text_is_one_document_and_control_tokens_in_it_are_text(
    text: Text, tmp_path: Path
) -> None:
    tokenizer, template = text
    path = tmp_path / "a.txt"
    path.write_text("the cat\n\nthe dog <role>\n")
    (window,) = windows_of(read(path), tokenizer, template, 512)
    assert tokenizer.decode(list(window.ids)) == path.read_text()
    assert tokenizer.token_id("<role>") not in window.ids
    assert window.source == str(path)


def test_lines_of_json_are_documents_by_themselves(text: Text, tmp_path: Path) -> None:
    """As the trainer reads them: text as it is, a pair through the chat template."""
    tokenizer, template = text
    path = tmp_path / "a.jsonl"
    lines = [{"text": "the cat and the dog"}, {"prompt": "how?", "answer": "so"}, {"text": "a"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = windows_of(read(path), tokenizer, template, 512)  # one token is no window
    assert list(first.ids) == tokenizer.encode("the cat and the dog")
    asked = template.encode(tokenizer, [{"role": "user", "content": "how?"}])
    assert list(second.ids) == [*asked, *tokenizer.encode("so")]


def test_without_a_file_documents_are_held_out_problems(text: Text) -> None:
    tokenizer, template = text
    texts = worked_problems(4, 2)
    problems = [word_problem(4, index, "test") for index in range(2)]
    assert texts.documents == [(problem.question, problem.answer) for problem in problems]
    windows = windows_of(texts, tokenizer, template, 4096)
    assert [w.ids[-1] for w in windows] == [tokenizer.encode(p.answer)[-1] for p in problems]


MISTAKES: list[tuple[str, bytes | None, str]] = [
    ("a.txt", None, "--data {}: cannot be read: No such file or directory"),
    ("a.txt", b"", "--data {}: empty"),
    ("a.txt", b" \n", "--data {}: empty"),
    ("a.txt", b"a\xff", "--data {}: not UTF-8 (byte 1)"),
    ("a.jsonl", b"{", "{}, line 1: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', '{}, line 2: needs "text", or "prompt" and'),
]


@pytest.mark.parametrize(("name", "raw", "says"), MISTAKES)
def test_a_file_that_is_no_text_is_refused(
    tmp_path: Path, name: str, raw: bytes | None, says: str
) -> None:
    path = tmp_path / name
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(says.replace("{}", str(path)))) as caught:
        read(path)
    assert caught.value.hint
    assert caught.value.exit_code == EXIT_USAGE


def test_a_text_of_one_token_predicts_nothing(text: Text) -> None:
    with pytest.raises(UserError, match="f: a single token"):
        windows_of(Texts("f", ["a"]), *text, 512)


def test_a_pair_needs_a_chat_template(text: Text) -> None:
    with pytest.raises(UserError, match="f: the model has no chat template"):
        windows_of(Texts("f", [("a", "b")]), text[0], None, 512)
