"""What a job refuses: nothing ran, nothing is written, and a file of something else is safe."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from job_runs import SHORT, Entry, Prompts, read, refused, run, write_input
from tiny_models import MODEL_LEN, VOCAB_SIZE, is_idle, linear_llm

from bailing_jax.cli import job, job_input, job_output
from bailing_jax.cli.job_output import Output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


# Lines of the input.


IDS = '"prompt_ids": [1, 2]'
HUGE = "9" * 5000

MISTAKES = [
    ("{", "not JSON: Expecting property name"),
    ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15: {"),
    ("prompt: a", "not JSON: Expecting value at column 1: prompt: a"),
    (f"{{{IDS}}} {{{IDS}}}", "not JSON: Extra data"),
    ("\ufeff{}", "not JSON: Unexpected UTF-8 BOM"),
    ("[" * 100_000, "not JSON: nested too deep"),
    (f'{{{IDS}, "seed": {HUGE}}}', "not JSON: Exceeds the limit"),
    (f'{{{IDS}, "top_p": NaN}}', "not JSON: NaN is no number"),
    (f'{{{IDS}, "temperature": Infinity}}', "not JSON: Infinity is no number"),
    (f'{{{IDS}, "seed": 1, "seed": 2}}', "key 'seed' stands twice"),
    ('{"messages": [{"role": "user", "role": "user"}]}', "key 'role' stands twice"),
    ("[1, 2]", "[1, 2] is no JSON object"),
    ('"hello"', "'hello' is no JSON object"),
    ("null", "None is no JSON object"),
    (f'{{{IDS}, "best_of": 2}}', "unknown key 'best_of'"),
    (f'{{{IDS}, "x": 2, "Seed": 1}}', "unknown key 'x', 'Seed'"),
    ("{}", "no prompt; allowed: one of prompt, messages, prompt_ids"),
    ('{"id": 1, "seed": 2}', "no prompt; allowed: one of"),
    (f'{{{IDS}, "prompt": "a"}}', "prompt and prompt_ids; allowed: one of"),
    (f'{{{IDS}, "prompt": null}}', "prompt and prompt_ids; allowed: one of"),
    ('{"prompt": 5}', "prompt = 5; allowed: a string"),
    ('{"prompt": ["a"]}', 'prompt = ["a"]; allowed: a string'),
    ('{"messages": []}', "messages = []; allowed: a list of {role, content} objects"),
    ('{"messages": {"role": "user"}}', 'messages = {"role": "user"}; allowed: a list'),
    ('{"messages": ["hello"]}', 'messages = ["hello"]; allowed: a list'),
    ('{"prompt_ids": []}', "prompt_ids = []; allowed: a list of token ids"),
    ('{"prompt_ids": "1,2"}', 'prompt_ids = "1,2"; allowed: a list of token ids'),
    ('{"prompt_ids": [1, true]}', "prompt_ids = [1, true]; allowed: a list of token ids"),
    ('{"prompt_ids": [1.0]}', "prompt_ids = [1.0]; allowed: a list of token ids"),
    (f'{{{IDS}, "id": null}}', "id = null; allowed: a string or an integer"),
    (f'{{{IDS}, "id": true}}', "id = true; allowed: a string or an integer"),
    (f'{{{IDS}, "id": 1.5}}', "id = 1.5; allowed: a string or an integer"),
    (f'{{{IDS}, "id": ["a"]}}', 'id = ["a"]; allowed: a string or an integer'),
    (f'{{{IDS}, "temperature": "hot"}}', "temperature = 'hot'; allowed: a number"),
    (f'{{{IDS}, "temperature": -1}}', "temperature = -1; allowed: a number >= 0"),
    (f'{{{IDS}, "max_tokens": 0}}', "max_tokens = 0; allowed: an integer from 1"),
    (f'{{{IDS}, "max_tokens": null}}', "max_tokens = None; allowed: an integer from 1"),
    (f'{{{IDS}, "top_k": 1.5}}', "top_k = 1.5; allowed: an integer"),
    (f'{{{IDS}, "top_p": 0}}', "top_p = 0; allowed: a number > 0"),
    (f'{{{IDS}, "n": 65}}', "n = 65; allowed: an integer from 1 to 64"),
    (f'{{{IDS}, "logprobs": 21}}', "logprobs = 21; allowed: an integer from 0 to 20"),
    (f'{{{IDS}, "seed": null}}', "seed = null; allowed: an integer"),
    (f'{{{IDS}, "seed": -1}}', "seed = -1; allowed: an integer"),
    (f'{{{IDS}, "stop": [1]}}', "stop = [1]; allowed: a string"),
    (f'{{{IDS}, "ignore_eos": 1}}', "ignore_eos = 1; allowed: true, false"),
    (f'{{{IDS}, "logit_bias": {{"a": 1}}}}', "logit_bias = {'a': 1}; allowed: token ids"),
    (f'{{{IDS}, "logit_bias": {{"{HUGE}": 1}}}}', "line 3: "),
    (f'{{{IDS}, "temperature": 1{"0" * 400}}}', "line 3: "),
    (f'{{{IDS}, "stop_token_ids": "5"}}', "stop_token_ids"),
    (r'{"prompt": "a\ud800"}', r"""'prompt' = "a\ud800"; not Unicode: lone surrogate '\ud800'"""),
    (r'{"messages": [{"role": "user", "content": "\udfff"}]}', "'messages' = [{"),
    (f'{{{IDS}, "id": "\\uD83D"}}', "'id' = \"\\ud83d\"; not Unicode: lone surrogate"),
    (r'{"prompt": "a", "\ud800": 1}', "not Unicode: lone surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=lambda text: text[:50])
def test_a_bad_line_is_refused_before_the_model_is_loaded(
    source: Path, output: Path, line: str, message: str
) -> None:
    source.write_text(f"{{{IDS}}}\n\n{line}\n{{{IDS}}}\n", encoding="utf-8")
    error = refused(source, output)
    assert error.message.startswith(f"{source}, line 3: ")
    assert message in error.message
    assert "\n" not in error.message
    assert len(error.message) < len(str(source)) + 330
    assert not output.exists()


def test_bytes_that_are_no_utf8_are_refused(source: Path, output: Path) -> None:
    source.write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xe9t\xe9"}\n')
    error = refused(source, output)
    assert error.message == f"{source}, line 2: not UTF-8: byte 0xe9 at column 13"


def test_ids_stand_once(source: Path, output: Path) -> None:
    """A line's number is its id where it names none."""
    a, three = {"id": "a", "prompt": "x"}, {"id": 3, "prompt": "x"}
    error = refused(write_input(source, [a, three, {"prompt": "x"}, a]), output)
    assert error.message.split("\n") == [
        f"{source}, line 3: id = 3; line 2 has the same",
        f"{source}, line 4: id = 'a'; line 1 has the same",
    ]


def test_a_line_without_end_is_not_read_into_memory(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_input, "MAX_LINE_BYTES", 1000)
    source.write_bytes(b"x" * 5000 + b"\n")
    assert refused(source, output).message == f"{source}, line 1: longer than 1000 bytes"
    source.write_bytes(f"{{{IDS}}}".encode().ljust(999) + b"\n")  # 1000 with its end
    run(linear_llm(), source, output)


def test_all_mistakes_are_listed_up_to_twenty(source: Path, output: Path) -> None:
    good, bad = {"prompt": "x"}, {"prompt": "x", "top_p": 3}
    error = refused(write_input(source, [good, {"x": 1, **good}, good, bad, bad]), output)
    told = error.message.split("\n")
    assert [line.partition(": ")[0] for line in told] == [f"{source}, line {n}" for n in (2, 4, 5)]
    assert error.hint == ""  # the first one's would not fit the others
    told = refused(write_input(source, [good, *[bad] * 30]), output).message.split("\n")
    assert [line.partition(": ")[0] for line in told[:20]] == [
        f"{source}, line {n}" for n in range(2, 22)
    ]
    assert told[20:] == ["only the first 20 mistakes are listed"]


def test_a_hint_that_fits_is_kept(source: Path, output: Path) -> None:
    error = refused(write_input(source, [{"prompt": "x", "topp": 1}]), output)
    assert error.hint.startswith("Known: id, prompt, messages, prompt_ids, max_tokens, ")


@pytest.mark.parametrize("text", [b"", b"\n \n"])
def test_a_job_of_nothing_is_a_mistake(source: Path, output: Path, text: bytes) -> None:
    source.write_bytes(text)
    assert refused(source, output).message == f"{source}: no requests"


@pytest.mark.parametrize(
    ("defaults", "message"),
    [({"top_p": 7}, "top_p = 7"), ({"best_of": 1}, "best_of"), ({"seed": None}, "seed = null")],
)
def test_a_bad_flag_is_not_a_mistake_of_every_line(
    source: Path, output: Path, defaults: dict[str, Any], message: str
) -> None:
    error = refused(write_input(source, SHORT), output, **defaults)
    assert message in error.message
    assert "line" not in error.message


LONG = list(range(1, 1 + MODEL_LEN))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt_ids": LONG}, f"prompt_ids: {MODEL_LEN} tokens leave no room for an answer"),
        ({"prompt": "a b c d e " * 40}, "prompt: "),
        ({"prompt_ids": [VOCAB_SIZE]}, f"prompt_ids: token id {VOCAB_SIZE}; allowed: 0 to"),
        ({"prompt_ids": [-1]}, "prompt_ids: token id -1; allowed: 0 to"),
        ({"prompt_ids": [1], "logit_bias": {"999": 1}}, "token id 999; allowed: 0 to"),
        ({"prompt_ids": [1], "stop_token_ids": [400]}, "token id 400; allowed: 0 to"),
        ({"prompt_ids": [1], "stop": ""}, "stop = '', of 0 characters; allowed: "),
        ({"messages": [{"role": "user"}]}, "messages[0]: content is NoneType"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0]: role = 'king'; allowed"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_the_model_cannot_take_is_refused_before_the_first_step(
    source: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: Entry,
    message: str,
) -> None:
    llm = linear_llm()
    monkeypatch.setattr(llm, "step", lambda: pytest.fail("a step ran"))
    write_input(source, [{"prompt_ids": [1]}, entry, {"prompt_ids": [2]}, entry])
    for before in (None, b"", b'{"id": 1, "te'):
        if before is not None:
            output.write_bytes(before)
        error = refused(source, output, lambda: (llm, Prompts(llm)))
        first, second = error.message.split("\n")
        assert first.startswith(f"{source}, line 2: ")
        assert second.startswith(f"{source}, line 4: ")
        assert message in first
        assert message in second
        assert is_idle(llm)
        # `refused` saw that it is as it was: absent, empty, torn.
        assert output.exists() == (before is not None)


def test_text_needs_a_tokenizer(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = linear_llm()
    monkeypatch.setattr(llm, "tokenizer", None)
    entries = [{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]},
               {"prompt_ids": [1], "stop": "x"}]  # fmt: skip
    error = refused(write_input(source, entries), output, lambda: (llm, Prompts(llm, raw=True)))
    assert error.message.count("tokenizer.json") == 3


# What stands in the output already.


ANSWER = '{"id": "é1", "text": "", "token_ids": [3], "finish_reason": "stop", "usage": {}}\n'


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("hello\n", 1, "not JSON"),
        ("hello", 1, "not JSON"),
        (ANSWER + "notes to keep", 2, "not JSON"),
        (ANSWER + "[1]\n", 2, "not an answer"),
        (ANSWER + "\n" + ANSWER, 2, "not JSON"),
        ('{"id": "é1", "te\n' + ANSWER, 1, "not JSON"),
        (ANSWER.replace("é1", "other"), 1, "its id is not in the input"),
        (ANSWER.replace('"é1"', "1"), 1, "its id is not in the input"),
        (ANSWER.replace('"é1"', "true"), 1, "its id is not in the input"),
        (ANSWER.replace('"é1"', '["a"]'), 1, "its id is not in the input"),
        (ANSWER + ANSWER, 2, "its id stands there twice"),
        (ANSWER.replace('"usage": {}', '"usage": 1'), 1, "not an answer"),
        (ANSWER.replace('"text"', '"Text"'), 1, "not an answer"),
        (ANSWER.replace("[3]", "3"), 1, "not an answer"),
        (ANSWER.replace("}}", '}, "more": 1}'), 1, "not an answer"),
        (ANSWER.replace('"id": "é1", ', ""), 1, "not an answer"),
        ('{"id": "é1", "outputs": 3, "usage": {}}\n', 1, "not an answer"),
        ('{"id": "é1", "outputs": [3], "usage": {}}\n', 1, "not an answer"),
        # Somebody's input, given by mistake: its last line must not be cut off.
        ('{"id": "é1", "prompt": "x"}', 1, "not an answer"),
        (ANSWER + '{"id": "é2", "prompt": "x"}\n', 2, "not an answer"),
    ],
    ids=lambda value: str(value)[-50:],
)
def test_a_file_of_something_else_is_neither_cut_nor_appended_to(
    source: Path, output: Path, text: str, line: int, message: str
) -> None:
    output.write_text(text, encoding="utf-8")
    error = refused(write_input(source, SHORT), output)
    start = f"{output}, line {line}: not an output of this job: {message}"
    assert error.message.startswith(start)
    assert output.read_text(encoding="utf-8") == text


def test_two_jobs_do_not_write_one_output(source: Path, output: Path) -> None:
    write_input(source, SHORT)
    with Output(output, lambda _line: None):
        assert output.exists()
        error = refused(source, output)
        assert error.message == f"{output}: another job is writing it"
    assert not output.exists()  # nothing was written
    run(linear_llm(), source, output)
    assert len(read(output)) == len(SHORT)


def test_a_file_removed_by_the_job_before_is_made_anew(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job opens what another, refused at that moment, takes away: it must not write there."""
    opened: list[int] = []

    class Os:
        def __getattr__(self, attribute: str) -> Any:
            return self.opening if attribute == "open" else getattr(os, attribute)

        def opening(self, *args: Any) -> int:
            opened.append(os.open(*args))
            if len(opened) == 1:
                output.unlink()
            return opened[-1]

    monkeypatch.setattr(job_output, "os", Os())
    run(linear_llm(), write_input(source, SHORT), output)
    assert len(opened) == 2
    assert len(read(output)) == len(SHORT)


def test_where_there_are_no_locks_it_says_so(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(job_output.fcntl, "flock", flock)
    said: list[str] = []
    run(linear_llm(), write_input(source, SHORT[:1]), output, say=said.append)
    assert said[0] == f"{output}: cannot be locked here; start no second job on it"


# Paths.


def test_paths_that_cannot_be_are_refused_at_once(
    source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the input is read: it has a mistake, and nobody says so."""
    missing = refused(source, output)
    assert missing.message == f"{source}: no such file"
    source.write_text("{")
    assert "cannot be read: Is a directory" in refused(tmp_path, output).message
    nowhere = tmp_path / "no" / "out.jsonl"
    assert "there is no folder" in refused(source, nowhere).message
    assert "there is no folder" in refused(source, source / "out.jsonl").message
    link = tmp_path / "link"
    link.symlink_to(nowhere)
    assert "there is no folder" in refused(source, link).message
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(job.os, "access", lambda path, _mode: str(path) != str(tmp_path))
    assert refused(source, output).message == f"{output}: no permission to write it"
    monkeypatch.setattr(job.os, "access", lambda path, _mode: str(path) != str(output))
    output.write_text("")
    assert refused(source, output).message == f"{output}: no permission to write it"


def test_what_cannot_be_opened_after_all_is_refused(
    source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(source, SHORT)
    assert refused(source, tmp_path).message == f"{tmp_path}: not a regular file"
    assert refused(source, Path("/dev/null")).message == "/dev/null: not a regular file"

    class Os:
        def __getattr__(self, attribute: str) -> Any:
            return self.opening if attribute == "open" else getattr(os, attribute)

        def opening(self, *_args: Any) -> int:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(job_output, "os", Os())
    assert refused(source, output).message == f"{output}: cannot be written: Permission denied"


def test_input_and_output_are_two_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(source, SHORT)
    text = source.read_bytes()
    soft, hard = tmp_path / "soft", tmp_path / "hard"
    soft.symlink_to(source)
    hard.hardlink_to(source)
    for path in (source, soft, hard):
        assert "both the job's input and its output" in refused(source, path).message
    with source.open("r+") as same:
        monkeypatch.setattr(sys, "stdin", same)
        assert "both the job's input and its output" in refused(None, source).message
        monkeypatch.setattr(sys, "stdout", same)
        assert "both the job's input and its output" in refused(source, None).message
        assert "both the job's input and its output" in refused(None, None).message
    assert source.read_bytes() == text
