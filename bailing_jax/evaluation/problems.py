"""The problems of a task: prompts, references, how an answer is judged, and how it is tabulated.

    word-problems   split "test" of the generator; the number behind #### must be the result
    recall          split "test" of the generator; the answer must be the code word
    gsm8k           the public file; the number behind ####, else the last one, must be the result

No jax: files and flags are checked before a model is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bailing_jax.errors import bad_value
from bailing_jax.evaluation import gsm8k
from bailing_jax.evaluation.numbers import final_number, marked_number

SPLIT: Final = "test"
DEFAULT_NUM = {"word-problems": 200, "recall": 100}

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        index: in the file, or of the generator.
        prompt: what is asked.
        reference: the answer wanted, as its source has it.
        is_correct: judges an answer, without its thinking.
        measure: how hard it is, in the task's own measure (see `Task.measure`); None without one.
    """

    index: int
    prompt: str
    reference: str
    is_correct: Callable[[str], bool]
    measure: int | None


@dataclass(frozen=True)
class Task:
    """What is asked, and how.

    Attributes:
        name: of the command line.
        make: the problems, once the model's tokens can be counted.
        measure: what the table is by, "num_steps" or "distance"; None: there is no table.
        is_chat: prompts go through the chat template.
        stop: text that ends an answer.
    """

    name: str
    make: Callable[[CountTokens], list[Problem]]
    measure: str | None
    is_chat: bool
    stop: str | None


def task_of(args: argparse.Namespace) -> Task:
    """The task that checked arguments ask for; reads its files.

    Raises:
        UserError: a file can't be used.
    """
    if args.task == "gsm8k":
        return _gsm8k(args)
    num = DEFAULT_NUM[args.task] if args.num is None else args.num
    if args.task == "recall":
        make = _recall(args.seed, num, args.distance)
        return Task("recall", make, "distance", True, None)
    return Task("word-problems", _word_problems(args.seed, num), "num_steps", True, None)


def distance_bucket(distance: int) -> tuple[int, int]:
    """The first and last distance of its bucket: 0 to 49, 50 to 99, 100 to 199, 200 to 399, ..."""
    if distance < 50:
        return 0, 49
    low = 50 << ((distance // 50).bit_length() - 1)
    return low, 2 * low - 1


def _word_problems(seed: int, num: int) -> Callable[[CountTokens], list[Problem]]:
    from bailing_jax.tasks.word_problems import word_problem

    def problem(index: int) -> Problem:
        made = word_problem(seed, index, SPLIT)
        result = made.result
        return Problem(
            index,
            made.question,
            made.answer,
            lambda answer: marked_number(answer) == result,
            len(made.steps),
        )

    return lambda _count_tokens: [problem(index) for index in range(num)]


def _recall(seed: int, num: int, distance: int | None) -> Callable[[CountTokens], list[Problem]]:
    from bailing_jax.tasks.recall import MAX_DISTANCE, MIN_DISTANCE, recall_problem

    if distance is not None and not MIN_DISTANCE <= distance <= MAX_DISTANCE:
        raise bad_value("distance", distance, f"{MIN_DISTANCE} to {MAX_DISTANCE}")

    def problem(index: int, count_tokens: CountTokens) -> Problem:
        made = recall_problem(seed, index, SPLIT, count_tokens, distance)
        word = made.answer
        return Problem(
            index, made.prompt, word, lambda answer: answer.strip() == word, made.distance
        )

    return lambda count_tokens: [problem(index, count_tokens) for index in range(num)]


def _gsm8k(args: argparse.Namespace) -> Task:
    is_chat = args.prompt != "8shot"
    examples = gsm8k.read(Path(args.data[0]), args.num)
    if args.shots is not None:
        shots = gsm8k.read_shots(Path(args.shots))
    else:
        from bailing_jax.evaluation.shots import SHOTS

        shots = list(SHOTS)

    def problem(index: int, example: gsm8k.Example) -> Problem:
        question = example.question
        return Problem(
            index,
            gsm8k.chat_prompt(question) if is_chat else gsm8k.shot_prompt(question, shots),
            example.answer,
            lambda answer: final_number(answer) == example.result,
            None,
        )

    made = [problem(index, example) for index, example in enumerate(examples)]
    return Task("gsm8k", lambda _count_tokens: made, None, is_chat, None if is_chat else gsm8k.STOP)
