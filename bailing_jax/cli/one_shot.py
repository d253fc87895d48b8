"""One prompt: its answers streamed to stdout, or one JSON object; figures to stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from bailing_jax.errors import Interrupted
from bailing_jax.terminal import is_terminal, json_line, shown_on
from bailing_jax.text.thinking import ThinkingSplitter, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from bailing_jax.llm import LLM
    from bailing_jax.request import CompletionOutput, Request, StreamPiece


def answer(
    llm: LLM,
    request: Request,
    *,
    as_json: bool,
    hide_thinking: bool,
    inside_thinking: bool,
    say: Callable[[str], None],
) -> None:
    """Run a prepared request to its end.

    Args:
        llm: the engine.
        request: from `llm.prepare`.
        as_json: collect, and print one object.
        hide_thinking: leave the thinking out of what is printed.
        inside_thinking: the prompt ends inside a thinking block.
        say: prints a line on stderr.
    """
    figures = Figures(len(request.prompt_token_ids))
    # Several answers come interleaved; they are printed one after the other at the end.
    streams = not as_json and request.params.n == 1
    shown = _Shown(hide_thinking, inside_thinking)

    def on_piece(piece: StreamPiece) -> None:
        figures.token()
        if streams:
            shown.push(piece)

    try:
        llm.submit(request, on_piece)
        while llm.is_unfinished(request):
            llm.step()
        request.raise_error()
    except KeyboardInterrupt:
        if streams:
            shown.end()
            if is_terminal(sys.stdout):
                raise Interrupted from None
        raise
    finally:
        llm.cancel(request)
    outputs = request.output().outputs
    if as_json:
        print(json_line(_json(request, outputs, figures, inside_thinking)))
    elif streams:
        shown.end()
    else:
        for output in outputs:
            print(f"--- {output.index + 1} of {len(outputs)}")
            print(shown_on(sys.stdout, _text(output, hide_thinking, inside_thinking)))
    sys.stdout.flush()
    say(figures.line())


class Figures:
    """The clock of one request."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._start = time.perf_counter()
        self._clock: list[float] = []

    def token(self) -> None:
        """Note that a token arrived."""
        self._clock.append(time.perf_counter())

    def values(self) -> dict[str, float | None]:
        """Seconds and rates; a rate is None when nothing was measured for it."""
        first, last, more = self._clock[0], self._clock[-1], len(self._clock) - 1
        return {
            "time_to_first_token_s": round(first - self._start, 4),
            "prefill_tokens_per_s": round(self._prompt_tokens / (first - self._start), 2),
            "decode_tokens_per_s": round(more / (last - first), 2) if last > first else None,
            "peak_memory_gb": round(_peak_memory_gb(), 3),
        }

    def line(self) -> str:
        """The figures as one line."""
        values = self.values()
        decode = values["decode_tokens_per_s"]
        return (
            f"prompt {self._prompt_tokens} tokens at {values['prefill_tokens_per_s']:.0f}/s, "
            f"answer {len(self._clock)} tokens"
            + ("" if decode is None else f" at {decode:.1f}/s")
            + f", first token after {values['time_to_first_token_s']:.3f} s, "
            f"peak memory {values['peak_memory_gb']:.2f} GB"
        )


class _Shown:
    """Writes pieces to stdout as they come: text, or token ids where there is no tokenizer."""

    def __init__(self, hide_thinking: bool, inside_thinking: bool) -> None:
        self._splitter = ThinkingSplitter(inside_thinking) if hide_thinking else None

    def push(self, piece: StreamPiece) -> None:
        if piece.text is None:
            self._write(f"{piece.token_id} ")
        elif self._splitter is None:
            self._write(piece.text)
        else:
            self._write(_answers(self._splitter.push(piece.text)))

    def end(self) -> None:
        if self._splitter is not None:
            self._write(_answers(self._splitter.flush()))
        self._write("\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(shown_on(sys.stdout, text))
        sys.stdout.flush()


def _answers(pieces: Any) -> str:
    return "".join(piece.text for piece in pieces if not piece.is_thinking)


def _text(output: CompletionOutput, hide_thinking: bool, inside_thinking: bool) -> str:
    if output.text is None:
        return " ".join(map(str, output.token_ids))
    return split(output.text, inside_thinking)[1] if hide_thinking else output.text


def _json(
    request: Request, outputs: list[CompletionOutput], figures: Figures, inside_thinking: bool
) -> dict[str, Any]:
    answers = [_answer_json(output, inside_thinking) for output in outputs]
    common = {
        "usage": {
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": sum(len(output.token_ids) for output in outputs),
        },
        "stats": figures.values(),
    }
    return {**(answers[0] if len(answers) == 1 else {"outputs": answers}), **common}


def _answer_json(output: CompletionOutput, inside_thinking: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    thinking, rest = split(output.text or "", inside_thinking)
    if thinking:
        answer |= {"thinking": thinking, "answer": rest}
    if output.logprobs is not None:
        answer["logprobs"] = output.logprobs
    return answer


def _peak_memory_gb() -> float:
    """Device memory where the device counts it, else the process's own peak."""
    from bailing_jax.runtime import peak_memory_bytes

    return peak_memory_bytes() / 1e9
