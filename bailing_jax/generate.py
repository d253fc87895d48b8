"""python -m bailing_jax.generate: one prompt, one answer, streamed.

stdout carries the generated text (or one JSON object) and nothing else; what is loaded, awaited
and measured goes to stderr. jax is imported only once the arguments are known to be good, so
that --help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from bailing_jax.errors import EXIT_OK, EXIT_USAGE, UserError, run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bailing_jax.llm import LLM
    from bailing_jax.request import StreamPiece
    from bailing_jax.sampling_params import SamplingParams


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bailing_jax.generate",
        usage="%(prog)s --model DIR|NAME [-p TEXT | --chat | --input FILE] [options]",
        description="Generate text with a Ling or Ring model.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR|NAME",
        help="checkpoint folder, org/name in the Hugging Face cache, or a preset (random weights)",
    )
    model.add_argument("--download", action="store_true", help="fetch org/name if it is not here")
    model.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU)")
    model.add_argument("--state-dtype", default="float32", help="float32 or bfloat16")
    model.add_argument("--rope-dtype", help="float32 or bfloat16 (default: as --dtype)")
    model.add_argument(
        "--hf-overrides", metavar="JSON", help="config.json keys to replace, decay_layer_offset"
    )
    prompt = p.add_argument_group("prompt")
    one = prompt.add_mutually_exclusive_group()
    one.add_argument("-p", "--prompt", metavar="TEXT", help="text; - reads it from stdin")
    one.add_argument("-f", "--prompt-file", metavar="FILE", help="text; - reads it from stdin")
    one.add_argument("--prompt-ids", metavar="IDS", help="token ids: 1,2,3")
    one.add_argument("--chat", action="store_true", help="talk; /help lists what can be typed")
    one.add_argument("--input", metavar="FILE", help="a job: requests, one JSON object a line")
    prompt.add_argument(
        "--output", metavar="FILE", help="of a job: answers; what is in it is not done again"
    )
    prompt.add_argument("--raw", action="store_true", help="do not apply the chat template")
    prompt.add_argument("--system", metavar="TEXT", help="system message for the chat template")
    prompt.add_argument("--chat-template-args", metavar="JSON", help="variables of the template")
    sampling = p.add_argument_group("sampling (default: the model's generation_config.json)")
    sampling.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N")
    sampling.add_argument("--temperature", "--temp", type=float, metavar="X", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--min-p", type=float, metavar="X")
    sampling.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of sampling and random weights"
    )
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text (repeatable)"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="do not end at the end token")
    sampling.add_argument("--sampling", metavar="JSON", help="any other SamplingParams field")
    engine = p.add_argument_group("engine")
    engine.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="sequences at once (default: 1; a job: 8)"
    )
    engine.add_argument(
        "--max-model-len", type=int, metavar="N", help="most tokens, prompt and answer"
    )
    engine.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="tokens a step")
    engine.add_argument(
        "--memory-fraction", type=float, default=0.9, metavar="X", help="share of memory to use"
    )
    engine.add_argument("--mesh", metavar="AXES", help="data=1,expert=1,tensor=1: one device")
    engine.add_argument("--kernels", default="auto", metavar="NAME", help="auto, xla or reference")
    engine.add_argument("--batch-invariant", action="store_true", help="exact mode")
    engine.add_argument(
        "--compile-cache", metavar="DIR|off", help="compiled programs (default: the user's cache)"
    )
    output = p.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    output.add_argument("--quiet", action="store_true", help="nothing but errors on stderr")
    output.add_argument("--hide-thinking", action="store_true", help="show the answer only")
    output.add_argument("--dry-run", action="store_true", help="what it would need; no weights")
    output.add_argument("--warmup", action="store_true", help="compile everything before starting")
    output.add_argument("--profile", metavar="DIR", help="write a profile for xprof")
    output.add_argument("--env", action="store_true", help="say what this machine has, and end")
    return p


def main(argv: list[str] | None = None) -> int:
    """Parse, load, generate; returns the exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    overrides = _json_object("--hf-overrides", args.hf_overrides)
    rare = _json_object("--sampling", args.sampling)
    ids = _parse_ids(args.prompt_ids)
    if args.model is None:
        raise UserError(
            "--model is missing; no model ships with the package yet",
            "Give a checkpoint folder or a preset's name.",
            EXIT_USAGE,
        )
    if ids is None and args.prompt is None:
        raise UserError("no prompt", "Give --prompt TEXT or --prompt-ids 1,2,3.", EXIT_USAGE)
    if args.system is not None and (args.raw or ids is not None):
        raise UserError(
            "--system goes through the chat template, which --raw and --prompt-ids leave out",
            "Leave out one of them.",
            EXIT_USAGE,
        )
    say = (lambda _line: None) if args.quiet else _say
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    params = _sampling_params(args, rare)

    from bailing_jax.llm import LLM

    start = time.perf_counter()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        state_dtype=args.state_dtype,
        rope_dtype=args.rope_dtype,
        max_num_seqs=1,
        max_model_len=args.max_model_len,
        prefill_chunk=args.prefill_chunk,
        memory_fraction=args.memory_fraction,
        kernels=args.kernels,
        hf_overrides=overrides,
        seed=args.seed,
        report=say,
    )
    prompt = llm.check_prompt(_prompt_ids(llm, args) if ids is None else ids)
    stream = llm.stream(prompt, params)  # checks the parameters; runs with the first piece
    say(f"loaded in {time.perf_counter() - start:.1f} s; compiling")
    start = time.perf_counter()
    llm.warm_up(len(prompt), params)
    say(f"compiled in {time.perf_counter() - start:.1f} s")
    _generate(llm, stream, len(prompt), args, say)
    return EXIT_OK


def _generate(
    llm: LLM, stream: Iterator[StreamPiece], prompt_tokens: int, args: argparse.Namespace, say: Any
) -> None:
    """Stream the answer to stdout (or collect it for --json), then say how fast it was."""
    pieces: list[StreamPiece] = []
    stats = _Stats(prompt_tokens)
    for piece in stream:
        stats.token()
        pieces.append(piece)
        if not args.json:
            _write(piece)
    if args.json:
        text = None if llm.tokenizer is None else "".join(p.text or "" for p in pieces)
        answer = {
            "text": text,
            "token_ids": [p.token_id for p in pieces],
            "finish_reason": pieces[-1].finish_reason,
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(pieces)},
            "stats": stats.figures(),
        }
        if pieces[0].logprobs is not None:
            answer["logprobs"] = [p.logprobs for p in pieces]
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    say(stats.line())


class _Stats:
    """Clock of one answer."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._start = time.perf_counter()
        self._clock: list[float] = []

    def token(self) -> None:
        """Note that a token arrived."""
        self._clock.append(time.perf_counter())

    def figures(self) -> dict[str, float | None]:
        """Seconds and rates; a rate is None when nothing was measured for it."""
        first, last, more = self._clock[0], self._clock[-1], len(self._clock) - 1
        return {
            "time_to_first_token_s": round(first - self._start, 4),
            "prefill_tokens_per_s": round(self._prompt_tokens / (first - self._start), 2),
            "decode_tokens_per_s": round(more / (last - first), 2) if more else None,
            "peak_memory_gb": round(_peak_memory_gb(), 3),
        }

    def line(self) -> str:
        """The figures as one line."""
        f = self.figures()
        decode = f["decode_tokens_per_s"]
        return (
            f"prompt {self._prompt_tokens} tokens at {f['prefill_tokens_per_s']:.0f}/s, "
            f"answer {len(self._clock)} tokens"
            + ("" if decode is None else f" at {decode:.1f}/s")
            + f", first token after {f['time_to_first_token_s']:.3f} s, "
            f"peak memory {f['peak_memory_gb']:.2f} GB"
        )


def _peak_memory_gb() -> float:
    """Device memory where the device counts it, else the process's own peak."""
    from bailing_jax.runtime import peak_memory_bytes

    return peak_memory_bytes() / 1e9


def _write(piece: StreamPiece) -> None:
    """A piece of text, or the token id when there is no tokenizer."""
    text = f"{piece.token_id} " if piece.text is None else piece.text
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompt_ids(llm: LLM, args: argparse.Namespace) -> list[int]:
    """The prompt's ids: through the chat template where the model has one, unless --raw."""
    if llm.tokenizer is None or llm.chat_template is None or args.raw:
        if args.system is not None:
            raise UserError("--system: the model has no chat template to write it", "", EXIT_USAGE)
        return llm.encode(args.prompt)
    messages = [{"role": "user", "content": args.prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return llm.chat_prompt(messages)


def _sampling_params(args: argparse.Namespace, rare: dict[str, Any]) -> SamplingParams:
    from bailing_jax.sampling_params import from_mapping

    values = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
    }
    return from_mapping({**values, **rare}, "--sampling")


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: not JSON: {error}", exit_code=EXIT_USAGE) from error
    if not isinstance(value, dict):
        raise UserError(f"{flag}: want a JSON object, got {text:.60}", exit_code=EXIT_USAGE)
    return value


def _parse_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = text.strip("[] ").replace(",", " ").split()
    if not all(word.isdecimal() and len(word) < 20 for word in words):
        raise UserError(
            f"--prompt-ids: {text!r:.60} is not a list of token ids", "Write 1,2,3.", EXIT_USAGE
        )
    return [int(word) for word in words]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
