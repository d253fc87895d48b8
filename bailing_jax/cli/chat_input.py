"""What is typed in a chat: texts of one or several lines, from a terminal or a pipe.

The prompt stands on stderr, and only where a terminal is read. Line editing needs stdin and
stdout to be that terminal; it then writes the prompt there itself. Ctrl-C drops a text that has
begun, as in a shell, and is the caller's business otherwise.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.terminal import tell

if TYPE_CHECKING:
    from collections.abc import Callable

_QUOTES = '"""'


class Lines:
    """Reads texts from `source`; where they are answered, on `output`, decides about editing."""

    def __init__(self, source: TextIO, output: TextIO) -> None:
        self.terminal = source.isatty()
        self._source = source
        self._within = False  # a text of several lines
        self._typed: Callable[[], str] = str
        standard = source is sys.stdin and output is sys.stdout
        self._edits = standard and self.terminal and output.isatty()
        if self._edits:
            try:
                import readline
            except ImportError:
                return
            self._typed = readline.get_line_buffer

    def next_text(self) -> tuple[str, bool] | None:
        """A text and whether it stood between quotes; None at the end of input."""
        while True:
            self._within = False
            try:
                return self._text()
            except KeyboardInterrupt:
                if not self.terminal or not (self._within or self._typed()):
                    raise
                tell("")  # Ctrl-C drops what was typed, as in a shell

    def _text(self) -> tuple[str, bool] | None:
        line = self._line("> ")
        if line is None:
            return None
        self._within, lines = True, [line]
        if quoted := line.strip() == _QUOTES:
            while lines[-1].strip() != _QUOTES or len(lines) == 1:
                lines.append(self._more("the closing line of three double quotes"))
            return "\n".join(lines[1:-1]), quoted
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._more("the line after a backslash"))
        return "\n".join(lines), quoted

    def _more(self, awaited: str) -> str:
        line = self._line("... ")
        if line is None:
            raise UserError(f"the input ended before {awaited}", exit_code=EXIT_USAGE)
        return line

    def _line(self, prompt: str) -> str | None:
        try:
            if self._edits:
                return input(prompt)
            if self.terminal:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = self._source.readline()
        except EOFError:
            line = ""
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not UTF-8: {error}", exit_code=EXIT_USAGE) from error
        if not line and self.terminal:
            tell("")  # after Ctrl-D the shell's prompt belongs on a line of its own
        return line.removesuffix("\n") if line else None
