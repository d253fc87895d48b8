"""A chat without a model: scripted replies, scripted typing, and what came of it."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tiny_models import greedy

from bailing_jax import SamplingParams
from bailing_jax.cli.chat_loop import run_chat
from bailing_jax.errors import UserError
from bailing_jax.request import StreamPiece

CTRL_C = KeyboardInterrupt()
Reply = str | list[str | BaseException]


class FakeLLM:
    """Gives scripted replies, letter by letter where they are strings; a token is a letter.

    CTRL_C in a reply sends this process the signal in the middle of a step; any other exception
    is raised there. `refusals` are what chat_prompt raises, by the number of the call; call 0 is
    the check at the start.
    """

    def __init__(self, *replies: Reply, limit: int = 1000, opening: str = "") -> None:
        self.replies = list(replies)
        self.limits = SimpleNamespace(max_model_len=limit)
        self.chat_template: Any = SimpleNamespace(render=lambda *_, **__: f"<role>{opening}")
        self.sent: list[list[tuple[str, str]]] = []
        self.params: list[SamplingParams] = []
        self.template_args: list[object] = []
        self.refusals: dict[int, UserError] = {}
        self.finish_reason: Any = "stop"
        self.running: Any = None
        self.on_cancel: Callable[[], object] = lambda: None

    def chat_prompt(self, messages: list[dict[str, str]], template_args: object) -> list[int]:
        self.sent.append([(m["role"], m["content"]) for m in messages])
        self.template_args.append(template_args)
        if len(self.sent) - 1 in self.refusals:
            raise self.refusals[len(self.sent) - 1]
        return [0] * sum(len(message["content"]) for message in messages)

    def prepare(self, prompt: list[int], params: SamplingParams) -> object:
        self.params.append(params)
        return SimpleNamespace(prompt=prompt, raise_error=lambda: None)

    def warm_up(self, prompt_tokens: int, params: SamplingParams) -> None:
        assert params == self.params[-1]
        assert prompt_tokens > 0

    def submit(self, request: object, on_piece: Callable[[StreamPiece], None]) -> None:
        assert self.running is None
        self.running = request
        self._on_piece, self._left = on_piece, list(self.replies.pop(0))

    def is_unfinished(self, request: object) -> bool:
        return self.running is request

    def step(self) -> None:
        item = self._left.pop(0) if self._left else ""
        if item is CTRL_C:
            signal.raise_signal(signal.SIGINT)
        elif isinstance(item, BaseException):
            self.running = None
            raise item
        else:
            reason = None if self._left else self.finish_reason
            self._on_piece(StreamPiece(str(item), 0, reason))
            self.running = self.running if self._left else None

    def cancel(self, request: object) -> None:
        self.on_cancel()
        self.running = None


class Keyboard:
    """Input as a terminal (or a pipe) gives it: lines, then the end; CTRL_C is that key."""

    def __init__(self, typed: tuple[str | BaseException, ...], terminal: bool) -> None:
        self._typed = list(typed)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def readline(self) -> str:
        if not self._typed:
            return ""
        item = self._typed.pop(0)
        if isinstance(item, BaseException):
            raise item
        return f"{item}\n"


class Screen(io.StringIO):
    """Output that is a terminal."""

    def isatty(self) -> bool:
        return True


class Talk:
    """One run: its exit code, stdout, stderr, and what `say` was given."""

    def __init__(
        self,
        llm: Any,
        *typed: str | BaseException,
        terminal: bool = True,
        output: io.StringIO | None = None,
        **options: Any,
    ) -> None:
        screen, errors = output or io.StringIO(), io.StringIO()
        self.said: list[str] = []
        params = options.pop("params", greedy())
        source: Any = Keyboard(typed, terminal)
        with contextlib.redirect_stderr(errors):
            self.code = run_chat(
                llm, params, say=self.said.append, source=source, output=screen, **options
            )
        self.out, self.err = screen.getvalue(), errors.getvalue()

    @property
    def errors(self) -> list[str]:
        lines = self.err.replace("> ", "").splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def turn(*texts: str) -> list[tuple[str, str]]:
    """The messages of a conversation without system message."""
    return [("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
