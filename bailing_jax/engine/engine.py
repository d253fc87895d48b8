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
from bailing_jax.engine import sampler
from bailing_jax.engine.pages import PageLedger
from bailing_jax.engine.programs import Programs
from bailing_jax.engine.scheduler import Scheduler, Sequence, StepPlan
from bailing_jax.engine.slots import SlotLedger
from bailing_jax.sampling_params import SamplingParams
from bailing_jax.state import DecodeState, StateSpec, allocate

_PREFILL_SIZES = (64, 256, 1024)
_MAX_SEGMENTS = 32

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


class Engine:
    """Runs requests to their end; `step` until `has_work` is False."""

    def __init__(
        self, programs: Programs, config: ModelConfig, limits: EngineLimits, spec: StateSpec
    ) -> None:
        self._programs = programs
        self._config = config
        self._limits = limits
        self._spec = spec
        self._count = 0
        self._start_afresh()
        self._prefill_sizes = sorted(
            {*(s for s in _PREFILL_SIZES if s < limits.prefill_chunk), limits.prefill_chunk}
        )

    def _start_afresh(self) -> None:
        """No requests, free ledgers and a new state."""
        self._requests: dict[int, _Request] = {}
        self._scheduler = Scheduler(
            slots=SlotLedger(self._limits.max_num_seqs),
            pages=PageLedger(self._spec.num_pages - 1, self._limits.page_size),
            prefill_budget=self._limits.prefill_chunk,
            max_segments=min(self._limits.max_num_seqs, _MAX_SEGMENTS),
        )
        self._state = DecodeState(())  # gives the old one's memory back first
        self._state = allocate(self._config, self._spec)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    def is_unfinished(self, number: int) -> bool:
        """Whether the request of this number has tokens to come."""
        return number in self._requests

    def submit(
        self, prompt: list[int], params: SamplingParams, seed: int, on_token: OnToken
    ) -> int:
        """Queue a request of resolved params; returns its number."""
        self._count += 1
        length = min(len(prompt) + params.max_tokens, self._limits.max_model_len)
        sequence = Sequence(self._count, list(prompt), len(prompt), length)
        self._scheduler.submit(sequence)
        self._requests[self._count] = _Request(sequence, params, seed, on_token)
        return self._count

    def cancel(self, number: int) -> None:
        """End a request at once; unknown or finished ones are ignored."""
        request = self._requests.pop(number, None)
        if request is not None:
            self._scheduler.remove(request.sequence)

    def warm_up(self, num_prompt: int, params: SamplingParams) -> None:
        """Compile what one request of resolved params and this prompt length runs.

        Nothing runs on the state: only shapes are needed.
        """
        chunk = self._limits.prefill_chunk
        counts = {min(num_prompt, chunk), num_prompt % chunk} - {0}
        plans = [StepPlan((), ((Sequence(0, [0] * n, n, n), n),)) for n in counts]
        if params.max_tokens > 1:
            plans.append(StepPlan((Sequence(0, [0, 0], 1, 2, num_computed=1),), ()))
        for plan in plans:
            self._compile(plan, params)

    def warm_up_all(self, params: SamplingParams, report: Callable[[str], None]) -> None:
        """Compile every program these limits can need, for requests of resolved params.

        Args:
            params: what is sampled with; other parameters may compile a sampler of their own.
            report: called with a line before each program.
        """
        most = self._limits.max_num_seqs
        counts = sorted({*(1 << i for i in range(most.bit_length())), most})
        decoding = Sequence(0, [0, 0], 1, 2, num_computed=1)
        plans = [StepPlan((decoding,) * count, ()) for count in counts if count <= most]
        for size in self._prefill_sizes:
            plans.append(StepPlan((), ((Sequence(0, [0] * size, size, size), size),)))
        for i, plan in enumerate(plans, start=1):
            num_decode, num_prefill, _ = self._sizes(plan)
            report(
                f"compiling {i} of {len(plans)}: {num_decode} decode rows"
                + (f", {num_prefill} prefill rows" if num_prefill else "")
            )
            self._compile(plan, params)

    def _compile(self, plan: StepPlan, params: SamplingParams) -> None:
        layout = self._layout(plan, dry=True)
        self._programs.compile_step(self._state, layout)
        logits = jnp.zeros((layout.logit_rows.shape[0], self._config.vocab_size), jnp.float32)
        sampler.sample(logits, [0], [sampler.Choice(params, [0], 0)])

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
        logits, self._state = self._programs.step(self._state, layout)
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
            [sampler.Choice(r.params, r.sequence.tokens, r.seed) for r in requests],
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

    def _layout(self, plan: StepPlan, *, dry: bool = False) -> BatchLayout:
        """The step's arrays; a dry layout has the same sizes and names no slot or page."""
        num_decode, num_prefill, num_segments = self._sizes(plan)
        return pack(
            [] if dry else plan.decode_rows(),
            [] if dry else plan.segment_rows(),
            num_decode=num_decode,
            num_prefill=num_prefill,
            num_segments=num_segments,
            page_size=self._limits.page_size,
            pages_a_sequence=self._limits.pages_a_sequence,
        )

    def _sizes(self, plan: StepPlan) -> tuple[int, int, int]:
        """The static size (D, T, P) of a step; few distinct ones, for each is a program."""
        if not plan.segments:
            size = 1 << (len(plan.decodes) - 1).bit_length()
            return min(size, self._limits.max_num_seqs), 0, 0
        num_prefill = next(s for s in self._prefill_sizes if s >= plan.num_prefill_tokens)
        num_segments = min(self._limits.max_num_seqs, _MAX_SEGMENTS)
        return self._limits.max_num_seqs, num_prefill, num_segments


def fresh_seed() -> int:
    """A seed for a request that names none."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
