"""One package asked the same word problems one at a time and many at once, on one engine.

`founding_bug.py` starts this in a process of its own for each package it compares: what stands
first on PYTHONPATH is asked. Of the many sizes a step can have, three are compiled: one decode row,
a full house, and a full house beside part of a prompt. stdout carries two lines: "compiled" once
that is done, and a JSON object {"alone": ..., "together": ...}, each with the figures of
`python -m bailing_jax.evaluate word-problems` and the answers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import bailing_jax
from bailing_jax import LLM, SamplingParams, compile_cache
from bailing_jax.evaluation import accuracy
from bailing_jax.evaluation.answering import Answered, Answerer, Run
from bailing_jax.evaluation.numbers import marked_number
from bailing_jax.evaluation.problems import Problem, Task
from bailing_jax.request import Request
from bailing_jax.tasks.word_problems import word_problem

MEASURE = "num_steps"
# The shortest there are: right answers then have up to 84 tokens. A rotten one may never end.
STEPS = 2
MAX_TOKENS = 100
MAX_MODEL_LEN = 512
# The one size of prefill.
PREFILL_CHUNK = 64


def main() -> None:
    args = _arguments()
    asked = Path(bailing_jax.__file__).resolve()
    if not asked.is_relative_to(Path.cwd().resolve()):
        raise SystemExit(f"{asked} is not the package in this folder")
    compile_cache.enable(args.compile_cache, _ignore)
    llm = LLM(
        max_num_seqs=args.company,
        max_model_len=MAX_MODEL_LEN,
        prefill_chunk=PREFILL_CHUNK,
        batch_invariant=args.exact,
        report=_ignore,
    )
    problems = [_problem(args.seed, index) for index in range(args.num)]
    task = Task("word-problems", lambda _count_tokens: problems, MEASURE, True, None)
    answerer = Answerer(llm, task, MAX_TOKENS, {})
    _compile(llm, args.company)
    print("compiled", flush=True)
    alone = _alone(answerer, problems[: args.num_alone])
    together = _together(llm, answerer, problems, args.company)
    print(json.dumps({"alone": _found(alone), "together": _found(together)}), flush=True)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--num", type=int, required=True, help="problems")
    p.add_argument("--num-alone", type=int, required=True, help="of them, one at a time too")
    p.add_argument("--company", type=int, required=True, help="how many at once")
    p.add_argument("--seed", type=int, required=True)
    p.add_argument("--exact", action="store_true", help="exact mode")
    p.add_argument("--compile-cache", required=True)
    return p.parse_args()


def _problem(seed: int, index: int) -> Problem:
    made = word_problem(seed, index, "test", STEPS)
    result = made.result
    return Problem(
        index, made.question, made.answer, lambda answer: marked_number(answer) == result,
        len(made.steps),
    )  # fmt: skip


def _compile(llm: LLM, company: int) -> None:
    """Run each of the three sizes once."""
    two_tokens = _going_on(2)
    llm.generate([[1, 2]] * company, two_tokens)
    llm.generate([1, 2], two_tokens)


def _alone(answerer: Answerer, problems: list[Problem]) -> Run:
    start = time.perf_counter()
    answered = [
        answerer.run([problem], answerer.prepare([problem]), _ignore, _ignore).answered[0]
        for problem in problems
    ]
    return Run(answered, time.perf_counter() - start)


def _together(llm: LLM, answerer: Answerer, problems: list[Problem], company: int) -> Run:
    """All problems, `company` of them at once.

    Where half of the places or more would stay empty, requests that nobody counts sit down there:
    steps for fewer would be programs of their own, and compiling them takes longer than all else.
    """
    left = len(problems)
    sitting: list[Request] = []

    def fill() -> None:
        if sitting or left > company // 2:
            return
        for _ in range(company - left):
            # As long as the longest answer, so that it outlasts those under way.
            sitting.append(llm.prepare([1, 2], _going_on(MAX_TOKENS)))
            llm.submit(sitting[-1])

    def keep(_answered: Answered) -> None:
        nonlocal left
        left -= 1
        fill()

    requests = answerer.prepare(problems)
    fill()
    try:
        return answerer.run(problems, requests, keep, _ignore)
    finally:
        for request in sitting:
            llm.cancel(request)


def _going_on(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def _found(run: Run) -> dict[str, Any]:
    answers = [answer.record(MEASURE) for answer in run.answered]
    return {"found": accuracy.summary(run, MEASURE), "answers": answers}


def _ignore(_: object) -> None:
    pass


if __name__ == "__main__":
    main()
