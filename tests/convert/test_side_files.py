"""The files beside the weights: row S17, what is copied, and what is never opened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors_bytes import POINTER
from tiny_tokenizer import write_tiny_tokenizer

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.text.tokenizer import MAX_FILE_BYTES, load_tokenizer
from convert import side_files as module
from convert.side_files import MAX_BYTES, MAX_VOCABULARY_BYTES, side_files
from convert.source import INDEX_NAME

VOCAB_SIZE = 320
TOKENIZER_FILES = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
JSON_FILES = (
    "tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "generation_config.json", "chat_template.json",
)  # fmt: skip
OTHER_FILES = (
    "merges.txt", "chat_template.jinja", "README.md", "LICENSE", "LICENSE.txt", "LICENCE",
    "LICENCE-MODEL", "NOTICE", "NOTICE.txt",
)  # fmt: skip
NO_IDS = [-1, VOCAB_SIZE, 2**70, True, 1.0, "1", None, [1]]


@pytest.fixture
def release(folder: Path) -> Path:
    """A checkpoint folder with the family's tokenizer: ids 0 to 309, added tokens from 303."""
    write_tiny_tokenizer(folder, VOCAB_SIZE)
    return folder


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks are over before a child starts, or none is needed."""

    def run(*_: object, **__: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(subprocess, "run", run)


def refused(folder: Path, *said: str, vocab_size: int = VOCAB_SIZE) -> UserError:
    with pytest.raises(UserError) as caught:
        side_files(folder, vocab_size)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.hint
    for text in said:
        assert text in str(caught.value)
    return caught.value


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """`folder` with its tokenizer.json changed."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return folder


def write_json(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---------------------------------------------------------------- what is copied and what is not


def test_a_sound_folder_is_copied_whole_and_left_as_it_was(release: Path) -> None:
    before = snapshot(release)
    copied, left = side_files(release, VOCAB_SIZE)
    assert copied == {name: (release / name).read_bytes() for name in TOKENIZER_FILES}
    assert left == ()
    assert snapshot(release) == before


def test_every_allowed_file_is_copied(release: Path) -> None:
    write_json(release / "vocab.json", {"a": 0, "b": VOCAB_SIZE - 1})
    write_json(release / "added_tokens.json", {"<role>": 305})
    for name in ("special_tokens_map.json", "chat_template.json"):
        write_json(release / name, {})
    for name in OTHER_FILES:
        (release / name).write_bytes(b"{ \xff")
    copied, left = side_files(release, VOCAB_SIZE)
    assert list(copied) == sorted([*JSON_FILES, *OTHER_FILES])
    assert copied == {name: (release / name).read_bytes() for name in copied}
    assert left == ()


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_child")
def test_all_else_is_left_behind_and_never_opened(folder: Path) -> None:
    for name in ("modeling.py", "pytorch_model.bin", "tokenizer.model", "README.txt", "license"):
        os.mkfifo(folder / name)  # reading would wait for ever
    for name in ("figures", "tokenizer.json.d"):
        (folder / name).mkdir()
        os.mkfifo(folder / name / "tokenizer.json")
    (folder / "elsewhere").symlink_to("/dev/zero")
    (folder / "NOTICE\x1b[2J").touch()
    # Read or written by the converter, or hidden: neither copied nor worth a word.
    for name in ("manifest.json", INDEX_NAME, "a.safetensors", ".gitattributes", ".README.md"):
        os.mkfifo(folder / name)
    (folder / ".cache").mkdir()
    assert side_files(folder, VOCAB_SIZE) == (
        {},
        (
            "NOTICE\\x1b[2J",
            "README.txt",
            "elsewhere",
            "figures/",
            "license",
            "modeling.py",
            "pytorch_model.bin",
            "tokenizer.json.d/",
            "tokenizer.model",
        ),
    )


@pytest.mark.usefixtures("no_child")
def test_without_a_tokenizer_no_child_is_started(release: Path) -> None:
    (release / "tokenizer.json").unlink()
    assert list(side_files(release, VOCAB_SIZE)[0]) == [TOKENIZER_FILES[0], TOKENIZER_FILES[2]]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent: not a readable folder")


# ---------------------------------------------------------------- files


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "README.md"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_s17_only_ordinary_files_are_copied(folder: Path, name: str, kind: str) -> None:
    (os.mkfifo if kind == "pipe" else os.mkdir)(folder / name)
    refused(folder, f"{name}: is not an ordinary file")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja"])
def test_s17_links_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    secret.write_text("{}")
    (folder / name).symlink_to(secret)
    refused(folder, f"{name}: is a link that leaves the model folder", str(secret))
    secret.unlink()
    refused(folder, f"{name}: does not exist or is a broken link")


def test_links_within_the_folder_and_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0123abcd", tmp_path / "blobs"
    (snapshot / "parts").mkdir(parents=True)
    blobs.mkdir()
    write_json(blobs / "c0", {"eos_token_id": 3})
    (snapshot / "parts" / "card").write_text("text")
    (snapshot / "generation_config.json").symlink_to("../../blobs/c0")
    (snapshot / "README.md").symlink_to("parts/card")
    names = ["README.md", "generation_config.json"]
    assert side_files(snapshot, 4) == (
        {name: (snapshot / name).read_bytes() for name in names},
        ("parts/",),
    )
    refused(snapshot, "generation_config.json: eos_token_id = 3", vocab_size=3)


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "LICENSE", "README.md"])
def test_s17_lfs_pointers_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    refused(folder, f"{name}: is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", [*JSON_FILES, *OTHER_FILES])
def test_s17_files_have_a_size_limit(folder: Path, name: str) -> None:
    large = name in ("tokenizer.json", "vocab.json", "merges.txt")
    limit = MAX_VOCABULARY_BYTES if large else MAX_BYTES
    (folder / name).touch()
    os.truncate(folder / name, limit + 1)  # sparse: only its size is large
    refused(folder, f"{name}: the file has {limit + 1} bytes; at most {limit}")


@pytest.mark.parametrize(("name", "limit"), [("merges.txt", 64_000_000), ("NOTICE", 16 * 2**20)])
def test_s17_files_of_the_size_limit_are_copied(folder: Path, name: str, limit: int) -> None:
    (folder / name).touch()
    os.truncate(folder / name, limit)
    assert list(side_files(folder, VOCAB_SIZE)[0]) == [name]


def test_s17_the_tokenizer_limit_is_the_engines() -> None:
    assert MAX_VOCABULARY_BYTES == MAX_FILE_BYTES


# ---------------------------------------------------------------- JSON


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"a": 1, "a": 1}', "'a' appears twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a\\[": 1}', "not valid JSON"),  # a wrong escape
        (b'{"a": ' * 201 + b"1" + b"}" * 201, "nested deeper than 200"),
    ],
)
def test_s17_json_is_strict(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    refused(folder, f"{name}: ", said)


def test_s17_brackets_inside_strings_are_no_nesting(release: Path) -> None:
    brackets = {"[" * n + "{": 302 + n for n in range(1, 25)}
    assert sum(map(len, brackets)) > 200
    write_json(release / "vocab.json", brackets)

    def change(document: dict[str, Any]) -> None:
        document["model"]["vocab"] |= brackets
        for token in document["added_tokens"]:
            token["id"] += len(brackets)

    assert "vocab.json" in side_files(edit(release, change), VOCAB_SIZE + 24)[0]
    write_json(release / "vocab.json", brackets | {"a": 303})
    refused(release, "vocab.json: 'a' = 303 is the id of '[{'", vocab_size=VOCAB_SIZE + 24)


@given(text=st.text(st.sampled_from('"\\[]{}:,a1u ')))
def test_s17_escaped_brackets_change_nothing_else(text: str) -> None:
    def parsed(raw: bytes) -> object:
        try:
            return json.loads(raw)
        except ValueError:
            return ValueError

    for raw in (text.encode(), json.dumps([text, {text: ["]"]}]).encode()):
        assert parsed(module._escape_brackets(raw)) == parsed(raw)


@pytest.mark.timeout(60)
def test_s17_a_string_that_never_ends_costs_no_time(folder: Path) -> None:
    (folder / "vocab.json").write_bytes(b'{"a": "' + b'\\"' * 10**6)
    refused(folder, "vocab.json: the file is not valid JSON")


def test_s17_a_vocabulary_of_the_releases_size_is_read(release: Path) -> None:
    size = 157_000

    def change(document: dict[str, Any]) -> None:
        model, vocab = document["model"], document["model"]["vocab"]
        letters = [name for name in vocab if len(name) == 1]
        assert isinstance(model["merges"][0], list)
        for pieces in product(letters, repeat=3):
            for left, right in (pieces[:2], (pieces[0] + pieces[1], pieces[2])):
                if left + right not in vocab and len(vocab) < size:
                    vocab[left + right] = len(vocab)
                    model["merges"].append([left, right])
            if len(vocab) == size:
                break
        for index, token in enumerate(document["added_tokens"]):
            token["id"] = size + index

    assert list(side_files(edit(release, change), size + 7)[0]) == TOKENIZER_FILES


# ---------------------------------------------------------------- ids


def test_s17_ids_go_up_to_the_vocabulary_size(release: Path) -> None:
    assert list(side_files(release, 310)[0]) == TOKENIZER_FILES
    refused(release, "tokenizer.json: added_tokens '</think>' = 309", "0 to 308", vocab_size=309)
    refused(release, "tokenizer.json: added_tokens ", "the same release", vocab_size=308)
    refused(release, "generation_config.json: eos_token_id = 307", vocab_size=307)


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("bad", NO_IDS, ids=repr)
def test_s17_ids_are_integers_within_the_vocabulary(release: Path, bad: object) -> None:
    said = f"= {bad!r}; allowed: the model's ids, 0 to 319"
    edit(release, lambda document: document["added_tokens"][2].update(id=bad))
    refused(release, f"tokenizer.json: added_tokens '<role>' {said}")
    edit(release, lambda document: document["model"]["vocab"].update(a=bad))
    refused(release, f"tokenizer.json: model.vocab 'a' {said}")


@pytest.mark.usefixtures("no_child")
def test_s17_two_names_share_no_id(release: Path) -> None:
    edit(release, lambda document: document["added_tokens"][1].update(id=303))
    refused(release, "added_tokens '<|endoftext|>' = 303 is the id of '<|startoftext|>'")
    edit(release, lambda document: document["added_tokens"][0].update(id=0))
    refused(release, "added_tokens '<|startoftext|>' = 0 is the id of '!'")
    edit(release, lambda document: document["model"]["vocab"].update(b=0))
    refused(release, "model.vocab 'b' = 0 is the id of '!'")


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("name", ["vocab.json", "added_tokens.json"])
def test_s17_ids_in_the_older_files_are_held_to_the_same(folder: Path, name: str) -> None:
    path = write_json(folder / name, {"one": 0, "two": 319})
    assert side_files(folder, VOCAB_SIZE)[0] == {name: path.read_bytes()}
    for bad in NO_IDS:
        write_json(path, {"good": 1, "bad": bad})
        refused(folder, f"{name}: 'bad' = {bad!r}; allowed: the model's ids, 0 to 319")
    write_json(path, {"one": 1, "two": 2, "three": 1})
    refused(folder, f"{name}: 'three' = 1 is the id of 'one'")


def test_s17_an_added_token_may_repeat_one_of_the_vocabulary(release: Path) -> None:
    token = {"id": 64, "content": "a", "single_word": False, "lstrip": False, "rstrip": False}
    token |= {"normalized": False, "special": True}
    edit(release, lambda document: document["added_tokens"].insert(0, token))
    assert json.loads((release / "tokenizer.json").read_text())["model"]["vocab"]["a"] == 64
    assert list(side_files(release, VOCAB_SIZE)[0]) == TOKENIZER_FILES
    edit(release, lambda document: document["added_tokens"][0].update(id=315))
    refused(release, "added_tokens 'a' = 315, but the tokenizers library makes it 64")


def test_s17_added_tokens_keep_their_ids_in_the_library(release: Path) -> None:
    edit(release, lambda document: document["added_tokens"][-1].update(id=315))
    loaded = load_tokenizer(release, VOCAB_SIZE)
    assert loaded is not None
    assert loaded.token_id("</think>") == 309  # renumbered without a word
    refused(release, "tokenizer.json: added_tokens '</think>' = 315", "library makes it 309")


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({"<role>": 305}, "added_tokens must be a list"),
        (None, "added_tokens must be a list, got None"),
        (["<role>"], "added_tokens[0] must have a content, got '<role>'"),
        ([{"id": 303}], "added_tokens[0] must have a content"),
        ([{"id": 303, "content": 5}], "added_tokens[0] must have a content"),
        ([{"id": 303, "content": ""}], "added_tokens[0] must have a content"),
        ([{"content": "<a>"}], "added_tokens '<a>' = None; allowed"),
        (
            [{"id": 303, "content": "<a>"}, {"id": 304, "content": "<a>", "special": True}],
            "added_tokens[1]: '<a>' appears twice",
        ),
    ],
)
def test_s17_added_tokens_are_distinct(release: Path, tokens: object, said: str) -> None:
    edit(release, lambda document: document.update(added_tokens=tokens))
    refused(release, f"tokenizer.json: {said}")


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("model", [None, [], {}, {"vocab": [["a", 0.0]]}, {"vocab": {}}])
def test_s17_a_tokenizer_has_a_vocabulary(release: Path, model: object) -> None:
    edit(release, lambda document: document.update(model=model))
    refused(release, "tokenizer.json: model.vocab must be a non-empty object")


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("bad", [bad for bad in NO_IDS if bad not in (None, [1])], ids=repr)
def test_s17_generation_ids_are_the_models(folder: Path, field: str, bad: object) -> None:
    path = write_json(folder / "generation_config.json", {field: bad})
    refused(folder, f"generation_config.json: {field} = {bad!r}", "0 to 319")
    write_json(path, {field: [1, bad]})
    refused(folder, f"generation_config.json: {field} = ", repr(bad), "0 to 319")


@pytest.mark.usefixtures("no_child")
def test_s17_only_the_end_may_be_several_ids(folder: Path) -> None:
    path = folder / "generation_config.json"
    for good in ({}, {"eos_token_id": [0, 319], "bos_token_id": None, "pad_token_id": 319}):
        write_json(path, good)
        assert list(side_files(folder, VOCAB_SIZE)[0]) == [path.name]
    for bad in ({"bos_token_id": [1]}, {"pad_token_id": [1]}, {"eos_token_id": [None]}):
        write_json(path, bad)
        refused(folder, f"{path.name}: {next(iter(bad))} = ")


# ---------------------------------------------------------------- the child


def split_by(expression: str) -> dict[str, Any]:
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace_by(expression: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": expression}, "content": ""}


GIVES_UP = r"(?=(\w+\s?)+$)a"  # the library stops after ten million steps back
SLOW = r"(?=(?:a|aa){20}c)\w"  # fewer steps at each of the text's places: minutes in all


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(pre_tokenizer=split_by(GIVES_UP)),
        lambda document: document.update(pre_tokenizer=split_by("(~+)+$")),
        lambda document: document.update(normalizer=replace_by(GIVES_UP)),
        lambda document: document.update(
            decoder={"type": "Sequence", "decoders": [document["decoder"], replace_by(GIVES_UP)]}
        ),
    ],
    ids=["pre_tokenizer", "one_character", "normalizer", "decoder"],
)
def test_s17_expressions_that_blow_up_are_refused(
    release: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    refused(edit(release, change), "tokenizer.json: the tokenizers library fails", "retry-limit")


def test_s17_expressions_that_take_too_long_are_refused(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIME_LIMIT_S", 1.5)
    edit(release, lambda document: document.update(pre_tokenizer=split_by(SLOW)))
    started = time.monotonic()
    refused(release, "tokenizer.json: takes more than 1.5 s to encode", "hostile")
    assert time.monotonic() - started < 10


def test_s17_the_child_ends_itself_when_nobody_waits(release: Path) -> None:
    edit(release, lambda document: document.update(pre_tokenizer=split_by(SLOW)))
    command = [sys.executable, "-c", module._PROGRAM, str(module.MAX_MEMORY_BYTES), "1"]
    with (release / "tokenizer.json").open("rb") as file:
        done = subprocess.run(command, stdin=file, check=False, timeout=60)
    assert done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit a process's memory")
def test_s17_memory_is_limited(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMORY_BYTES", 2**28)
    assert list(side_files(release, VOCAB_SIZE)[0]) == TOKENIZER_FILES
    bomb = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}
    edit(release, lambda document: document.update(normalizer=bomb))
    refused(release, "tokenizer.json: ends the tokenizers library (status -")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document["model"].update(type="Novel"), "ModelUntagged"),
        (lambda document: document.update(pre_tokenizer={"type": "Novel"}), "PreTokenizer"),
        (lambda document: document.update(pre_tokenizer=split_by("(a")), "unmatched parenthesis"),
        (lambda document: document["added_tokens"][0].pop("special"), "missing field"),
        (lambda document: document["model"]["merges"].append(["qq", "q"]), "qq"),
    ],
    ids=["model", "pre_tokenizer", "expression", "added_token", "merges"],
)
def test_s17_what_the_library_says_is_passed_on(
    release: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    refused(edit(release, change), "tokenizer.json: the tokenizers library fails: ", said)


def test_s17_the_tokenizer_is_tried_as_the_engine_uses_it(release: Path) -> None:
    padding: dict[str, Any] = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0}
    padding |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "!"}
    edit(release, lambda document: document.update(padding=padding))
    assert list(side_files(release, VOCAB_SIZE)[0]) == TOKENIZER_FILES
