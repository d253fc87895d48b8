"""The engine: requests in, tokens out, many sequences in one step.

It owns the state and the books of its shards (one, or those of a mesh, see `shards`), asks them for
a plan, lays the step out, runs the program and hands the tokens to the requests. What a request
does with a token (text, stop rules) is its own business: it says after each token whether it is
done. What a request's listener raises ends that request alone, and so do logits of its own that are
not finite; what the step itself raises ends them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.engine import calls, debug, sampler, sizes
from bailing_jax.engine.calls import Call
from bailing_jax.engine.limits import DECODE_STEPS, EngineLimits
from bailing_jax.engine.programs import NOTHING, STOP_IDS, Programs, go_on
from bailing_jax.engine.scheduler import Scheduler, Sequence
from bailing_jax.engine.shards import CallPlan, Shards, call_of_nobody
from bailing_jax.engine.sizes import ProgramSize
from bailing_jax.engine.warming import compile_all
from bailing_jax.errors import NotFiniteError
from bailing_jax.sampling_params import SamplingParams
from bailing_jax.state import DecodeState, StateSpec, allocate

# Called with a token and its log probabilities; returns whether the request is done.
OnToken = Callable[[int, dict[int, float] | None], bool]
OnError = Callable[[Exception], None]
NewState = Callable[[StateSpec], DecodeState]


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

    def end(self) -> tuple[int, tuple[int, ...]]:
        """Tokens that may still come, and the ids that end it."""
        return self.sequence.max_length - len(self.sequence.tokens), self.stop_ids


class Engine:
    """Runs requests to their end; `step` until `has_work` is False.

    Attributes:
        on_compile: called with its sizes in words before a program has to be compiled in a step.
        on_compiled: called afterwards, before the program runs; of several processes at the same
            point of the same step.
    """

    def __init__(
        self,
        programs: Programs,
        config: ModelConfig,
        limits: EngineLimits,
        spec: StateSpec,
        new_state: NewState | None = None,
    ) -> None:
        """Allocate the state.

        Args:
            programs: for `limits.num_shards` shards.
            config: the model's.
            limits: of each shard.
            spec: the state of each shard.
            new_state: makes the zero state of such a spec, the shards side by side along the first
                axis of each leaf; None: on one device.
        """
        debug.check_processes()
        self._programs = programs
        self._config = config
        self._limits = limits
        self._spec = spec
        self._new_state = new_state
        self._count = 0
        self.on_compile: Callable[[str], None] = _ignore
        self.on_compiled: Callable[[], None] = _ignore
        self._start_afresh()

    def _start_afresh(self) -> None:
        """No requests, free ledgers and a new state."""
        self._requests: dict[int, _Request] = {}
        self._shards = Shards(
            self._limits,
            self._spec.num_pages - 1,
            lambda: debug.start(self._config, self._limits.page_size),
        )
        self._state = DecodeState(())  # gives the old one's memory back first
        if self._new_state is None:
            self._state = allocate(self._config, self._spec)
        else:
            self._state = self._new_state(self._spec)
        # A call that was started before the tokens of the one before it were seen.
        self._ahead: Call | None = None

    @property
    def _scheduler(self) -> Scheduler:
        """The first shard's, the only one on one device."""
        return self._shards.all[0].scheduler

    @property
    def _debug(self) -> debug.Debug:
        """The first shard's, the only one on one device."""
        return self._shards.all[0].debug

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._shards.has_work

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
            self._shards.submit(sequence)
        except BaseException:
            self.cancel(number)
            raise
        return number

    def cancel(self, number: int) -> None:
        """End a request at once; unknown or finished ones are ignored."""
        request = self._requests.pop(number, None)
        if request is not None:
            self._shards.remove(request.sequence)

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
        plan = call_of_nobody(size, self._limits.num_shards)
        layout = calls.joined(calls.layouts(plan, self._limits))
        self._programs.compile_step(self._state, layout)
        if refines:
            self._programs.compile_refine(plan.rows_a_shard, self._config.vocab_size)

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
            begun, self._ahead = [self._ahead] if self._ahead is not None else [], None
            if not begun:
                plans = self._shards.plan(
                    budget=budget, cuts=cuts, preempt=preempt, max_steps=max_steps
                )
                # All calls are on their way before the first result is waited for.
                begun = [self._call(plan) for plan in plans]
            if ahead and len(begun) == 1:
                self._ahead = self._call_on(begun[0], max_steps)
            for call in begun:
                self._finish(call)
            if not self._shards.is_running:
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

    def _call(self, plan: CallPlan) -> Call:
        """Start a program; its results come later."""
        size = plan.size
        layouts = calls.layouts(plan, self._limits)
        layout = calls.joined(layouts)
        if not self._programs.has_step(layout):
            self.on_compile(size.in_words())
            self._programs.compile_step(self._state, layout)
            self.on_compiled()
        requests = {row: self._requests[s.number] for row, s in plan.rows().items()}
        knobs = calls.knobs(plan, {row: (r.params, r.seed) for row, r in requests.items()})
        ends = None
        if not size.prefill_rows:
            ends = calls.ends(plan, {row: r.end() for row, r in requests.items()})
        self._state = self._shards.before(plan, layouts, self._state)
        result = self._programs.step(self._state, layout, knobs, ends, plan.num_steps)
        self._state = result.state
        self._shards.after(self._state, result.logits)
        return Call(plan, layout, knobs, ends, result)

    def _call_on(self, call: Call, max_steps: int) -> Call | None:
        """Start the call behind one whose tokens only the device knows; None where none may be.

        A row that has ended there names NULL in this call too. One that ends for a reason only the
        host knows is computed in vain, in what it still holds.
        """
        # Debug mode compares every call with what the host knows.
        if self._debug.on or call.ends is None or call.result.behind is None:
            return None
        plan = self._shards.plan_on(call.plan, max_steps)
        if plan is None:
            return None
        layout = calls.joined(calls.layouts(plan, self._limits))
        layout, ends = go_on(layout, call.ends, call.result.behind)
        result = self._programs.step(self._state, layout, call.knobs, ends, plan.num_steps)
        self._state = result.state
        return Call(plan, layout, call.knobs, ends, result)

    def _finish(self, call: Call) -> None:
        """Wait for a call, fold what it computed into the books and deliver its tokens."""
        plan, tokens = call.plan, call.tokens()
        self._shards.commit(plan, (tokens != NOTHING).sum(axis=0).tolist())
        # A sequence that is computed again knows its next token already.
        several = plan.num_steps > 1
        wanting = {
            row: self._requests[sequence.number]
            for row, sequence in plan.rows().items()
            if sequence.number in self._requests
            and (several or sequence.num_computed == len(sequence.tokens))
        }
        entries = self._refine(call, wanting, tokens)
        for step in tokens[: plan.num_steps].tolist():
            for row, request in wanting.items():
                # A listener may have ended anybody meanwhile.
                alive = self._requests.get(request.sequence.number) is request
                if alive and step[row] == sampler.NOT_FINITE:
                    self._fail(request, _not_finite(request.sequence))
                elif alive and step[row] != NOTHING:
                    self._deliver(request, step[row], entries.get(row))

    def _refine(
        self, call: Call, wanting: Mapping[int, _Request], tokens: np.ndarray
    ) -> dict[int, dict[int, float] | None]:
        """Log probabilities by row, and the edited rows' tokens, put into `tokens`.

        Each shard that needs it by itself: the host's part is an array as large as the logits.
        """
        entries: dict[int, dict[int, float] | None] = {}
        count = call.plan.rows_a_shard
        needing = [r for r, request in wanting.items() if sampler.needs_host(request.params)]
        for shard in sorted({row // count for row in needing}):
            first = shard * count
            mine = {r - first: wanting[r] for r in wanting if r // count == shard}
            if not self._programs.has_refine(count):
                self.on_compile(f"penalties and log probabilities of {count} rows")
                self._programs.compile_refine(count, self._config.vocab_size)
                self.on_compiled()
            rows, choices = call.of_shard(shard), [request.choice() for request in mine.values()]
            refined = self._programs.refine(
                rows.logits,
                tokens[0, first : first + count],
                sampler.edits(rows.logits.shape, list(mine), choices),
                rows.knobs,
                rows.positions,
            )
            tokens[0, first : first + count] = refined.tokens
            counts = [request.params.logprobs for request in mine.values()]
            found = sampler.logprobs(refined, list(mine), counts)
            entries |= {first + row: entry for row, entry in zip(mine, found, strict=True)}
        return entries

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


def _not_finite(sequence: Sequence) -> NotFiniteError:
    made = len(sequence.tokens) - sequence.num_prompt
    return NotFiniteError(
        f"the model's logits are not finite (NaN or infinity) after {sequence.num_prompt} prompt "
        f"tokens and {made} generated",
        "Try dtype = float32 and state_dtype = float32; if it stays, the checkpoint is at fault.",
        options=("dtype", "state_dtype"),
    )


def _ignore(*_what: object) -> None:
    """What becomes of a report nobody asked for."""
