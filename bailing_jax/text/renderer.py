"""Running a chat template: Jinja's immutable sandbox inside a child process with limits.

A sandbox alone does not bound work: nested loops, doubled strings and huge powers run in C, where
no check in this process would see them. So the child has a memory limit and a kernel timer. It
starts at the first render (about 0.1 s), serves all others (about 0.1 ms each) and is replaced
when a template ends it. This process only looks at the template's syntax.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, NoReturn

from bailing_jax.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARACTERS = 4_000_000
MAX_MEMORY_BYTES = 512 << 20
MAX_ERROR_CHARACTERS = 500
TIME_LIMIT_S = 1.5


class Renderer:
    """Renders one template; `where` names its file. Safe to share between threads."""

    def __init__(
        self, source: str, where: str, special_tokens: Mapping[str, str], time_limit_s: float
    ) -> None:
        """`special_tokens` are variables such as `bos_token`, given to every render."""
        self._source = source
        self._where = where
        self._special_tokens = dict(special_tokens)
        self._time_limit_s = time_limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text the template makes of these variables.

        Raises:
            UserError: the template fails, or exceeds its time, memory or output.
        """
        request, answer, status = json.dumps(variables).encode() + b"\n", b"", None
        with self._lock:
            # Ours again only with the answer read: after Ctrl-C the next caller must not read it.
            child, self._child = self._child, None
            if child is None or child.poll() is not None:
                child = self._start()
            try:
                answer = _exchange(child, request)
            finally:
                if answer:
                    self._child = child
                else:
                    status = _stop(child)
        if not answer:
            raise self._died(status)
        reply = json.loads(answer)
        if "error" in reply:
            hint = "Change the messages or the template's arguments, or leave out the template."
            raise UserError(f"{self._where}{reply['error']}", hint, EXIT_USAGE)
        return reply["text"]

    def _start(self) -> subprocess.Popen[bytes]:
        # `-P` keeps the working folder off the path: the child imports from where we do.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        program = "from bailing_jax.text import renderer; renderer._serve()"
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        weakref.finalize(self, _stop, child)
        setup = [self._source, self._special_tokens, self._time_limit_s]
        _pipe(child.stdin).write(json.dumps(setup).encode() + b"\n")
        return child

    def _died(self, status: int | None) -> UserError:
        slow = f"took longer than {self._time_limit_s} s to render"
        what = slow if status == -signal.SIGALRM else f"ended its renderer (status {status})"
        hint = "The template is broken or hostile: use the one released with the checkpoint."
        return UserError(f"{self._where}: the chat template {what}", hint)


_OTHER_TEMPLATE = "Use the template released with the checkpoint."


def check_syntax(source: str, where: str) -> None:
    """Raise UserError unless Jinja can parse the template."""
    from jinja2 import TemplateSyntaxError

    try:
        _environment().parse(source)
    except TemplateSyntaxError as error:
        what = f"{where}, line {error.lineno} of the chat template: {error.message}"
        raise UserError(what, _OTHER_TEMPLATE, EXIT_USAGE) from error
    except RecursionError as error:
        what = f"{where}: the chat template nests too deep"
        raise UserError(what, _OTHER_TEMPLATE, EXIT_USAGE) from error


# The parent's side of the child process.


def _exchange(child: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The child's answer, b"" when it died; its own timer bounds the wait."""
    try:
        _pipe(child.stdin).write(request)
        _pipe(child.stdin).flush()
    except BrokenPipeError:
        return b""
    answer = _pipe(child.stdout).readline()
    return answer if answer.endswith(b"\n") else b""


def _stop(child: subprocess.Popen[bytes]) -> int:
    """End the child (it leaves when its input closes) and return its exit status."""
    with contextlib.suppress(BrokenPipeError):
        _pipe(child.stdin).close()
    try:
        return child.wait(timeout=1)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
    finally:
        _pipe(child.stdout).close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "the child was started with pipes"
    return stream


# The child's side: everything Jinja does with a template, but for the first look at its syntax.


def _serve() -> None:
    """Serve renders, one JSON line each, until the input closes or the kernel ends this process."""
    import resource

    source, special_tokens, time_limit_s = json.loads(sys.stdin.buffer.readline())
    # A parent that ignores or blocks the signal would have passed that on.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(ValueError, OSError):  # macOS has this limit, but may not set it
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    compiled = functools.cache(_environment().from_string)
    for request in sys.stdin.buffer:
        # No Python handler: the default action ends the process, even inside a C call.
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)
        answer = _answer(lambda: compiled(source), special_tokens, request)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(
    template: Callable[[], Template], special_tokens: Mapping[str, str], request: bytes
) -> dict[str, str]:
    parts: list[str] = []
    room = MAX_OUTPUT_CHARACTERS
    try:
        for part in template().generate({**special_tokens, **json.loads(request)}):
            parts.append(part)
            room -= len(part)
            if room < 0:
                return {"error": f": the prompt is longer than {MAX_OUTPUT_CHARACTERS} characters"}
    except MemoryError:
        return {"error": ": the chat template needs too much memory"}
    except Exception as error:
        # Whatever a template raises is its own fault; Jinja gives its frames template lines.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f", line {line} of the chat template" if line else ": the chat template"
        return {"error": f"{where}: {str(error)[:MAX_ERROR_CHARACTERS] or type(error).__name__}"}
    return {"text": "".join(parts)}


def _environment() -> ImmutableSandboxedEnvironment:
    """The only place that makes a Jinja environment; options and names are those of HF."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
