"""--chat: questions from a terminal or a pipe, answers on stdout, everything else on stderr.

The model is sent the system message and each exchange as it was shown, without the thinking. A
question without an answer (it did not fit, the template refused it, Ctrl-C came before the first
word) is not lost: it waits, and /retry sends it, also after /undo or /reset. On a terminal errors
are shown and the talk goes on. From a pipe each line is a turn, and the first error ends the talk
with its exit code: later turns would build on an answer that is missing.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from bailing_jax.cli.chat_file import read_messages, write_messages
from bailing_jax.cli.chat_input import Lines
from bailing_jax.cli.chat_reply import CtrlC, Reply
from bailing_jax.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    Interrupted,
    UserError,
    tell_error,
)
from bailing_jax.terminal import tell
from bailing_jax.text.thinking import prompt_opens_thinking

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bailing_jax.llm import LLM
    from bailing_jax.request import StreamPiece
    from bailing_jax.sampling_params import SamplingParams

HELP = """\
/help          this list
/retry         answer the last question again, with the next seed (temperature 0: the same answer)
/undo          forget the last exchange
/reset         forget all exchanges, keep the system message
/system TEXT   the system message from now on; without TEXT there is none
/save FILE     write the conversation into a new file, as JSON messages
/load FILE     go on with the conversation of such a file
/stats         stop showing the figures after each answer, or show them again
/exit, /quit   leave; so does Ctrl-D
//...          a text that begins with /
Several lines: end a line with a backslash, or put them between two lines of three double quotes.
Ctrl-C stops an answer; what was shown of it stays in the conversation."""


def run_chat(
    llm: LLM,
    params: SamplingParams,
    *,
    system: str | None = None,
    template_args: Mapping[str, object] | None = None,
    hide_thinking: bool = False,
    say: Callable[[str], None],
    source: TextIO | None = None,
    output: TextIO | None = None,
) -> int:
    """Talk until the input ends; returns the exit code.

    Args:
        llm: a model with tokenizer and chat template.
        params: of every answer; /retry advances the seed, if there is one.
        system: the system message.
        template_args: variables of the chat template.
        hide_thinking: say that the model thinks instead of showing what.
        say: prints a remark on stderr.
        source: where questions come from; None: stdin.
        output: where answers go; None: stdout.

    Raises:
        UserError: the model can't chat, or input that is no terminal had a mistake.
        KeyboardInterrupt: Ctrl-C while input is no terminal.
    """
    if params.n != 1:
        raise UserError(f"n = {params.n}; a chat gives one answer", exit_code=EXIT_USAGE)
    chat = _Chat(llm, params, system, template_args or {}, hide_thinking, say, output or sys.stdout)
    chat.check()
    lines = Lines(source or sys.stdin, output or sys.stdout)
    if not lines.terminal:
        while not chat.left and (text := lines.next_text()) is not None:
            if chat.take(*text):
                raise Interrupted
        return EXIT_OK
    say("/help lists the commands, Ctrl-D leaves")
    warned = False
    while not chat.left:
        try:
            if (text := lines.next_text()) is None:
                break
            warned = False
            chat.take(*text)
        except UserError as error:
            tell_error(error, {})
        except KeyboardInterrupt:
            if warned:
                return EXIT_INTERRUPTED
            warned = True
            tell("\nCtrl-C once more leaves; so do Ctrl-D and /exit")
    return EXIT_OK


class _Chat:
    """The conversation and what can be done with it."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        template_args: Mapping[str, object],
        hide_thinking: bool,
        say: Callable[[str], None],
        output: TextIO,
    ) -> None:
        self._llm, self._params, self._template_args = llm, params, template_args
        self._hide_thinking, self._say, self._output = hide_thinking, say, output
        self._system = system
        self._exchanges: list[tuple[str, str]] = []
        self._waiting: str | None = None  # a question that has no answer
        self._retries = 0
        self._stats = True
        self.left = False

    def check(self) -> None:
        """Raise UserError now if no question at all could be put to this model."""
        self._llm.chat_prompt([*self._messages(), _message("user", "hello")], self._template_args)

    def take(self, text: str, quoted: bool) -> bool:
        """A question or a command; returns whether Ctrl-C stopped the answer."""
        if not text.strip():
            return False
        if not quoted and text.startswith("//"):
            text = text[1:]
        elif not quoted and text.startswith("/"):
            return self._command(*text.split(None, 1))
        self._waiting, self._retries = text, 0
        return self._answer()

    def _command(self, name: str, value: str = "") -> bool:
        value = value.strip()
        alone = {"/help": self._help, "/retry": self._retry, "/undo": self._undo,
                 "/reset": self._reset, "/stats": self._toggle, "/exit": self._leave,
                 "/quit": self._leave}  # fmt: skip
        with_value = {"/system": self._set_system, "/save": self._save, "/load": self._load}
        if name in alone:
            if value:
                raise _wrong(f"{name} takes nothing after it, not {value!r:.40}")
            return bool(alone[name]())
        if name not in with_value:
            raise _wrong(f"unknown command {name:.40}; /help lists them, // begins a text with /")
        if not value and name != "/system":
            raise _wrong(f"{name}: no file named", f"Write {name} FILE.")
        with_value[name](value)
        return False

    def _help(self) -> None:
        tell(HELP)

    def _leave(self) -> None:
        self.left = True

    def _toggle(self) -> None:
        self._stats = not self._stats
        self._say(f"figures are {'shown' if self._stats else 'not shown'}")

    def _reset(self) -> None:
        count = len(self._exchanges)
        self._say(f"{count} exchange{'s' * (count != 1)} forgotten")
        self._exchanges.clear()

    def _undo(self) -> None:
        if not self._exchanges:
            raise _wrong("/undo: there is no exchange to forget")
        self._exchanges.pop()
        self._retries = 0
        self._say(f"forgotten; exchanges left: {len(self._exchanges)}")

    def _retry(self) -> bool:
        if self._waiting is not None:
            return self._answer()
        if not self._exchanges:
            raise _wrong("/retry: there is no question yet")
        before = self._exchanges.pop()
        self._waiting = before[0]
        self._retries += 1
        try:
            return self._answer()
        finally:
            if self._waiting is not None:  # no new answer came: the old one stays
                self._exchanges.append(before)
                self._waiting = None

    def _set_system(self, text: str) -> None:
        before = "none" if self._system is None else repr(self._system)
        self._say(f"system message {'set' if text else 'removed'}; it was: {before}")
        self._system = text or None

    def _save(self, name: str) -> None:
        messages = self._messages()
        write_messages(_path(name), messages)
        self._say(f"{name}: {len(messages)} messages written")

    def _load(self, name: str) -> None:
        messages = read_messages(_path(name))
        first = 1 if messages and messages[0]["role"] == "system" else 0
        texts = [message["content"] for message in messages]
        self._system = texts[0] if first else None
        self._exchanges = list(zip(texts[first::2], texts[first + 1 :: 2], strict=False))
        self._waiting = texts[-1] if (len(texts) - first) % 2 else None
        self._retries = 0
        waits = "" if self._waiting is None else "; its last question waits for /retry"
        self._say(f"{name}: {len(messages)} messages read{waits}")

    def _messages(self) -> list[dict[str, str]]:
        """The conversation, a waiting question at its end."""
        messages = [] if self._system is None else [_message("system", self._system)]
        for question, answer in self._exchanges:
            messages += [_message("user", question), _message("assistant", answer)]
        return messages + ([] if self._waiting is None else [_message("user", self._waiting)])

    def _answer(self) -> bool:
        """Answer the waiting question; returns whether Ctrl-C stopped it."""
        assert self._waiting is not None
        reply, prompt, stopped = None, list[int](), False
        with CtrlC() as ctrl_c:
            try:
                prompt, inside = ctrl_c.run(self._prompt)
                reply = Reply(inside, self._hide_thinking, self._say, self._output)
                self._generate(prompt, reply, ctrl_c)
            except KeyboardInterrupt:
                stopped = True
            finally:
                if reply is not None:
                    reply.end(stopped)
            stopped |= ctrl_c.noted  # too late for this answer, not for those of a pipe
            answer = "" if reply is None else reply.answer
            if answer.strip() or not stopped:
                self._exchanges.append((self._waiting, answer))
                self._waiting = None
        if stopped and self._waiting is None:
            self._say("stopped; what was shown of the answer stays in the conversation")
        elif stopped:
            self._say("\nstopped before the answer began; /retry asks again")
        if reply is not None and reply.clock and self._stats:
            self._say(reply.figures(len(prompt), self._llm.limits.max_model_len))
        return stopped

    def _prompt(self) -> tuple[list[int], bool]:
        """The prompt's token ids, and whether it ends inside the thinking."""
        messages = self._messages()
        ids = self._llm.chat_prompt(messages, self._template_args)
        limit = self._llm.limits.max_model_len
        if len(ids) >= limit:
            raise _wrong(
                f"with this question the conversation has {len(ids)} tokens, which leaves no room "
                f"for an answer: --max-model-len is {limit}",
                "Make room with /undo or /reset, then send the question again with /retry; "
                "or start with a larger --max-model-len.",
            )
        template = self._llm.chat_template
        assert template is not None  # or there were no ids
        text = template.render(messages, template_args=self._template_args)
        return ids, prompt_opens_thinking(text)

    def _generate(self, prompt: list[int], reply: Reply, ctrl_c: CtrlC) -> None:
        llm, params = self._llm, self._params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + self._retries) % 2**64)
        request = llm.prepare(prompt, params)
        ctrl_c.run(lambda: llm.warm_up(len(prompt), params))
        pieces: deque[StreamPiece] = deque()
        llm.submit(request, pieces.append)
        try:
            while llm.is_unfinished(request):
                # If Ctrl-C comes in here, the engine starts afresh and keeps its programs.
                ctrl_c.run(llm.step)
                while pieces:
                    reply.push(pieces.popleft())
            request.raise_error()
        finally:
            llm.cancel(request)


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # unlike Path's own, it knows no failure


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _wrong(message: str, hint: str = "") -> UserError:
    return UserError(message, hint, EXIT_USAGE)
