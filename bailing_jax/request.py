"""One answer in the making: its tokens, its text and when it ends. No jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bailing_jax.engine.stop import StopMatcher
from bailing_jax.errors import UserError
from bailing_jax.sampling_params import SamplingParams
from bailing_jax.text.tokenizer import TextStream

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class StreamPiece:
    """What one token adds to an answer.

    Attributes:
        text: new text that can't be taken back ("" while a stop string may be beginning);
            None without a tokenizer.
        token_id: the token.
        finish_reason: why the answer ends here, else None.
        logprobs: {token id: log probability} where asked for, else None.
    """

    text: str | None
    token_id: int
    finish_reason: FinishReason | None
    logprobs: dict[int, float] | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    Attributes:
        index: which of the n answers.
        text: None without a tokenizer.
        token_ids: the generated tokens, the one that ended the answer included.
        logprobs: a list of {token id: log probability}, or None when not asked for.
        finish_reason: "stop", "length", "abort" or "error".
        error: what went wrong, where finish_reason is "error"; else None.
    """

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Answer:
    """Collects tokens until a stop rule ends it.

    Attributes:
        error: what went wrong with this answer alone (its listener raised, or its logits are not
            finite), else None.
    """

    def __init__(self, index: int, stop: StopMatcher, stream: TextStream | None) -> None:
        self._index = index
        self._stop = stop
        self._stream = stream
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, float]] = []
        self._finish_reason: FinishReason | None = None
        self.error: Exception | None = None

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end the answer."""
        return self._stop.ids

    def fail(self, error: Exception) -> None:
        """The answer ends here, because something of its own went wrong."""
        self.error = error
        self._finish_reason = "error"

    def push(self, token_id: int, logprobs: dict[int, float] | None) -> StreamPiece:
        """Take one token; the piece says whether the answer is done."""
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        increment = None
        if self._stream is not None and not self._stop.ends_with(token_id):
            increment = self._stream.push(token_id)
        result = self._stop.push(token_id, increment)
        self._finish_reason = result.finish_reason
        text = result.text
        if self._stream is not None and result.finish_reason is not None:
            text += self._stop.flush(self._stream.flush())
        self._pieces.append(text)
        shown = None if self._stream is None else text
        return StreamPiece(shown, token_id, result.finish_reason, logprobs)

    def output(self) -> CompletionOutput:
        """The answer so far."""
        return CompletionOutput(
            index=self._index,
            text=None if self._stream is None else "".join(self._pieces),
            token_ids=list(self._token_ids),
            logprobs=self._logprobs or None,
            finish_reason=self._finish_reason,
            error=None if self.error is None else _in_words(self.error),
        )


def _in_words(error: Exception) -> str:
    return error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@dataclass
class Request:
    """A checked request, before, while and after it runs.

    Attributes:
        prompt: its text; None when it was given as token ids.
        prompt_token_ids: its tokens.
        params: resolved sampling parameters.
        answers: the n answers in the making.
        numbers: the engine's numbers of them, once submitted.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    answers: list[Answer]
    numbers: list[int] = field(default_factory=list)

    @property
    def error(self) -> Exception | None:
        """What went wrong with the first answer that has finish_reason "error"."""
        return next((a.error for a in self.answers if a.error is not None), None)

    def raise_error(self) -> None:
        """Raise `error` where there is one: whoever listens himself wants to know."""
        if self.error is not None:
            raise self.error

    def output(self) -> RequestOutput:
        """The answers so far."""
        outputs = [answer.output() for answer in self.answers]
        return RequestOutput(self.prompt, self.prompt_token_ids, outputs)
