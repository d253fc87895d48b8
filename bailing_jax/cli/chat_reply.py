"""One answer of a chat: shown as it comes, measured, and stopped by Ctrl-C without loose ends."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, TextIO, TypeVar

from bailing_jax.terminal import shown_on
from bailing_jax.text.thinking import CLOSE, OPEN, Piece, ThinkingSplitter

if TYPE_CHECKING:
    from collections.abc import Callable

    from bailing_jax.request import StreamPiece

Result = TypeVar("Result")

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


class Reply:
    """Shows one answer as it comes, and measures it.

    Thinking is dim on a terminal; elsewhere it stands between its tags. The white space at its
    beginning is not shown, so that an empty block leaves no trace. Control characters are written
    out on a terminal; the conversation keeps them as they are.

    Attributes:
        answer: what was shown of it, without the thinking.
        clock: when each token came.
    """

    def __init__(
        self, inside: bool, hide_thinking: bool, say: Callable[[str], None], output: TextIO
    ) -> None:
        self.answer = ""
        self.clock: list[float] = []
        self._splitter = ThinkingSplitter(inside)
        self._hides, self._say, self._output = hide_thinking, say, output
        self._before, self._after = (_DIM, _NORMAL) if output.isatty() else (OPEN, CLOSE)
        self._thinks = False
        self._finish_reason: str | None = None

    def push(self, piece: StreamPiece) -> None:
        """Show what one token adds."""
        self.clock.append(time.perf_counter())
        self._finish_reason = piece.finish_reason
        self._show(self._splitter.push(piece.text or ""))

    def end(self, stopped: bool) -> None:
        """Show what was held back, and end the line; an empty one if that is the answer."""
        self._show(self._splitter.flush())
        if not self._end_thinking() and (self.answer or (self.clock and not stopped)):
            self._output.write("\n")
        self._output.flush()

    def figures(self, prompt_tokens: int, limit: int) -> str:
        """The line of statistics."""
        tokens = len(self.clock)
        seconds = self.clock[-1] - self.clock[0]
        rate = f" at {(tokens - 1) / seconds:.1f}/s" if seconds else ""
        where = "inside its thinking" if self._splitter.is_thinking else "by the limit"
        cut = f", cut off {where}" if self._finish_reason == "length" else ""
        return (
            f"prompt {prompt_tokens} tokens, answer {tokens} tokens{rate}{cut}, "
            f"context used {prompt_tokens + tokens} of {limit}"
        )

    def _show(self, pieces: list[Piece]) -> None:
        for text, is_thinking in pieces:
            if not is_thinking:
                self._end_thinking()
                self._output.write(shown_on(self._output, text))
                self.answer += text
            elif self._thinks or text.strip():
                self._think(text)
        self._output.flush()

    def _think(self, text: str) -> None:
        if not self._thinks and self._hides:
            self._say("(thinking...)")
        if not self._hides:
            before, text = ("", text) if self._thinks else (self._before, text.lstrip())
            self._output.write(before + shown_on(self._output, text))
        self._thinks = True

    def _end_thinking(self) -> bool:
        """Whether thinking was shown up to here; it ends with its line."""
        shown, self._thinks = self._thinks and not self._hides, False
        if shown:
            self._output.write(f"{self._after}\n")
        return shown


class CtrlC:
    """Ctrl-C while an answer is made: raised at once inside `run`, elsewhere only noted.

    So it comes neither between showing a text and keeping it, nor between submitting a request
    and knowing its number, and a second one does not disturb the clearing up after the first.

    Attributes:
        noted: whether it was pressed.
    """

    def __enter__(self) -> CtrlC:
        self.noted = self._open = False
        # Elsewhere than in the main thread, or where others handle it, it stays as it is.
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(self, action: Callable[[], Result]) -> Result:
        """Run what may be broken off."""
        self._open = True
        try:
            if self.noted:
                raise KeyboardInterrupt
            return action()
        finally:
            self._open = False

    def _handle(self, *_signal: object) -> None:
        first, self.noted = not self.noted, True
        if first and self._open:
            raise KeyboardInterrupt
