"""A job of several processes: process 0 runs it, the others take every step with it.

`Leader` stands before process 0's engine: what the job does to it is ordered of the others first,
so that all engines are given the same requests in the same order and take the same steps; an
engine's decisions depend on nothing else. `follow` is the others' side. After every step the
others report a checksum of all their tokens; where it differs the job ends, and process 0 never
runs further ahead than `AHEAD` steps. No jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import traceback
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from bailing_jax.agreement import agree, facts_of_values
from bailing_jax.distributed import leave
from bailing_jax.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, UserError
from bailing_jax.group import AT_ONCE, Group, stop_signals
from bailing_jax.sampling_params import from_mapping

if TYPE_CHECKING:
    from bailing_jax.engine.limits import EngineLimits
    from bailing_jax.llm import LLM
    from bailing_jax.request import Request, StreamPiece

# Steps process 0 may be ahead of the slowest. Collectives keep all together anyway.
AHEAD = 4


class _Checksum:
    """Of all tokens so far, in the order in which the engine delivered them."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, piece: StreamPiece) -> None:
        """Take one token."""
        self.value = zlib.crc32(piece.token_id.to_bytes(4, "little"), self.value)


class Leader:
    """Process 0's engine, and through it everybody's; what `job.run_job` needs of an LLM.

    Args:
        llm: process 0's own.
        group: the processes.
    """

    def __init__(self, llm: LLM, group: Group) -> None:
        self._llm = llm
        self._group = group
        _meet_after_compiling(llm, group)
        self._tokens = _Checksum()
        self._steps: list[int] = []  # checksums of those not yet reported by all
        self._taken = self._compared = 0
        self.limits: EngineLimits = llm.limits
        # What is computed without side effects needs nobody else.
        self.prepare = llm.prepare
        self.encode = llm.encode
        self.chat_prompt = llm.chat_prompt
        self.watch_compiling = llm.watch_compiling
        self.is_unfinished = llm.is_unfinished
        self.cancel = llm.cancel

    def submit(self, request: Request, on_piece: Callable[[StreamPiece], None]) -> None:
        """Queue a prepared request everywhere."""
        self._group.steps_run = True
        self._group.order(
            "submit",
            prompt=request.prompt_token_ids,
            params=dataclasses.asdict(request.params),
        )

        def listen(piece: StreamPiece) -> None:
            self._tokens.add(piece)
            on_piece(piece)

        self._llm.submit(request, listen)

    def step(self) -> None:
        """Run one step everywhere.

        Raises:
            KeyboardInterrupt, Terminated: somebody wished to stop at once.
            UserError: the processes have different tokens.
        """
        if self._group.stop == AT_ONCE:
            raise Terminated if self._group.stop_code == EXIT_TERMINATED else KeyboardInterrupt
        self._group.order("step")
        self._llm.step()
        self._steps.append(self._tokens.value)
        self._taken += 1
        if self._taken - self._compared > AHEAD:
            self._compare()

    def settle(self) -> None:
        """Wait until all others have taken all steps too."""
        while self._compared < self._taken:
            self._compare()

    def _compare(self) -> None:
        ours = self._steps.pop(0)
        self._compared += 1
        for number, message in self._group.reports(f"step {self._compared}").items():
            if message["tokens"] != ours:
                raise UserError(
                    f"{self._group.name(number)} has other tokens than {self._group.name()} since "
                    f"step {self._compared}",
                    "Hosts must be of one kind. If they are, this is a fault of the program: "
                    "please report it. Finished answers are kept.",
                )


def follow(group: Group, load: Callable[[], LLM]) -> int:
    """Take process 0's steps until it ends the job; returns the exit code it gives.

    Args:
        group: the processes.
        load: makes the engine, if there is anything to do.
    """
    order = group.next_order()
    if order["order"] == "end":
        return order["code"]
    llm = load()
    _meet_after_compiling(llm, group)
    tokens, steps = _Checksum(), 0
    group.steps_run = True
    while True:
        order = group.next_order()
        if order["order"] == "submit":
            params = from_mapping(order["params"], "a request")
            llm.submit(llm.prepare(order["prompt"], params), tokens.add)
        elif order["order"] == "step":
            llm.step()
            steps += 1
            group.report(f"step {steps}", tokens=tokens.value)
        elif order["order"] == "end":
            return order["code"]


def take_part(group: Group, work: Callable[[], int]) -> int:
    """Do this process' part of a job; however it ends, the others end with it.

    Args:
        group: the processes.
        work: on process 0 the whole job, with a `Leader`; on the others what ends with `follow`.

    Returns:
        The exit code, the same everywhere, after a regular end (`group.is_finished`).

    Raises:
        UserError: what went wrong here; the others know. This process must end without waiting for
            anybody.
        KeyboardInterrupt: likewise, or after a regular end that somebody wished for; `Terminated`
            is one.
    """
    try:
        with stop_signals(group):
            code = work()
            group.finish(code)
            return code
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        code = EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
        if group.leads and group.steps_run and group.stop:
            group.finish(code)  # at a step all agree on
        else:
            group.fail("terminated" if terminated else "interrupted", code)
        raise
    except UserError as error:
        _fail(group, error)
    except Exception as error:
        # Who lost somebody in the middle of a collective gets here too: let that be said first.
        group.await_verdict()
        traceback.print_exc()
        name = type(error).__name__
        _fail(group, UserError(f"the program failed ({name}); its traceback stands on its stderr"))


def end(group: Group, code: int) -> int:
    """Leave: in order after a regular end, else at once, for jax would wait for the others."""
    if group.is_finished:
        leave()
        group.close()
        return code
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def agree_on_sizes(group: Group, limits: EngineLimits) -> None:
    """See that all engines come out alike: how many pages fit depends on each host's memory.

    Raises:
        UserError: they do not.
    """
    facts = facts_of_values(dataclasses.asdict(limits), "engine ")
    hint = (
        "How many pages fit follows from each host's memory. Smaller --max-num-seqs or "
        "--max-model-len leave room for all of them everywhere; or take hosts of one kind."
    )
    agree(group, facts, "sizes", hint)


def _meet_after_compiling(llm: LLM, group: Group) -> None:
    """Have all compile a program before any runs it.

    On CPUs gloo gives whoever comes last to a collective half a minute.
    """
    numbers = itertools.count(1)
    llm.meet_after_compiling(lambda: agree(group, {}, f"program {next(numbers)}"))


def _fail(group: Group, error: UserError) -> NoReturn:
    group.fail(error.message, error.exit_code)
    raise UserError(
        f"{group.name()}: {error.message}", error.hint, error.exit_code, options=error.options
    ) from error
