"""--chat, with a fake model: what is sent, what is shown where, and what each command does."""

from __future__ import annotations

import contextlib
import io
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from fake_chat import FakeLLM, Screen, Talk, turn
from tiny_models import greedy

from bailing_jax import SamplingParams
from bailing_jax.cli.chat_loop import HELP, run_chat
from bailing_jax.errors import EXIT_OK, EXIT_USAGE, UserError

# Turns.


def test_every_question_is_sent_with_all_that_was_said() -> None:
    llm = FakeLLM("one", "two\n", "")
    args = {"thinking": "off"}
    talk = Talk(llm, "a", " b ", "c", system="S", template_args=args)
    history = ["a", "one", " b ", "two\n", "c"]
    system = [("system", "S")]
    assert llm.sent[1:] == [system + turn(*history[:n]) for n in (1, 3, 5)]
    assert llm.template_args == [args] * 4
    assert llm.params == [greedy()] * 3
    assert (talk.code, talk.out) == (EXIT_OK, "one\ntwo\n\n\n")
    assert talk.err == "> > > > \n"


def test_what_is_wrong_with_the_model_is_said_before_the_first_question() -> None:
    llm = FakeLLM()
    llm.refusals[0] = UserError("has no chat template", "", EXIT_USAGE)
    with pytest.raises(UserError, match="has no chat template"):
        Talk(llm, "a", system="S")
    assert llm.sent == [[("system", "S"), ("user", "hello")]]
    with pytest.raises(UserError, match="n = 2; a chat gives one answer"):
        Talk(FakeLLM(), "a", params=SamplingParams(n=2))


def test_a_pipe_gets_no_prompts_and_no_greeting() -> None:
    talk = Talk(FakeLLM("one", "two"), "a", "", "   ", "b", terminal=False)
    assert (talk.code, talk.out, talk.err) == (EXIT_OK, "one\ntwo\n", "")
    assert [line.split(",")[0] for line in talk.said] == ["prompt 1 tokens", "prompt 5 tokens"]
    assert Talk(FakeLLM()).said == ["/help lists the commands, Ctrl-D leaves"]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (['"""', "  one", "", '/two\\"""', '"""'], '  one\n\n/two\\"""'),
        ([' """ ', "/help", '  """'], "/help"),
        (['"""', "//", '"""'], "//"),
        (['"""one'], '"""one'),
        (["//help"], "/help"),
        (["//"], "/"),
        (["see https://x//y"], "see https://x//y"),
        ([" /help"], " /help"),
        (["one\\", "/help"], "one\n/help"),
    ],
)
def test_texts_of_several_lines_and_with_slashes(typed: list[str], text: str) -> None:
    llm = FakeLLM("one")
    assert Talk(llm, *typed, terminal=False).out == "one\n"
    assert llm.sent[1:] == [turn(text)]
    again = Talk(FakeLLM("one"), *typed)
    assert again.err == "> " + "... " * (len(typed) - 1) + "> \n"


def test_empty_texts_are_no_turns() -> None:
    llm = FakeLLM()
    assert Talk(llm, "", '"""', '"""', '"""', " ", '"""', "\\", "", terminal=False).out == ""
    assert len(llm.sent) == 1


def test_the_figures_follow_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 0.5)
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr("bailing_jax.cli.chat_reply.time", clock)
    llm = FakeLLM("12345", "6", "7", limit=40)
    llm.finish_reason = "length"
    talk = Talk(llm, "abc", "/stats", "d", "/stats", "e")
    _greeting, first, hidden, shown, third = talk.said
    used = "cut off by the limit, context used 8 of 40"
    assert first == f"prompt 3 tokens, answer 5 tokens at 2.0/s, {used}"
    assert (hidden, shown) == ("figures are not shown", "figures are shown")
    # One token has no rate.
    used = "prompt 11 tokens, answer 1 tokens, cut off by the limit, context used 12 of 40"
    assert third == used
    assert talk.out == "12345\n6\n7\n"


# Commands.


def test_help_names_every_command() -> None:
    talk = Talk(FakeLLM(), "/help", "/exit", "never sent")
    assert talk.err == f"> {HELP}\n> "
    assert talk.code == EXIT_OK
    names = ["/help", "/retry", "/undo", "/reset", "/system TEXT", "/save FILE", "/load FILE"]
    for name in [*names, "/stats", "/exit", "/quit", "Ctrl-D", "Ctrl-C", "backslash", "quotes"]:
        assert name in HELP
    assert max(len(line) for line in HELP.splitlines()) <= 100


@pytest.mark.parametrize("word", ["/exit", "/quit", "/exit  "])
@pytest.mark.parametrize("terminal", [False, True])
def test_exit_leaves_at_once(word: str, terminal: bool) -> None:
    llm = FakeLLM("one")
    talk = Talk(llm, "a", word, "never sent", terminal=terminal)
    assert (talk.code, talk.out, len(llm.sent)) == (EXIT_OK, "one\n", 2)


MISTAKES = (
    ("/nope", "unknown command /nope; /help lists them"),
    ("/", "unknown command /; /help"),
    ("/Help", "unknown command /Help;"),
    ("/home/me/file is lost", "unknown command /home/me/file;"),
    ("/" + "x" * 5000, "unknown command /xxx"),
    ("/reset now", "/reset takes nothing after it, not 'now'"),
    ("/exit now", "/exit takes nothing after it, not 'now'"),
    ("/undo", "/undo: there is no exchange to forget"),
    ("/retry", "/retry: there is no question yet"),
    ("/save", "/save: no file named"),
    ("/load  ", "/load: no file named"),
    ("/load /nowhere/at/all", "/nowhere/at/all: cannot be read: No such file or directory"),
    ("/load /", "/: cannot be read: Is a directory"),
    ("/save /nowhere/at/all", "/nowhere/at/all: cannot be written: No such file or directory"),
    ("/save /", "/: exists; it was not overwritten"),
    ("/save .", ".: exists; it was not overwritten"),
)


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[m[0][:20] for m in MISTAKES])
def test_a_mistake_is_shown_on_a_terminal_and_ends_a_pipe(line: str, message: str) -> None:
    llm = FakeLLM("one")
    talk = Talk(llm, line, "a")
    assert (talk.code, talk.out, llm.sent[1:]) == (EXIT_OK, "one\n", [turn("a")])
    (error,) = talk.errors
    assert error.startswith(message)
    assert len(error) < 200
    with pytest.raises(UserError) as caught:
        Talk(FakeLLM(), line, "a", terminal=False)
    assert caught.value.message == error
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (['"""', "one"], "the input ended before the closing line of three double quotes"),
        (["one\\"], "the input ended before the line after a backslash"),
    ],
)
def test_a_text_must_end(typed: list[str], message: str) -> None:
    """On a terminal Ctrl-D within a text drops it, and one more leaves."""
    llm = FakeLLM()
    talk = Talk(llm, *typed)
    assert (talk.code, talk.errors, len(llm.sent)) == (EXIT_OK, [message], 1)
    with pytest.raises(UserError, match=message):
        Talk(FakeLLM(), *typed, terminal=False)


def test_input_that_is_not_utf_8_is_an_error() -> None:
    errors = io.StringIO()
    source = io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8")
    llm: Any = FakeLLM()
    with contextlib.redirect_stderr(errors), pytest.raises(UserError, match="not UTF-8"):
        run_chat(llm, greedy(), say=print, source=source, output=io.StringIO())


def test_a_refused_question_waits_for_retry() -> None:
    """The template's or the engine's error is shown with its hint; nothing is forgotten."""
    llm = FakeLLM("one", "two", "three")
    llm.refusals = {2: UserError("no", "Say yes."), 3: UserError("never")}
    talk = Talk(llm, "a", "b", "/retry", "/retry", "c")
    assert "error: no\n  Say yes.\n" in talk.err
    assert "error: never\n>" in talk.err
    assert llm.sent[2:] == [turn("a", "one", "b")] * 3 + [turn("a", "one", "b", "two", "c")]
    assert talk.out == "one\ntwo\nthree\n"


def test_a_question_the_engine_refuses_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("bad", "", EXIT_USAGE)

    monkeypatch.setattr(FakeLLM, "prepare", refuse)
    talk = Talk(FakeLLM(), "a")
    assert (talk.out, talk.errors) == ("", ["bad"])


def test_undo_and_reset_forget() -> None:
    llm = FakeLLM(*"123456")
    talk = Talk(llm, "a", "b", "/undo", "c", "/reset", "d", "/undo", "e", system="S")
    system = [("system", "S")]
    want = [["a"], ["a", "1", "b"], ["a", "1", "c"], ["d"], ["e"]]
    assert llm.sent[1:] == [system + turn(*texts) for texts in want]
    assert [line for line in talk.said if "forgotten" in line] == [
        "forgotten; exchanges left: 1",
        "2 exchanges forgotten",
        "forgotten; exchanges left: 0",
    ]


def test_system_replaces_and_removes() -> None:
    llm = FakeLLM(*"1234")
    talk = Talk(llm, "a", "/system be\\", "brief ", "/retry", "/system", "/retry", system="S")
    assert [sent[0] for sent in llm.sent[1:]] == [
        ("system", "S"),
        ("system", "be\nbrief"),
        ("user", "a"),
    ]
    assert "system message set; it was: 'S'" in talk.said
    assert "system message removed; it was: 'be\\nbrief'" in talk.said


def test_retry_asks_the_same_with_the_next_seed() -> None:
    llm = FakeLLM(*"1234567")
    params = SamplingParams(temperature=0.7, seed=2**64 - 2)
    commands = ("a", "/retry", "/retry", "b", "/retry", "/undo", "/retry")
    talk = Talk(llm, *commands, params=params)
    first, second = turn("a"), turn("a", "3", "b")
    assert llm.sent[1:] == [first] * 3 + [second] * 2 + [first]
    last = 2**64 - 1
    assert [p.seed for p in llm.params] == [last - 1, last, 0, last - 1, last, last]
    assert talk.out == "1\n2\n3\n4\n5\n6\n"
    free = FakeLLM(*"12")
    Talk(free, "a", "/retry")
    assert [p.seed for p in free.params] == [None, None]


def test_a_conversation_that_does_not_fit_says_what_helps() -> None:
    llm = FakeLLM("12345", "6", "7", limit=10)
    talk = Talk(llm, "abcd", "e", "/undo", "/retry", "/reset", "f")
    (error,) = talk.errors
    assert "with this question the conversation has 10 tokens" in error
    assert "--max-model-len is 10" in error
    for help_ in ("/undo", "/reset", "/retry", "larger --max-model-len"):
        assert help_ in talk.err
    # The question that did not fit is what /retry sends.
    assert llm.sent[2:] == [turn("abcd", "12345", "e"), turn("e"), turn("f")]
    assert (talk.code, talk.out) == (EXIT_OK, "12345\n6\n7\n")
    with pytest.raises(UserError, match="has 10 tokens"):
        Talk(FakeLLM(limit=10), "x" * 10, terminal=False)
    assert Talk(FakeLLM("1", limit=10), "x" * 9).out == "1\n"


def test_a_waiting_question_survives_reset_but_not_the_next_question() -> None:
    llm = FakeLLM("1234", "5", "6", limit=6)
    Talk(llm, "ab", "cd", "/reset", "/retry")
    assert llm.sent[3:] == [turn("cd")]
    llm = FakeLLM("1234", "5", "6", limit=6)
    Talk(llm, "ab", "cd", "/undo", "e", "/retry")
    assert llm.sent[3:] == [turn("e"), turn("e")]


# Thinking.

THOUGHTS = "<think>\nwhy</think>\n\nyes"


def test_thinking_is_dim_on_a_terminal_and_never_sent_back() -> None:
    llm = FakeLLM(THOUGHTS, "plain")
    talk = Talk(llm, "a", "b", output=Screen())
    assert talk.out == "\x1b[2mwhy\x1b[0m\nyes\nplain\n"
    assert llm.sent[-1] == turn("a", "yes", "b")


def test_thinking_stands_between_tags_in_a_file() -> None:
    assert Talk(FakeLLM(THOUGHTS), "a").out == "<think>why</think>\nyes\n"


def test_a_prompt_may_open_the_thinking() -> None:
    llm = FakeLLM("\nwhy</think>yes", "w</think>no", opening="<think>\n")
    talk = Talk(llm, "a", "b")
    assert talk.out == "<think>why</think>\nyes\n<think>w</think>\nno\n"
    assert llm.sent[-1] == turn("a", "yes", "b")


@pytest.mark.parametrize(
    "reply", [["<think>\n why\n", "</think>yes"], ["<think>", "\n", " why\n</think>yes"]]
)
def test_thinking_is_shown_from_its_first_word(reply: list[str | BaseException]) -> None:
    assert Talk(FakeLLM(reply), "a").out == "<think>why\n</think>\nyes\n"


def test_hidden_thinking_is_only_mentioned() -> None:
    llm = FakeLLM(THOUGHTS, "plain")
    talk = Talk(llm, "a", "b", output=Screen(), hide_thinking=True)
    assert talk.out == "yes\nplain\n"
    assert talk.said.count("(thinking...)") == 1
    assert llm.sent[-1] == turn("a", "yes", "b")


@pytest.mark.parametrize("hide", [False, True])
def test_empty_thinking_leaves_no_trace(hide: bool) -> None:
    llm = FakeLLM("<think>\n\n</think>\n\nyes")
    talk = Talk(llm, "a", output=Screen(), hide_thinking=hide)
    assert talk.out == "yes\n"
    assert "(thinking...)" not in talk.said


def test_an_answer_that_ends_in_its_thinking_says_so() -> None:
    llm = FakeLLM("<think>why </thi", "2")
    llm.finish_reason = "length"
    talk = Talk(llm, "a", "b", output=Screen())
    assert talk.out == "\x1b[2mwhy </thi\x1b[0m\n2\n"
    assert ", cut off inside its thinking, context used 17 of 1000" in talk.said[1]
    assert llm.sent[-1] == turn("a", "", "b")
    assert Talk(FakeLLM("<think>why"), "a", hide_thinking=True).out == "\n"
