"""The job mode of the generate command: a file of requests in, a file of answers out.

Everything that can be refused is refused before the first step: the lines of the input before the
model is loaded, the prompts before anything runs. Each answer is written as soon as it is
finished, so a job that ended early, however, goes on where it was; an answer depends on its own
line and the flags only. No jax before `load`.

Input, one object a line: "id" (default: the line's number), one of "prompt", "messages" and
"prompt_ids", and any field of SamplingParams. Output, in order of completion: {"id", "text",
"token_ids", "finish_reason", "usage"}, with "logprobs" if asked for; with n > 1 {"id", "outputs":
[{"text", "token_ids", "finish_reason"}, ...], "usage"}. An answer in which the model's logits were
not finite has finish_reason "error" and an "error" in words; the others go on, and the exit code is
1. An answer that can't be given for any other reason ends the job.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from bailing_jax.cli.job_input import Mistakes, RequestId, Requests
from bailing_jax.cli.job_output import KEPT, Output, record_of
from bailing_jax.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_USAGE,
    Interrupted,
    NotFiniteError,
    UserError,
)
from bailing_jax.terminal import is_terminal

if TYPE_CHECKING:
    from bailing_jax.llm import LLM
    from bailing_jax.request import Request, StreamPiece

PROGRESS_S = 5.0

Say = Callable[[str], None]
# The request at a position of the input, ready to be submitted, and its id.
Prepare = Callable[[int], "tuple[RequestId, Request]"]


class Prompts(Protocol):
    """Makes token ids, as `prompts.PromptMaker` does."""

    def from_text(self, text: str) -> list[int]:
        """Of a "prompt"."""
        ...

    def from_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Of "messages"."""
        ...


def run_job(
    load: Callable[[], tuple[LLM, Prompts]],
    input_path: Path | None,
    output_path: Path | None,
    defaults: Mapping[str, object],
    say: Say,
) -> int:
    """Answer every request of the input that the output has no answer for.

    Args:
        load: makes the model; called once the input is known to be good, unless all is done.
        input_path: requests; None: stdin.
        output_path: answers; None: stdout, where nothing can be continued.
        defaults: sampling fields of the command, for lines that do not name them.
        say: called with each remark and line of progress.

    Returns:
        The exit code.

    Raises:
        UserError: with code 2, before anything is written; later, with code 1, what kept the job
            from going on.
        KeyboardInterrupt: after saying what is left.
    """
    check_paths(input_path, output_path)
    with Requests(input_path, defaults) as requests, Output(output_path, say) as output:
        done = output.read_done(requests)
        left = array("Q", (number for number, is_done in enumerate(done) if not is_done))
        requests.forget_ids()
        if left:
            found = len(requests) - len(left)
            say(f"{requests.name}: {len(requests)} requests" + f", {found} done" * bool(found))
            llm, prompts = load()
            prepare = functools.partial(_prepared, llm, prompts, requests)
            _check(prepare, requests, left, say)
            output.start()
            if failed := _Run(llm, prepare, requests, output, left, say).run():
                say(f"{failed} of {len(left)} answers ended with an error; their lines say which")
                return EXIT_FAILURE
        else:
            output.start()
            say(f"{output.name}: all {len(requests)} requests are done already")
    return EXIT_OK


def check_paths(input_path: Path | None, output_path: Path | None) -> None:
    """Refuse at once what no job can read from or write to; opens nothing.

    Raises:
        UserError: the input is missing, the output's folder is, or both are one file.
    """
    if input_path is not None and not os.path.exists(input_path):
        raise UserError(f"{input_path}: no such file", "It is the job's input.", EXIT_USAGE)
    source = _regular_file(sys.stdin if input_path is None else input_path)
    target = _regular_file(sys.stdout if output_path is None else output_path)
    if source and target and os.path.samestat(source, target):
        raise UserError(
            f"{input_path or output_path or 'stdin'}: both the job's input and its output",
            "Give another output.",
            EXIT_USAGE,
        )
    if output_path is None:
        return
    # The file a link leads to, which need not exist yet.
    path = os.path.realpath(output_path)
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise UserError(f"{output_path}: there is no folder {folder}", "Make it.", EXIT_USAGE)
    exists = os.path.exists(path)
    needed = os.R_OK | os.W_OK if exists else os.W_OK | os.X_OK
    if not os.access(path if exists else folder, needed):
        raise UserError(f"{output_path}: no permission to write it", exit_code=EXIT_USAGE)


def _regular_file(file: Path | TextIO | None) -> os.stat_result | None:
    try:
        if file is None:
            return None
        status = os.stat(file) if isinstance(file, Path) else os.fstat(file.fileno())
    except (OSError, ValueError):  # not there, closed, or no real file
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _prepared(
    llm: LLM, prompts: Prompts, requests: Requests, number: int
) -> tuple[RequestId, Request]:
    request = requests.load(number)
    ids = request.prompt
    if request.source == "prompt":
        ids = prompts.from_text(ids)
    elif request.source == "messages":
        ids = prompts.from_messages(ids)
    return request.id, llm.prepare(ids, request.params, request.source)


def _check(prepare: Prepare, requests: Requests, left: Sequence[int], say: Say) -> None:
    """See that the model can take every request; what it can't is listed."""
    mistakes = Mistakes(requests.name)
    said = time.monotonic()
    for count, number in enumerate(left, 1):
        with mistakes.on_line(requests.line(number)):
            prepare(number)
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            say(f"{count}/{len(left)} prompts checked")
    mistakes.check()


class _Run:
    """The loop: keeps the engine supplied and writes what is finished."""

    def __init__(
        self,
        llm: LLM,
        prepare: Prepare,
        requests: Requests,
        output: Output,
        left: Sequence[int],
        say: Say,
    ) -> None:
        self._llm = llm
        self._prepare = prepare
        self._requests = requests
        self._output = output
        self._left = left
        self._say = say
        self._submitted = self._written = self._failed = 0
        self._active: list[tuple[RequestId, Request]] = []
        self._progress = _Progress(len(requests), len(requests) - len(left))

    def run(self) -> int:
        """Answer them all; returns how many answers ended with an error."""
        self._llm.watch_compiling(self._compiles)
        try:
            while self._supply():
                with self._progress.step():
                    self._llm.step()
                self._write_finished()
                if self._progress.is_due():
                    self._say(self._progress.line(self._written))
            self._output.sync()
            self._say(self._progress.total(self._written))
            return self._failed
        except KeyboardInterrupt:
            self._output.sync()
            # A terminal has just shown ^C, and stays on its line.
            left = "\n" * is_terminal(sys.stderr)
            left += f"{len(self._left) - self._written} of {len(self._requests)} requests are left"
            self._say(left + "; the same command goes on" * self._output.goes_on)
            raise Interrupted from None
        finally:
            self._llm.watch_compiling(None)
            for _, request in self._active:
                self._llm.cancel(request)

    def _compiles(self, what: str) -> None:
        self._say(f"compiling {what}")
        self._progress.compiles()

    def _supply(self) -> bool:
        """Submit so many that no slot waits for one; returns whether there is work."""
        room = 2 * self._llm.limits.total_num_seqs
        room -= sum(request.params.n for _, request in self._active)
        while room > 0 and self._submitted < len(self._left):
            number = self._left[self._submitted]
            try:
                request_id, request = self._prepare(number)
            except UserError as error:  # the file changed, a template looks at the clock, ...
                where = f"{self._requests.name}, line {self._requests.line(number)}"
                hint = KEPT * self._output.goes_on
                raise UserError(f"{where}: {error.message}", hint) from error
            self._active.append((request_id, request))
            self._llm.submit(request, self._progress.token)
            self._submitted += 1
            room -= request.params.n
        return bool(self._active)

    def _write_finished(self) -> None:
        still_active: list[tuple[RequestId, Request]] = []
        for request_id, request in self._active:
            if self._llm.is_unfinished(request):
                still_active.append((request_id, request))
                continue
            if isinstance(request.error, NotFiniteError):
                self._failed += 1
            else:
                request.raise_error()
            self._output.write(record_of(request_id, request))
            self._written += 1
            self._progress.prompt_tokens += len(request.prompt_token_ids)
        self._active = still_active


class _Progress:
    """Clock and counters of this run; `found` requests were done before it.

    A step that compiles takes seconds where others take milliseconds, and there are few of them:
    neither its time nor its tokens count in rates and in what is foretold from them.
    """

    def __init__(self, total: int, found: int) -> None:
        self._total = total
        self._found = found
        self._tokens = self._tokens_compiling = 0
        self.prompt_tokens = 0
        self._start = self._said = time.monotonic()
        self._seconds_compiling = 0.0
        self._is_compiling = False

    def token(self, _piece: StreamPiece) -> None:
        """Count a generated token."""
        self._tokens += 1
        self._tokens_compiling += self._is_compiling

    def compiles(self) -> None:
        """Note that the step under way has to compile."""
        self._is_compiling = True

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around each step of the engine."""
        self._is_compiling = False
        start = time.monotonic()
        yield
        if self._is_compiling:
            self._said = time.monotonic()  # something was said: that it compiles
            self._seconds_compiling += self._said - start

    def is_due(self) -> bool:
        """Whether to say something again."""
        now = time.monotonic()
        if now - self._said < PROGRESS_S:
            return False
        self._said = now
        return True

    def line(self, written: int) -> str:
        """Where the job stands."""
        done = self._found + written
        left = ""
        if written:
            left = f", about {_duration(self._seconds() / written * (self._total - done))} left"
        return f"{done}/{self._total} requests, {self._rate() or 0:.1f} tokens/s{left}"

    def total(self, written: int) -> str:
        """What this run did."""
        took = _duration(time.monotonic() - self._start)
        if self._seconds_compiling:
            took += f" ({_duration(self._seconds_compiling)} of it compiling)"
        rate = self._rate()
        return (
            f"{self._found + written}/{self._total} requests; {written} in {took}: "
            f"{self.prompt_tokens} prompt tokens, {self._tokens} generated"
            + ("" if rate is None else f" at {rate:.1f}/s")
        )

    def _seconds(self) -> float:
        return time.monotonic() - self._start - self._seconds_compiling

    def _rate(self) -> float | None:
        """Tokens a second; None before there was a step that only ran."""
        tokens = self._tokens - self._tokens_compiling
        return tokens / self._seconds() if tokens else None


def _duration(seconds: float) -> str:
    """1:02:03, or 4.5 s where that is more telling."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
