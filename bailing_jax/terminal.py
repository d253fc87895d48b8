"""What a terminal gets of text that others wrote: control characters as escapes, never raw.

The text of a model, a file or a name may hold sequences that a terminal obeys: they recolour and
overwrite what stands there, set its title, or make it type. Each character is treated by itself,
so a text may come in any pieces. What is no terminal gets its text unchanged. Standard library
only.
"""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

# C0 but for tab and newline, DEL and C1.
_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"]
_ESCAPES = {code: f"\\x{code:02x}" for code in _CONTROLS}
# Those that JSON itself allows inside a string; its decoder gives them back.
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def escaped(text: str) -> str:
    """The text with every control character but newline and tab written out, ESC as `\\x1b`."""
    return text.translate(_ESCAPES)


def shown_on(stream: TextIO | None, text: str) -> str:
    """The text as it is written on this stream: escaped on a terminal, else as it is."""
    return escaped(text) if is_terminal(stream) else text


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream, which may be closed, is a terminal."""
    return stream is not None and stream.isatty()


def tell(line: str) -> None:
    """Print a line on stderr, unless that is closed."""
    if sys.stderr is not None:
        print(shown_on(sys.stderr, line), file=sys.stderr, flush=True)


def json_line(value: Any) -> str:
    """A value as one line of JSON in UTF-8, without a single raw control character."""
    return json.dumps(value, ensure_ascii=False).translate(_JSON_ESCAPES)
