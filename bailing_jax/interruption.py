"""Ctrl-C that Python itself would lose.

A signal's exception is raised wherever the main thread happens to be. Inside a callback of the
garbage collector (jax has one) or a finaliser nobody can catch it: Python prints "Exception
ignored in" and goes on, and the command with it, for as long as it has work.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator

# Long enough to leave the callback; if it lands in another one, it is raised once more.
_AGAIN_S = 0.01


@contextlib.contextmanager
def not_lost() -> Iterator[None]:
    """While it runs, an interruption that a callback swallowed is raised again after it.

    It is raised in the main thread, as what it was: KeyboardInterrupt or a subclass.
    """
    before = sys.unraisablehook
    main_thread = threading.main_thread()
    timers: list[threading.Timer] = []

    def hook(lost: sys.UnraisableHookArgs) -> None:
        ours = issubclass(lost.exc_type, KeyboardInterrupt)
        if ours and threading.current_thread() is main_thread:
            timer = threading.Timer(_AGAIN_S, _raise_in, (main_thread, lost.exc_type))
            timer.daemon = True
            timers.append(timer)
            timer.start()
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


def _raise_in(thread: threading.Thread, kind: type[BaseException]) -> None:
    assert thread.ident is not None
    identity, raised = ctypes.c_ulong(thread.ident), ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, raised)
