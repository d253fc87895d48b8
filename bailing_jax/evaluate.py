"""python -m bailing_jax.evaluate TASK: right answers, or the likelihood of a text.

stdout carries the result, one JSON line with --json; what is loaded, awaited and measured goes to
stderr. jax is imported only once flags and files are known to be good, so that --help and
mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bailing_jax import small_model
from bailing_jax.errors import EXIT_OK, EXIT_USAGE, UserError, run_command
from bailing_jax.evaluation import options
from bailing_jax.terminal import tell

Say = Callable[[str], None]


def main(argv: list[str] | None = None) -> int:
    """Parse, load, measure; returns the exit code."""
    args = options.parse(argv)
    return run_command(lambda: _run(args), options.names(args))


def _run(args: argparse.Namespace) -> int:
    say: Say = (lambda _line: None) if args.quiet else tell
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    if sys.stdout is None:  # as after `>&-`
        raise UserError("stdout is closed", "Let it lead somewhere.", EXIT_USAGE)
    options.check(args)
    if args.model is None:
        small_model.folder()  # if it is missing, that is said at once
    measure = _perplexity if args.task == "perplexity" else _accuracy
    found, text = measure(args, say)
    if args.json:
        print(json.dumps(_common(args) | found, allow_nan=False), flush=True)
    else:
        print(text, flush=True)
    return EXIT_OK


def _accuracy(args: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from bailing_jax.evaluation.answer_file import AnswerFile
    from bailing_jax.evaluation.problems import task_of

    task = task_of(args)
    with AnswerFile(_path(args.output)) as keep:
        from bailing_jax import compile_cache

        cache = compile_cache.enable(args.compile_cache, say)
        from bailing_jax.evaluation import accuracy, accuracy_run

        found = accuracy_run.run(args, task, keep, say)
        cache.close()
    prompt = {"prompt": args.prompt or "chat"} if args.task == "gsm8k" else {}
    return found | prompt, accuracy.as_text(args.task, found, task.measure)


def _perplexity(args: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from bailing_jax.evaluation.answer_file import AnswerFile
    from bailing_jax.evaluation.texts import read

    texts = [read(Path(name)) for name in args.data or []]
    with AnswerFile(_path(args.output)) as keep:
        from bailing_jax import compile_cache

        cache = compile_cache.enable(args.compile_cache, say)
        from bailing_jax.evaluation import perplexity

        found = perplexity.run(args, texts, keep, say)
        cache.close()
    return found, perplexity.as_text(found)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    """What every task's JSON line says of how it was made."""
    return {
        "task": args.task,
        "model": args.model or "small_model",
        "seed": args.seed,
        "concurrency": args.max_num_seqs,
        "state_dtype": args.state_dtype,
        "prefill_chunk": args.prefill_chunk,
        "kernels": args.kernels,
        "batch_invariant": args.batch_invariant,
    }


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


if __name__ == "__main__":
    sys.exit(main())
