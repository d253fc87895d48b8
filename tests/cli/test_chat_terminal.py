"""--chat at a terminal: Ctrl-C at any moment, and a real model talked to through one."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_chat import CTRL_C, FakeLLM, Screen, Talk, turn
from terminals import Terminal, programs_folder
from tiny_models import greedy, is_idle, linear_llm

from bailing_jax import LLM, SamplingParams
from bailing_jax.errors import EXIT_INTERRUPTED, EXIT_OK, UserError

pytestmark = pytest.mark.unoptimised

LEAVE = "Ctrl-C once more leaves"

# Ctrl-C.


def test_r085_ctrl_c_keeps_exactly_what_was_shown() -> None:
    """Also the beginning of what might have been a tag, which had been held back."""
    llm = FakeLLM(["On", "ce ", CTRL_C, "never"], ["<th", CTRL_C, "ink>"], "end")
    talk = Talk(llm, "a", "b", "c")
    assert talk.out == "Once \n<th\nend\n"
    assert llm.sent[2:] == [turn("a", "Once ", "b"), turn("a", "Once ", "b", "<th", "c")]
    assert talk.said.count("stopped; what was shown of the answer stays in the conversation") == 2
    assert [line.split(" at ")[0] for line in talk.said if line.startswith("prompt")] == [
        "prompt 1 tokens, answer 2 tokens",
        "prompt 7 tokens, answer 1 tokens, context used 8 of 1000",
        "prompt 11 tokens, answer 3 tokens",
    ]
    assert talk.code == EXIT_OK
    assert llm.running is None


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ([CTRL_C, "never"], ""),
        (["\n", CTRL_C, "never"], "\n\n"),
        (["<think>", "why", CTRL_C, "never"], "\x1b[2mwhy\x1b[0m\n"),
    ],
)
def test_ctrl_c_before_the_answer_keeps_the_question_for_retry(
    reply: list[str | BaseException], shown: str
) -> None:
    llm = FakeLLM("1", list(reply), "2", "3")
    talk = Talk(llm, "a", "b", "/retry", "c", output=Screen())
    assert llm.sent[2:] == [turn("a", "1", "b")] * 2 + [turn("a", "1", "b", "2", "c")]
    assert talk.out == f"1\n{shown}2\n3\n"
    assert "\nstopped before the answer began; /retry asks again" in talk.said


def test_a_question_that_only_thought_in_secret_leaves_stdout_alone() -> None:
    llm = FakeLLM(["<think>", "why", CTRL_C])
    assert Talk(llm, "a", hide_thinking=True).out == ""


def test_ctrl_c_in_a_retry_keeps_the_old_answer_until_there_is_a_new_one() -> None:
    llm = FakeLLM("old", [CTRL_C], ["n", CTRL_C, "ever"], "x")
    Talk(llm, "a", "/retry", "/retry", "b", params=greedy(seed=5))
    assert llm.sent[2:] == [turn("a"), turn("a"), turn("a", "n", "b")]
    assert [p.seed for p in llm.params] == [5, 6, 7, 5]
    llm = FakeLLM("old", [CTRL_C], "x")
    Talk(llm, "a", "/retry", "b")
    assert llm.sent[-1] == turn("a", "old", "b")


class Nervous(Screen):
    """Presses Ctrl-C whenever the first line is being written."""

    def write(self, text: str) -> int:
        if "\n" not in self.getvalue():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_while_text_is_shown_does_not_part_it_from_what_is_kept() -> None:
    llm = FakeLLM(["On", "never"], "2")
    talk = Talk(llm, "a", "b", output=Nervous())
    assert talk.out == "On\n2\n"
    assert llm.sent[-1] == turn("a", "On", "b")


def test_a_second_ctrl_c_does_not_disturb_the_clearing_up() -> None:
    llm = FakeLLM(["On", CTRL_C], "2")
    llm.on_cancel = lambda: signal.raise_signal(signal.SIGINT)
    talk = Talk(llm, "a", "b")
    assert (talk.code, talk.out) == (EXIT_OK, "On\n2\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_disturb_a_step_that_clears_up() -> None:
    """As the engine does, which starts afresh before the first one comes out of its step."""
    llm = FakeLLM(["On", CTRL_C], "2")
    step, cleared = llm.step, []

    def clearing() -> None:
        try:
            step()
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            cleared.append(True)
            raise

    llm.step = clearing  # pyright: ignore[reportAttributeAccessIssue]
    assert Talk(llm, "a", "b").out == "On\n2\n"
    assert cleared == [True]


def test_ctrl_c_that_a_library_swallows_stops_the_next_step() -> None:
    llm = FakeLLM(["On", "ce", "never"])
    step, pressed = llm.step, []

    def swallowing() -> None:
        if not pressed:
            with contextlib.suppress(KeyboardInterrupt):
                pressed.append(True)
                signal.raise_signal(signal.SIGINT)
        step()

    llm.step = swallowing  # pyright: ignore[reportAttributeAccessIssue]
    assert Talk(llm, "a").out == "On\n"


def test_ctrl_c_works_where_the_signal_is_not_ours_to_handle() -> None:
    """In another thread nobody may set handlers; KeyboardInterrupt comes as an exception."""
    llm = FakeLLM(["On", KeyboardInterrupt()], "2")
    talks: list[Talk] = []
    thread = threading.Thread(target=lambda: talks.append(Talk(llm, "a", "b")))
    thread.start()
    thread.join(timeout=60)
    assert talks[0].out == "On\n2\n"
    assert llm.sent[-1] == turn("a", "On", "b")


def test_ctrl_c_at_the_prompt_warns_then_leaves() -> None:
    talk = Talk(FakeLLM(), CTRL_C, CTRL_C, "never sent")
    assert (talk.code, talk.err.count(LEAVE)) == (EXIT_INTERRUPTED, 1)
    llm = FakeLLM("1", [CTRL_C])
    talk = Talk(llm, CTRL_C, "a", CTRL_C, "", CTRL_C, "b", CTRL_C)
    assert (talk.code, talk.err.count(LEAVE)) == (EXIT_OK, 4)


def test_ctrl_c_within_a_text_drops_it() -> None:
    llm = FakeLLM("1")
    talk = Talk(llm, CTRL_C, '"""', "lost", CTRL_C, "a\\", CTRL_C, "b", CTRL_C)
    assert (talk.code, talk.err.count(LEAVE)) == (EXIT_OK, 2)
    assert llm.sent[1:] == [turn("b")]


@pytest.mark.parametrize("reply", [["On", CTRL_C, "never"], [CTRL_C]])
def test_ctrl_c_ends_a_pipe(reply: list[str | BaseException]) -> None:
    llm = FakeLLM(list(reply), "never")
    with pytest.raises(KeyboardInterrupt):
        Talk(llm, "a", "b", terminal=False)
    assert llm.running is None
    for typed in ([CTRL_C], ['"""', "begun", CTRL_C]):
        with pytest.raises(KeyboardInterrupt):
            Talk(FakeLLM(), *typed, terminal=False)
    with pytest.raises(KeyboardInterrupt):  # with the last letter
        Talk(FakeLLM("1"), "a", terminal=False, output=Nervous())


def test_other_errors_are_nobodys_to_hide() -> None:
    """They end the talk, but not with a dim terminal or a request left behind."""
    llm, screen = FakeLLM(["<think>", "why", RuntimeError("broken")]), Screen()
    with pytest.raises(RuntimeError, match="broken"):
        Talk(llm, "a", output=screen)
    assert screen.getvalue() == "\x1b[2mwhy\x1b[0m\n"
    assert llm.running is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# The real model.


@pytest.fixture(scope="module")
def llm() -> LLM:
    return linear_llm()


@pytest.fixture
def prompts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of every request that a talk makes."""
    sent: list[list[int]] = []
    prepare = llm.prepare

    def noting(prompt: Any, *args: Any) -> Any:
        sent.append(list(prompt))
        return prepare(prompt, *args)

    monkeypatch.setattr(llm, "prepare", noting)
    return sent


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turn(*texts)]


def reply(llm: LLM, *texts: str, tokens: int = 12) -> str:
    """What the model says next."""
    return llm.chat(conversation(*texts), greedy(tokens))[0].outputs[0].text or ""


def test_the_next_prompt_is_the_conversation_as_it_was_shown(
    llm: LLM, prompts: list[list[int]]
) -> None:
    first = reply(llm, "hello")
    second = reply(llm, "hello", first, "<role> and?")
    prompts.clear()
    talk = Talk(llm, "hello", "<role> and?", terminal=False, params=greedy(12))
    assert talk.out == f"{first}\n{second}\n"
    texts = "hello", first, "<role> and?"
    assert prompts == [llm.chat_prompt(conversation(*texts[:n])) for n in (1, 3)]
    assert talk.said[1].startswith(f"prompt {len(prompts[1])} tokens, answer ")
    # "<role>" is text, and so is what the answer says of it.
    assert len(prompts[1]) > len(prompts[0]) + len("<role>")


@pytest.mark.parametrize(("steps", "tokens"), [(-1, 0), (0, 0), (1, 1), (2, 9)])
def test_r085_after_ctrl_c_in_a_step_the_next_answer_is_right(
    llm: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, steps: int, tokens: int
) -> None:
    """Whether it comes in the prompt or in the answer; and nobody holds a place any more.

    The prompt takes three steps, the last of which gives a token; the next call decodes eight.
    """
    run, left = llm._engine._programs.step, [steps + 2]

    def interrupted(*args: Any) -> Any:
        result = run(*args)
        left[0] -= 1
        if left[0] == -1:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine._programs, "step", interrupted)
        talk = Talk(llm, "hello", "again", params=greedy(12))
        assert left[0] < -1
    assert is_idle(llm)
    stream = llm.stream(llm.chat_prompt(conversation("hello")), greedy(12))
    shown = "".join([piece.text or "" for piece in stream][:tokens])
    texts = ("hello", shown, "again") if shown else ("again",)
    assert prompts[1] == llm.chat_prompt(conversation(*texts))
    assert talk.out == (f"{shown}\n" if shown else "") + f"{reply(llm, *texts)}\n"


def test_retry_draws_from_the_next_seed(llm: LLM) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.5, seed=seed, max_tokens=8, ignore_eos=True)

    want = [llm.chat(conversation("hello"), params(5 + i))[0].outputs[0].text for i in range(3)]
    talk = Talk(llm, "hello", "/retry", "/retry", params=params(5))
    assert talk.out == "".join(f"{text}\n" for text in want)
    assert len(set(want)) == 3


def test_the_models_own_refusals_are_shown(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = len(llm.chat_prompt(conversation("x " * 300)))
    talk = Talk(llm, "x " * 300, "a\udc80b", params=greedy(1))
    assert f"has {tokens} tokens" in talk.errors[0]
    assert "lone surrogate" in talk.errors[1]
    with pytest.raises(UserError, match="chat_template_args: '1' is not a name"):
        Talk(llm, "hello", template_args={"1": 2})
    monkeypatch.setattr(llm, "chat_template", None)
    with pytest.raises(UserError, match="has no chat template, which chat needs"):
        Talk(llm, "hello")


# A real terminal.

PROGRAM = """
from tiny_models import greedy, tiny_llm
from bailing_jax.cli.chat_loop import run_chat
from bailing_jax.errors import run_command
llm = tiny_llm(max_num_seqs=1)
step, pause = llm.step, [0.3]
def slow_until_stopped():
    try:
        time.sleep(pause[0])
        step()
    except KeyboardInterrupt:
        pause[0] = 0
        raise
llm.step = slow_until_stopped
from bailing_jax.terminal import tell
sys.exit(run_command(lambda: run_chat(llm, greedy(30), say=tell)))
"""


@pytest.fixture
def terminal(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Terminal]:
    pipes = ("out", "err") if request.param == "pipes" else ()
    opened = Terminal(PROGRAM, folder=programs_folder(tmp_path_factory), pipes=pipes)
    yield opened
    opened.close()


@pytest.mark.parametrize("terminal", ["pipes"], indirect=True)
def test_r085_ctrl_c_stops_an_answer_and_the_talk_goes_on(
    terminal: Terminal, llm: LLM, tmp_path: Path
) -> None:
    """stdout carries what the conversation holds and nothing else; Ctrl-D leaves."""
    whole = reply(llm, "hello", tokens=30)
    terminal.wait_for("err", "\n> ")
    terminal.type("hello\n")
    terminal.wait_for("out", whole[0])
    terminal.type("\x03")
    terminal.wait_for("err", "stopped; what was shown of the answer stays in the conversation\n")
    terminal.wait_for("err", "\n> ")
    terminal.type("again\n")
    terminal.wait_for("err", "context used ")
    terminal.wait_for("err", "\n> ")
    assert terminal.process.poll() is None
    terminal.type(f"/save {tmp_path / 'talk'}\n")
    terminal.wait_for("err", "4 messages written\n> ")
    terminal.type("\x04")
    assert terminal.end() == EXIT_OK
    texts = [m["content"] for m in json.loads((tmp_path / "talk").read_text(encoding="utf-8"))]
    assert terminal.seen["out"].decode() == f"{texts[1]}\n{texts[3]}\n"
    assert whole.startswith(texts[1])
    assert len(texts[1]) < len(whole)
    assert texts[3] == reply(llm, *texts[:3], tokens=30)
    assert terminal.seen["err"].count(b"> ") == 4
    assert terminal.seen["err"].endswith(b"4 messages written\n> \n")


@pytest.mark.parametrize("terminal", ["screen"], indirect=True)
def test_lines_are_edited_and_ctrl_c_drops_them(terminal: Terminal) -> None:
    pytest.importorskip("readline")
    terminal.wait_for("screen", "\n> ")
    terminal.type("lost")
    terminal.wait_for("screen", "lost")
    terminal.press_ctrl_c()
    terminal.wait_for("screen", "\n> ")
    terminal.type("nope\x01/\n")  # Ctrl-A: to the beginning of the line
    terminal.wait_for("screen", "error: unknown command /nope; ")
    terminal.wait_for("screen", "\n> ")
    terminal.press_ctrl_c()
    terminal.wait_for("screen", LEAVE)
    terminal.wait_for("screen", "\n> ")
    terminal.press_ctrl_c()
    assert terminal.end() == EXIT_INTERRUPTED
    assert terminal.seen["screen"].count(LEAVE.encode()) == 1
    assert b"Traceback" not in terminal.seen["screen"]
