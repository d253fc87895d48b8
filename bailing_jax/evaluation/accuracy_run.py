"""The tasks that ask: load the model, answer the problems, count. The figures as JSON has them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from bailing_jax import runtime
from bailing_jax.cli import flags
from bailing_jax.engine_options import EngineOptions
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation import accuracy
from bailing_jax.evaluation.answer_file import AnswerFile
from bailing_jax.evaluation.answering import Answerer
from bailing_jax.evaluation.options import MAX_TOKENS
from bailing_jax.evaluation.problems import Task
from bailing_jax.llm import LLM

Say = Callable[[str], None]


def run(args: argparse.Namespace, task: Task, keep: AnswerFile, say: Say) -> dict[str, Any]:
    """Answer a task's problems.

    Args:
        args: checked arguments.
        task: of those arguments.
        keep: gets a record for each problem.
        say: prints a line on stderr.

    Raises:
        UserError: the model can't be loaded or asked, or a prompt does not fit.
    """
    options = flags.engine_options(args)
    llm = LLM(
        args.model,
        **options,
        hf_overrides=flags.json_object("--hf-overrides", args.hf_overrides),
        seed=args.seed,
        report=say,
        download=args.download,
    )
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise UserError(
            "the model has no tokenizer.json, so it can't be asked anything",
            "Use a complete release folder.",
            EXIT_USAGE,
        )
    max_tokens = MAX_TOKENS[task.name] if args.max_tokens is None else args.max_tokens
    template_args = flags.json_object("--chat-template-args", args.chat_template_args)
    answerer = Answerer(llm, task, max_tokens, template_args)
    # The generator remembers its counter, which therefore must not hold the model.
    problems = task.make(lambda text: len(tokenizer.encode(text)))
    requests = answerer.prepare(problems)
    say(f"{len(problems)} problems; compiling")
    start = time.perf_counter()
    llm.warm_up_all(say)
    say(f"compiled in {time.perf_counter() - start:.1f} s")
    with keep.whole_run(f"{len(problems)} problems", say):
        answered = answerer.run(
            problems, requests, lambda answer: keep.write(answer.record(task.measure)), say
        )
    return {
        **accuracy.summary(answered, task.measure),
        "max_tokens": max_tokens,
        "max_model_len": llm.limits.max_model_len,
        "dtype": EngineOptions(**options).runtime(llm.config, runtime.platform()).dtype,
    }
