"""Errors a person can act on, and the one place that prints them.

Anything the user can cause (a wrong file, a wrong flag, a model that does not fit) is a
`UserError`: what is wrong, what to do about it, and the exit code of a command that meets it.
Programming errors stay ordinary exceptions and keep their traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping

from bailing_jax import interruption
from bailing_jax.terminal import is_terminal, tell

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_SHOWN = 100  # characters of a wrong value


class UserError(Exception):
    """A mistake or limit outside this program.

    Args:
        message: what is wrong and where: file, field, the value found, the values allowed.
        hint: what to do about it; may be empty.
        exit_code: the code a command exits with (2: bad usage or config, 3: does not fit,
            1: anything else).
        options: the names in message and hint that a command has flags for.
    """

    def __init__(
        self,
        message: str,
        hint: str = "",
        exit_code: int = EXIT_FAILURE,
        *,
        options: Iterable[str] = (),
    ) -> None:
        super().__init__(message if not hint else f"{message}\n{hint}")
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.options = frozenset(options)

    def shown(self, flags: Mapping[str, str]) -> tuple[str, str]:
        """Message and hint as a command shows them, with the flag in place of each option."""
        names = "|".join(self.options & flags.keys())
        if not names:
            return self.message, self.hint
        # Not inside a value, which stands in quotes, nor inside another name.
        whole = re.compile(rf"(?<![\w'\"-])(?:{names})(?![\w'\"])")
        return tuple(  # pyright: ignore[reportReturnType]
            whole.sub(lambda found: flags[found[0]], text) for text in (self.message, self.hint)
        )


class NotFiniteError(UserError):
    """The model gave NaN or infinity where a token had to be chosen: one request ends there."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, where a terminal's line with its ^C has been ended already."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where a command ends in order when it comes."""


def bad_value(name: str, value: object, allowed: str, *, options: Iterable[str] = ()) -> UserError:
    """The refusal of an option's value, which is shown as far as a line has room.

    Args:
        name: the option's.
        value: what it got.
        allowed: what it takes.
        options: others that `allowed` names.
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return UserError(
        f"{name} = {shown}; allowed: {allowed}", exit_code=EXIT_USAGE, options=(name, *options)
    )


def run_command(main: Callable[[], int], flags: Mapping[str, str] | None = None) -> int:
    """Run a command's `main`, turning the errors a user can cause into a line and an exit code.

    Args:
        main: returns the exit code.
        flags: what the command calls the options that errors name; others keep their names.
    """
    try:
        with interruption.not_lost():
            return main()
    except UserError as error:
        tell_error(error, flags or {})
        return error.exit_code
    except MemoryError:
        tell("error: the machine ran out of memory")
        tell("  Use a smaller model or smaller limits, or a machine with more.")
        return EXIT_DOES_NOT_FIT
    except Terminated:
        tell("terminated")
        return EXIT_TERMINATED
    except KeyboardInterrupt as error:
        # The terminal has just written ^C, and stays on its line.
        fresh = "\n" * (is_terminal(sys.stderr) and not isinstance(error, Interrupted))
        tell(f"{fresh}interrupted")
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
        tell(f"error: stdout can't be written: {error.strerror}")
        tell("  Make room where it leads, or send it elsewhere.")
        return EXIT_FAILURE


def tell_error(error: UserError, flags: Mapping[str, str]) -> None:
    """Print what is wrong, and below it what to do."""
    message, hint = error.shown(flags)
    tell(f"error: {message}" + f"\n  {hint}" * bool(hint))


def _drop_stdout() -> None:
    """Keep the interpreter from complaining a second time when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
