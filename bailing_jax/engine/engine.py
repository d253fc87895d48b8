"""The engine: requests in, tokens out, many sequences in one step.

It owns the state and the ledgers, asks the scheduler for a plan, lays the step out, runs the
program, picks tokens and hands them to the requests. What a request does with a token (text,
stop rules) is its own business: it says after each token whether it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bailing_jax.batch import BatchLayout, pack
from bailing_jax.config import ModelConfig
from bailing_jax.engine import debug, sampler, sizes
from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.programs import Programs
from bailing_jax.engine.scheduler import Scheduler, Sequence, StepPlan
from bailing_jax.engine.sizes import ProgramSize
from bailing_jax.engine.slots import SlotLedger
from bailing_jax.row import Row
from bailing_jax.sampling_params import SamplingParams
from bailing_jax.state import DecodeState, StateSpec, allocate

# Called with a token and its log probabilities; returns whether the request is done.
OnToken = Callable[[int, dict[int, float] | None], bool]


@dataclass(frozen=True)
class EngineLimits:
    """The static sizes of an engine.

    Attributes:
        max_num_seqs: sequences that run at once.
        max_model_len: tokens of one sequence, prompt and answer.
        prefill_chunk: prefill tokens a step.
        page_size: tokens a page.
    """

    max_num_seqs: int
    max_model_len: int
    prefill_chunk: int
    page_size: int

    @property
    def pages_a_sequence(self) -> int:
        """The width of a page table."""
        return -(-self.max_model_len // self.page_size)

    def state_spec(self, page_dtype: str, state_dtype: str) -> StateSpec:
        """The state for that many sequences of full length, NULL slot and page included."""
        return StateSpec(
            num_slots=self.max_num_seqs + 1,
            num_pages=self.max_num_seqs * self.pages_a_sequence + 1,
            page_dtype=page_dtype,
            state_dtype=state_dtype,
            page_size=self.page_size,
        )


@dataclass(frozen=True)
class _Request:
    sequence: Sequence
    params: SamplingParams
    seed: int
    on_token: OnToken

    def choice(self) -> sampler.Choice:
        """What the sampler is told."""
        sequence = self.sequence
        return sampler.Choice(
            self.params, sequence.tokens, self.seed, num_prompt=sequence.num_prompt
        )


class Engine:
    """Runs requests to their end; `step` until `has_work` is False.

    Attributes:
        on_compile: called with its sizes in words before a step has to compile a program.
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
            prefill_budget=self._limits.prefill_chunk,
            max_segments=sizes.max_segments(self._limits),
        )
        self._state = DecodeState(())  # gives the old one's memory back first
        self._state = allocate(self._config, self._spec)
        self._debug = debug.start(self._config, self._limits.page_size)

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
    ) -> int:
        """Queue a request of resolved params; returns its number.

        Who gives the number, from `new_number`, can cancel whatever Ctrl-C leaves of this.
        """
        number = self.new_number() if number is None else number
        length = min(len(prompt) + params.max_tokens, self._limits.max_model_len)
        sequence = Sequence(number, list(prompt), len(prompt), length)
        self._requests[number] = _Request(sequence, params, seed, on_token)
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
        for size in sizes.prompt_programs(self._limits, num_prompt):
            if size.prefill_rows or params.max_tokens > 1:
                self._compile(size, params)

    def warm_up_all(self, params: SamplingParams, report: Callable[[str], None]) -> None:
        """Compile every program these limits can need, for requests of resolved params.

        Args:
            params: what is sampled with; other parameters may compile a sampler of their own.
            report: called with a line before each program.
        """
        programs = sizes.job_programs(self._limits)
        for i, size in enumerate(programs, start=1):
            report(f"compiling {i} of {len(programs)}: {size.in_words()}")
            self._compile(size, params)

    def _compile(self, size: ProgramSize, params: SamplingParams) -> None:
        layout = self._pack([], [], size)
        self._programs.compile_step(self._state, layout)
        logits = jnp.zeros((layout.logit_rows.shape[0], self._config.vocab_size), jnp.float32)
        sampler.sample(logits, [0], [sampler.Choice(params, [0], 0, num_prompt=1)])

    def step(self) -> None:
        """Run one step and deliver its tokens. If that fails, every request is over."""
        try:
            self._step()
        except BaseException:
            # The state may be given away and a plan half done (Ctrl-C comes anywhere): nothing
            # that was running can be trusted to go on.
            self._start_afresh()
            raise

    def _step(self) -> None:
        plan = self._scheduler.plan()
        layout = self._layout(plan)
        if not self._programs.has_step(layout):
            segments = layout.segment_slots.shape[0]
            size = ProgramSize(layout.num_decode, layout.num_prefill, segments)
            self.on_compile(size.in_words())
        self._state = self._debug.before(plan, layout, self._state, self._scheduler)
        logits, self._state = self._programs.step(self._state, layout)
        self._debug.after(self._state, logits)
        self._scheduler.commit(plan)
        wanting = list(enumerate(plan.decodes)) + [
            (layout.num_decode + i, sequence)
            for i, (sequence, _) in enumerate(plan.segments)
            if sequence.num_computed == len(sequence.tokens)
        ]
        rows = [row for row, _ in wanting]
        requests = [self._requests[sequence.number] for _, sequence in wanting]
        tokens = sampler.sample(
            logits,
            rows,
            [request.choice() for request in requests],
        )
        counts = [r.params.logprobs for r in requests]
        found = sampler.logprobs(logits, rows, tokens.tolist(), counts)
        for request, token, entry in zip(requests, tokens.tolist(), found, strict=True):
            self._deliver(request, token, entry)

    def _deliver(self, request: _Request, token: int, entry: dict[int, float] | None) -> None:
        sequence = request.sequence
        sequence.tokens.append(token)
        done = request.on_token(token, entry)
        if done or len(sequence.tokens) >= sequence.max_length:
            self.cancel(sequence.number)

    def _layout(self, plan: StepPlan) -> BatchLayout:
        """The step's arrays."""
        if plan.segments:
            size = sizes.prefill_size(self._limits, plan.num_prefill_tokens)
        else:
            size = sizes.decode_size(self._limits, len(plan.decodes))
        return self._pack(plan.decode_rows(), plan.segment_rows(), size)

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


def _ignore(_words: str) -> None:
    """What becomes of a report nobody asked for."""


def fresh_seed() -> int:
    """A seed for a request that names none."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
