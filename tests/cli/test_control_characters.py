"""What a terminal is shown of other people's text: nothing that it would obey.

Elsewhere than on a terminal the same text arrives byte for byte, and JSON decodes to it.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_chat import FakeLLM, Screen, Talk, turn
from hypothesis import given
from hypothesis import strategies as st
from slow import slow_but
from terminals import Terminal, programs_folder
from tiny_models import linear_llm, write_tiny_model

from bailing_jax.cli.one_shot import _Shown
from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, Interrupted, UserError, run_command
from bailing_jax.generate import main
from bailing_jax.request import StreamPiece
from bailing_jax.terminal import escaped, json_line, shown_on

pytestmark = pytest.mark.unoptimised

CONTROLS = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cc"]
TITLE = "\x1b]0;owned\x07 \x9b31m red\r\b\x00\x7f"
SHOWN = "\\x1b]0;owned\\x07 \\x9b31m red\\x0d\\x08\\x00\\x7f"
TEXTS = st.text(st.one_of(st.sampled_from(CONTROLS), st.characters()))


# The function.


def test_every_control_character_but_tab_and_newline_is_written_out() -> None:
    assert len(CONTROLS) == 65
    for character in CONTROLS:
        want = character if character in "\n\t" else f"\\x{ord(character):02x}"
        assert escaped(character) == want


@given(st.characters(exclude_categories=["Cc"]))
def test_no_other_character_is_touched(character: str) -> None:
    assert escaped(character) == character


@given(TEXTS, st.integers(0, 100))
def test_a_text_may_come_in_any_pieces(text: str, cut: int) -> None:
    assert escaped(text[:cut]) + escaped(text[cut:]) == escaped(text)
    assert "".join(map(escaped, text)) == escaped(text)
    assert escaped(escaped(text)) == escaped(text)


@given(TEXTS)
def test_elsewhere_than_on_a_terminal_nothing_changes(text: str) -> None:
    assert shown_on(io.StringIO(), text) == text
    assert shown_on(None, text) == text
    assert shown_on(Screen(), text) == escaped(text)


@given(TEXTS)
def test_json_has_no_control_character_and_decodes_to_the_text(text: str) -> None:
    line = json_line({"text": text})
    assert not set(line) & set(CONTROLS)
    assert json.loads(line) == {"text": text}


# The commands.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def saying(text: str, **fields: object) -> tuple[str, ...]:
    """Flags that leave the model nothing to say but this one-token text."""
    tokenizer = linear_llm().tokenizer
    assert tokenizer is not None
    (token,) = tokenizer.encode(text)
    fields = {"ignore_eos": True, "logit_bias": {str(token): 1e9}, **fields}
    return "--sampling", json.dumps(fields)


@pytest.mark.parametrize("stream", [io.StringIO, Screen])
@pytest.mark.parametrize("hide_thinking", [False, True])
def test_an_answer_streams_as_its_terminal_may_see_it(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], hide_thinking: bool
) -> None:
    """One letter at a time, so that every sequence is cut everywhere."""
    output = stream()
    monkeypatch.setattr(sys, "stdout", output)
    shown = _Shown(hide_thinking, inside_thinking=False)
    for letter in TITLE:
        shown.push(StreamPiece(letter, 0, None))
    shown.end()
    assert output.getvalue() == (SHOWN if output.isatty() else TITLE) + "\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_chat_shows_escapes_and_remembers_the_text(terminal: bool) -> None:
    llm = FakeLLM([f"<think>why{TITLE}</think>", TITLE], "end")
    talk = Talk(llm, "a", "b", output=Screen() if terminal else io.StringIO())
    if terminal:
        assert talk.out == f"\x1b[2mwhy{SHOWN}\x1b[0m\n{SHOWN}\nend\n"
    else:
        assert talk.out == f"<think>why{TITLE}</think>\n{TITLE}\nend\n"
    assert llm.sent[-1] == turn("a", TITLE, "b")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_message_that_quotes_a_file_does_not_write_raw(tmp_path: Path, terminal: bool) -> None:
    (tmp_path / "in").write_text(TITLE + "\n", newline="")
    screen = Screen() if terminal else io.StringIO()
    args = ["--model", str(tmp_path), "--input", str(tmp_path / "in"), "--output", "-"]
    with contextlib.redirect_stderr(screen):
        main(args)
    assert "not JSON" in screen.getvalue()
    assert ("\\x1b]0;owned" in screen.getvalue()) == terminal
    assert bool(set(screen.getvalue()) & set(CONTROLS) - {"\n"}) == (not terminal)


@pytest.mark.parametrize("terminal", slow_but([True], [False, True]))
def test_several_answers_and_json_are_shown_like_one_stream(
    folder: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    short = ("--model", str(folder), "-p", "hello", "--raw", "-n", "2", "--max-model-len", "96")
    del_twice = saying("\x7f", n=2)

    def shown(*args: str) -> str:
        screen = Screen() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stdout", screen)
        assert main([*short, "--compile-cache", "off", "--quiet", *del_twice, *args]) == EXIT_OK
        return screen.getvalue()

    text = "\\x7f\\x7f" if terminal else "\x7f\x7f"
    assert shown() == f"--- 1 of 2\n{text}\n--- 2 of 2\n{text}\n"
    line = shown("--json")
    assert "\x7f" not in line
    assert [output["text"] for output in json.loads(line)["outputs"]] == ["\x7f\x7f"] * 2


# Ctrl-C.


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("stream", "error", "shown"),
    [
        (Screen, KeyboardInterrupt(), "\ninterrupted\n"),  # the terminal wrote ^C
        (Screen, Interrupted(), "interrupted\n"),  # and somebody has ended that line
        (io.StringIO, KeyboardInterrupt(), "interrupted\n"),
        (io.StringIO, Interrupted(), "interrupted\n"),
    ],
)
def test_interrupted_stands_on_a_line_of_its_own(
    stream: type[io.StringIO], error: BaseException, shown: str
) -> None:
    errors = stream()
    with contextlib.redirect_stderr(errors):
        assert run_command(raising(error)) == 130
    assert errors.getvalue() == shown


def test_a_closed_stderr_takes_nothing_and_nothing_goes_to_stdout_instead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(raising(UserError("wrong", "Right it."))) == EXIT_FAILURE
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().out == ""


# A real terminal.

PROGRAM = """
from bailing_jax.generate import main
sys.exit(main(sys.argv[1:]))
"""


Start = Callable[..., Terminal]


@pytest.fixture
def start(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts the generate command at a terminal."""
    opened: list[Terminal] = []

    def start(*args: object, pipes: tuple[str, ...] = ()) -> Terminal:
        small = ("--model", folder, "--prefill-chunk", 16)
        programs = programs_folder(tmp_path_factory)
        opened.append(Terminal(PROGRAM, *small, *args, folder=programs, pipes=pipes))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.mark.parametrize("pipes", [(), ("out",)])
def test_an_escape_of_the_model_does_not_reach_the_terminal(
    start: Start, pipes: tuple[str, ...]
) -> None:
    short = ("-p", "hello", "--raw", "-n", 3, "--max-model-len", 96)
    terminal = start(*short, *saying("\x1b"), pipes=pipes)
    assert terminal.end() == EXIT_OK
    assert b"\x1b" not in terminal.seen["screen"]
    if pipes:
        assert terminal.seen["out"] == b"\x1b\x1b\x1b\n"
    else:
        assert b"\r\n\\x1b\\x1b\\x1b\r\nprompt " in terminal.seen["screen"]


LONG = (
    *("-n", 90_000, "--max-model-len", 100_000),
    *("--hf-overrides", '{"max_position_embeddings": 200000}'),
)


@pytest.mark.parametrize("pipes", [(), ("out",)])
def test_ctrl_c_in_an_answer_leaves_interrupted_on_its_own_line(
    start: Start, pipes: tuple[str, ...]
) -> None:
    terminal = start(*LONG, *saying("x"), "--prompt-ids", "1,2", pipes=pipes)
    terminal.wait_for("out" if pipes else "screen", "xx")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.seen["screen"].endswith(b"^C\r\ninterrupted\r\n")


def test_ctrl_c_in_a_job_leaves_each_remark_on_its_own_line(start: Start, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"prompt_ids": [1, 2]}\n')
    job = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    terminal = start(*LONG, *saying("x"), *job)
    terminal.wait_for("screen", "compiling 1 decode row")
    terminal.wait_for("screen", "\r\n")
    terminal.type("\x03")
    assert terminal.end() == 130
    left = b"1 of 1 requests are left; the same command goes on"
    assert terminal.seen["screen"].endswith(b"^C\r\n" + left + b"\r\ninterrupted\r\n")
