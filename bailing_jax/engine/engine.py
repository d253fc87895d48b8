"""The engine: requests in, tokens out, many sequences in one step.

It owns the state and the ledgers, asks the scheduler for a plan, lays the step out, runs the
program and hands the tokens to the requests. What a request does with a token (text, stop rules)
is its own business: it says after each token whether it is done. What a request's listener raises
ends that request alone, and so do logits of its own that are not finite; what the step itself
raises ends them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bailing_jax.batch import BatchLayout, pack
from bailing_jax.config import ModelConfig
from bailing_jax.engine import debug, sampler, sizes
from bailing_jax.engine.limits import DECODE_STEPS, EngineLimits
from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.programs import (
    NOTHING,
    STOP_IDS,
    Ends,
    Programs,
    StepResult,
    go_on,
    no_ends,
)
from bailing_jax.engine.sampler import Knobs
from bailing_jax.engine.scheduler import Scheduler, Sequence, StepPlan
from bailing_jax.engine.sizes import ProgramSize
from bailing_jax.engine.slots import SlotLedger
from bailing_jax.engine.warming import compile_all
from bailing_jax.errors import NotFiniteError
from bailing_jax.row import Row
from bailing_jax.sampling_params import SamplingParams
from bailing_jax.state import DecodeState, StateSpec, allocate

# Called with a token and its log probabilities; returns whether the request is done.
OnToken = Callable[[int, dict[int, float] | None], bool]
OnError = Callable[[Exception], None]


@dataclass(frozen=True, eq=False)
class _Request:
    sequence: Sequence
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    on_token: OnToken
    on_error: OnError

    def choice(self) -> sampler.Choice:
        """What the sampler is told."""
        sequence = self.sequence
        return sampler.Choice(
            self.params, sequence.tokens, self.seed, num_prompt=sequence.num_prompt
        )


class _Call(NamedTuple):
    """A program on its way: the part of the plan it computes, how it was laid out, what it gives.

    `tokens`, `logits` and the new state of `result` may not be there yet.
    """

    plan: StepPlan
    layout: BatchLayout
    knobs: Knobs
    ends: Ends | None
    result: StepResult


class Engine:
    """Runs requests to their end; `step` until `has_work` is False.

    Attributes:
        on_compile: called with its sizes in words before a program has to be compiled.
    """

    def __init__(
        self, programs: Programs, config: ModelConfig, limits: EngineLimits, spec: StateSpec
    ) -> None:
        self._programs = programs
        self._config = config
        self._limits = limits
        self._spec = spec
        self._count = 0
        self.on_compile: Callable[[str], None] = _ignore
        self._start_afresh()

    def _start_afresh(self) -> None:
        """No requests, free ledgers and a new state."""
        self._requests: dict[int, _Request] = {}
        self._scheduler = Scheduler(
            slots=SlotLedger(self._limits.max_num_seqs),
            pages=PageLedger(self._spec.num_pages - 1, self._limits.page_size),
            prefill_chunk=self._limits.prefill_chunk,
            max_segments=sizes.max_segments(self._limits),
            exact=self._limits.exact,
            prefill_rows=sizes.prefill_rows(self._limits),
        )
        self._state = DecodeState(())  # gives the old one's memory back first
        self._state = allocate(self._config, self._spec)
        self._debug = debug.start(self._config, self._limits.page_size)
        # A call that was started before the tokens of the one before it were seen.
        self._ahead: _Call | None = None

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    def is_unfinished(self, number: int) -> bool:
        """Whether the request of this number has tokens to come."""
        return number in self._requests

    def new_number(self) -> int:
        """The number of a request to come; until it is submitted it is as one that finished."""
        self._count += 1
        return self._count

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        on_token: OnToken,
        number: int | None = None,
        *,
        stop_ids: Collection[int] = (),
        on_error: OnError | None = None,
    ) -> int:
        """Queue a request of resolved params; returns its number.

        Who gives the number, from `new_number`, can cancel whatever Ctrl-C leaves of this.

        Args:
            prompt: at least one token.
            params: resolved.
            seed: of its random numbers.
            on_token: called with every token; if it raises an Exception, this request is over.
            number: from `new_number`.
            stop_ids: tokens after which on_token says that it is done, so that a call that runs
                several steps computes nothing behind them.
            on_error: called with what on_token raised, or a NotFiniteError.
        """
        number = self.new_number() if number is None else number
        length = min(len(prompt) + params.max_tokens, self._limits.max_model_len)
        ahead = not sampler.needs_host(params)
        sequence = Sequence(number, list(prompt), len(prompt), length, several_steps=ahead)
        known = tuple(sorted(stop_ids))[:STOP_IDS]
        self._requests[number] = _Request(
            sequence, params, seed, known, on_token, on_error or _ignore
        )
        try:
            self._scheduler.submit(sequence)
        except BaseException:
            self.cancel(number)
            raise
        return number

    def cancel(self, number: int) -> None:
        """End a request at once; unknown or finished ones are ignored."""
        request = self._requests.pop(number, None)
        if request is not None:
            self._scheduler.remove(request.sequence)

    def warm_up(self, num_prompt: int, params: SamplingParams) -> None:
        """Compile what one request of resolved params and this prompt length runs.

        Nothing runs on the state: only shapes are needed.
        """
        needed = [
            size
            for size in sizes.prompt_programs(self._limits, num_prompt)
            if size.prefill_rows or params.max_tokens > 1
        ]
        for size in needed:
            self._compile(size, refines=sampler.needs_host(params))

    def warm_up_all(self, report: Callable[[str], None]) -> None:
        """Compile every program these limits can need, several at a time.

        Args:
            report: called with a line as each is done.
        """
        compile_all(
            {
                size.in_words(): lambda size=size: self._compile(size, refines=True)
                for size in sizes.job_programs(self._limits)
            },
            report,
        )

    def _compile(self, size: ProgramSize, *, refines: bool) -> None:
        layout = self._pack([], [], size)
        self._programs.compile_step(self._state, layout)
        if refines:
            self._programs.compile_refine(layout.logit_rows.shape[0], self._config.vocab_size)

    def step(
        self,
        *,
        budget: int | None = None,
        cuts: Mapping[int, int] | None = None,
        preempt: Collection[int] = (),
        max_steps: int = DECODE_STEPS,
        ahead: bool = True,
    ) -> None:
        """Run one step and deliver its tokens. If that fails, every request is over.

        Where nobody prefills and the host has nothing to do in between, one call decodes up to
        `max_steps` tokens of every request, and with `ahead` the next one is started before the
        tokens of this one are seen. The other arguments are wishes of a test, see `Scheduler.plan`.
        """
        try:
            if self._ahead is not None and (budget is not None or cuts or preempt):
                self._settle()
            # Nothing is handed out while a call is on its way: what a request held that ended
            # meanwhile can be taken only by a plan made after the last call that names it.
            calls, self._ahead = [self._ahead] if self._ahead is not None else [], None
            if not calls:
                plan = self._scheduler.plan(
                    budget=budget, cuts=cuts, preempt=preempt, max_steps=max_steps
                )
                # All calls are on their way before the first result is waited for.
                calls = [self._call(part) for part in self._parts(plan)]
            if ahead and len(calls) == 1:
                self._ahead = self._call_on(calls[0], max_steps)
            for call in calls:
                self._finish(call)
            if not self._scheduler.running:
                self._settle()
        except BaseException:
            # The state may be given away and a plan half done (Ctrl-C comes anywhere): nothing
            # that was running can be trusted to go on.
            self._start_afresh()
            raise

    def _settle(self) -> None:
        """Wait for the call that was started ahead, if there is one."""
        call, self._ahead = self._ahead, None
        if call is not None:
            self._finish(call)

    def _parts(self, plan: StepPlan) -> list[StepPlan]:
        """What runs as one call: in exact mode decode and prefill each, else all together."""
        parts = [plan]
        if self._limits.exact:
            parts = [StepPlan(plan.decodes, (), plan.num_steps), StepPlan((), plan.segments)]
        return [part for part in parts if part.decodes or part.segments]

    def _call(self, plan: StepPlan) -> _Call:
        """Start a program; its results come later."""
        if plan.segments:
            size = sizes.prefill_size(self._limits, plan.num_prefill_tokens)
        else:
            size = sizes.decode_size(self._limits, len(plan.decodes))
        layout = self._pack(plan.decode_rows(), plan.segment_rows(), size)
        if not self._programs.has_step(layout):
            self.on_compile(size.in_words())
        sequences = _rows(plan, size.decode_rows)
        requests = [self._requests[sequence.number] for sequence in sequences.values()]
        knobs = sampler.knobs(
            size.decode_rows + size.segments,
            list(sequences),
            [(request.params, request.seed) for request in requests],
        )
        ends = None
        if not plan.segments:
            ends = no_ends(size.decode_rows)
            for row, request in enumerate(requests):
                sequence, stop_ids = request.sequence, request.stop_ids
                ends.room[row] = sequence.max_length - len(sequence.tokens)
                ends.stop_ids[row, : len(stop_ids)] = stop_ids
        self._state = self._debug.before(plan, layout, self._state, self._scheduler)
        result = self._programs.step(self._state, layout, knobs, ends, plan.num_steps)
        self._state = result.state
        self._debug.after(self._state, result.logits)
        return _Call(plan, layout, knobs, ends, result)

    def _call_on(self, call: _Call, max_steps: int) -> _Call | None:
        """Start the call behind one whose tokens only the device knows; None where none may be.

        A row that has ended there names NULL in this call too. One that ends for a reason only the
        host knows is computed in vain, in what it still holds.
        """
        # Debug mode compares every call with what the host knows.
        if self._debug.on or call.ends is None or call.result.behind is None:
            return None
        plan = self._scheduler.plan_on(call.plan, max_steps)
        if plan is None:
            return None
        layout = self._pack(plan.decode_rows(), [], ProgramSize(call.layout.num_decode, 0, 0))
        layout, ends = go_on(layout, call.ends, call.result.behind)
        result = self._programs.step(self._state, layout, call.knobs, ends, plan.num_steps)
        self._state = result.state
        return _Call(plan, layout, call.knobs, ends, result)

    def _finish(self, call: _Call) -> None:
        """Wait for a call, fold what it computed into the books and deliver its tokens."""
        plan, layout, knobs, _, result = call
        tokens = np.array(result.tokens)
        came = (tokens != NOTHING).sum(axis=0).tolist()
        self._scheduler.commit(plan, {s.number: came[row] for row, s in enumerate(plan.decodes)})
        # A sequence that is computed again knows its next token already.
        several = plan.num_steps > 1
        wanting = {
            row: self._requests[sequence.number]
            for row, sequence in _rows(plan, layout.num_decode).items()
            if sequence.number in self._requests
            and (several or sequence.num_computed == len(sequence.tokens))
        }
        entries: list[dict[int, float] | None] = [None] * len(wanting)
        if any(sampler.needs_host(request.params) for request in wanting.values()):
            rows = layout.logit_rows.shape[0]
            if not self._programs.has_refine(rows):
                self.on_compile(f"penalties and log probabilities of {rows} rows")
            choices = [request.choice() for request in wanting.values()]
            refined = self._programs.refine(
                result.logits,
                tokens[0],
                sampler.edits(result.logits.shape, list(wanting), choices),
                knobs,
                layout.positions[layout.logit_rows] + 1,
            )
            tokens = np.asarray(refined.tokens)[None]
            counts = [request.params.logprobs for request in wanting.values()]
            entries = sampler.logprobs(refined, list(wanting), counts)
        for step in tokens[: plan.num_steps].tolist():
            for (row, request), entry in zip(wanting.items(), entries, strict=True):
                # A listener may have ended anybody meanwhile.
                alive = self._requests.get(request.sequence.number) is request
                if alive and step[row] == sampler.NOT_FINITE:
                    self._fail(request, _not_finite(request.sequence))
                elif alive and step[row] != NOTHING:
                    self._deliver(request, step[row], entry)

    def _deliver(self, request: _Request, token: int, entry: dict[int, float] | None) -> None:
        sequence = request.sequence
        sequence.tokens.append(token)
        try:
            done = request.on_token(token, entry)
        except Exception as error:
            self._fail(request, error)
            return
        if done or len(sequence.tokens) >= sequence.max_length:
            self.cancel(sequence.number)

    def _fail(self, request: _Request, error: Exception) -> None:
        """End one request because of something of its own."""
        self.cancel(request.sequence.number)
        request.on_error(error)

    def _pack(
        self, decodes: list[Row], segments: list[Row], size: ProgramSize
    ) -> BatchLayout:
        return pack(
            decodes,
            segments,
            num_decode=size.decode_rows,
            num_prefill=size.prefill_rows,
            num_segments=size.segments,
            page_size=self._limits.page_size,
            pages_a_sequence=self._limits.pages_a_sequence,
        )


def _rows(plan: StepPlan, num_decode: int) -> dict[int, Sequence]:
    """The sequences of a plan by their row among the D + P of the layout."""
    rows = dict(enumerate(plan.decodes))
    return rows | {num_decode + i: sequence for i, (sequence, _) in enumerate(plan.segments)}


def _not_finite(sequence: Sequence) -> NotFiniteError:
    made = len(sequence.tokens) - sequence.num_prompt
    return NotFiniteError(
        f"the model's logits are not finite (NaN or infinity) after {sequence.num_prompt} prompt "
        f"tokens and {made} generated",
        "Try dtype = float32 and state_dtype = float32; if it stays, the checkpoint is at fault.",
        options=("dtype", "state_dtype"),
    )


def _ignore(_what: object) -> None:
    """What becomes of a report nobody asked for."""


def fresh_seed() -> int:
    """A seed for a request that names none."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
