"""Errors a person can act on, and the one place that prints them.

Anything the user can cause (a wrong file, a wrong flag, a model that does not fit) is a
`UserError`: what is wrong, what to do about it, and the exit code of a command that meets it.
Programming errors stay ordinary exceptions and keep their traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 130

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_SHOWN = 100  # characters of a wrong value


class UserError(Exception):
    """A mistake or limit outside this program.

    Args:
        message: what is wrong and where: file, field, the value found, the values allowed.
        hint: what to do about it; may be empty.
        exit_code: the code a command exits with (2: bad usage or config, 3: does not fit,
            1: anything else).
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(message if not hint else f"{message}\n{hint}")
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def bad_value(name: str, value: object, allowed: str) -> UserError:
    """The refusal of an option's value, which is shown as far as a line has room."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return UserError(f"{name} = {shown}; allowed: {allowed}", exit_code=EXIT_USAGE)


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main`, turning the errors a user can cause into a line and an exit code."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("error: the machine ran out of memory", file=sys.stderr)
        print("  Use a smaller model or smaller limits, or a machine with more.", file=sys.stderr)
        return EXIT_DOES_NOT_FIT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout went away (`... | head`).
        _drop_stdout()
        return EXIT_FAILURE
    except OSError as error:
        # Those who write files say themselves which; what is left is stdout.
        if error.errno not in _FULL:
            raise
        _drop_stdout()
        print(f"error: stdout can't be written: {error.strerror}", file=sys.stderr)
        print("  Make room where it leads, or send it elsewhere.", file=sys.stderr)
        return EXIT_FAILURE


def _drop_stdout() -> None:
    """Keep the interpreter from complaining a second time when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
