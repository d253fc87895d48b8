"""An engine whose tokens are a function of prompt and position; it compiles nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bailing_jax.engine.limits import EngineLimits
from bailing_jax.request import CompletionOutput, RequestOutput, StreamPiece
from bailing_jax.sampling_params import SamplingParams, resolve

LIMITS = EngineLimits(3, 96, 16, 64)


@dataclass
class FakeRequest:
    prompt_token_ids: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None

    def raise_error(self) -> None:
        pass

    def output(self) -> RequestOutput:
        output = CompletionOutput(0, None, list(self.tokens), None, "length")
        return RequestOutput(None, self.prompt_token_ids, [output])


class FakeEngine:
    """Tokens are a function of the prompt and the position; three requests run at once."""

    def __init__(self, fault: Callable[[FakeEngine], None] = lambda _engine: None) -> None:
        self.limits = LIMITS
        self.steps = 0
        self.log: list[Any] = []  # what was asked of it
        self.shift = 0
        self._meet: Callable[[], None] | None = None
        self._fault = fault
        self._waiting: deque[tuple[FakeRequest, Callable[[StreamPiece], None]]] = deque()
        self._running: list[tuple[FakeRequest, Callable[[StreamPiece], None]]] = []

    def prepare(self, ids: list[int], params: SamplingParams, _what: str = "") -> FakeRequest:
        return FakeRequest(list(ids), resolve(params, {}, "nowhere"))

    def submit(self, request: FakeRequest, on_piece: Callable[[StreamPiece], None]) -> None:
        self.log.append((request.prompt_token_ids, request.params))
        self._waiting.append((request, on_piece))

    def step(self) -> None:
        if self._meet is not None and self.steps in (0, 3):  # as if these had compiled something
            self._meet()
        self._fault(self)
        self.steps += 1
        self.log.append("step")
        while self._waiting and len(self._running) < LIMITS.max_num_seqs:
            self._running.append(self._waiting.popleft())
        for request, on_piece in self._running:
            request.tokens.append(sum(request.prompt_token_ids) + len(request.tokens) + self.shift)
            on_piece(StreamPiece(None, request.tokens[-1], None))
        self._running = [item for item in self._running if self._goes_on(item[0])]

    def is_unfinished(self, request: FakeRequest) -> bool:
        return any(r is request for r, _ in [*self._running, *self._waiting])

    def cancel(self, request: FakeRequest) -> None:
        self._running = [item for item in self._running if item[0] is not request]
        self._waiting = deque(item for item in self._waiting if item[0] is not request)

    def watch_compiling(self, _report: object) -> None:
        pass

    def meet_after_compiling(self, meet: Callable[[], None]) -> None:
        self._meet = meet

    encode = chat_prompt = None

    @staticmethod
    def _goes_on(request: FakeRequest) -> bool:
        return len(request.tokens) < request.params.max_tokens
