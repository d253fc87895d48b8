"""GSM8K's public file: one {"question", "answer"} object a line, the answer ending `#### N`.

Also the two prompts. "chat" is the question and what form the last line shall have, for the chat
template; "8shot" is eight worked examples and the question as plain text, which the answer's
first line "Question:" ends. The eight are written here unless a file gives them. No jax.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from bailing_jax.cli.job_input import MAX_LINE_BYTES, Mistakes, parse_json
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation.numbers import marked_number

NUM_SHOTS = 8
# A model that goes on writes the next question.
STOP = "\nQuestion:"

_INSTRUCTION = (
    "Solve this step by step. Write the final answer, a number alone, on a last line of the form "
    "#### 42\n\n"
)
_WANTED = 'A line is an object with a "question" and an "answer" that ends in #### and a number.'
# The file's notes for a calculator: "3+4=<<3+4=7>>7".
_NOTE = re.compile(r"<<[^<>\n]*>>")


class Example(NamedTuple):
    """A line of the file; `result` is the number behind `####`."""

    question: str
    answer: str
    result: Decimal


def read(path: Path, most: int | None = None) -> list[Example]:
    """The first lines of a file, or all; blank lines are none.

    Raises:
        UserError: it can't be read, or what is wrong with which field of which lines.
    """
    mistakes, found = Mistakes(str(path)), list[Example]()
    try:
        with path.open("rb") as file:
            number = 0
            while (most is None or len(found) < most) and (raw := file.readline(MAX_LINE_BYTES)):
                number += 1
                with mistakes.on_line(number):
                    if raw.strip():
                        found.append(_example(parse_json(raw)))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}", "Check the path.", EXIT_USAGE
        ) from error
    mistakes.check()
    if not found:
        raise UserError(f"{path}: holds no problem", _WANTED, EXIT_USAGE)
    return found


def read_shots(path: Path) -> list[Example]:
    """The first eight problems of a file.

    Raises:
        UserError: as `read`, or there are fewer.
    """
    shots = read(path, NUM_SHOTS)
    if len(shots) < NUM_SHOTS:
        raise UserError(
            f"--shots {path}: {len(shots)} problems; {NUM_SHOTS} are needed",
            "Give the public train.jsonl.",
            EXIT_USAGE,
        )
    return shots


def chat_prompt(question: str) -> str:
    """What the user says."""
    return _INSTRUCTION + question


def shot_prompt(question: str, shots: Sequence[Example]) -> str:
    """The examples, without the calculator's notes, and the question."""
    worked = (
        f"Question: {shot.question}\nAnswer: {_NOTE.sub('', shot.answer)}\n\n" for shot in shots
    )
    return "".join(worked) + f"Question: {question}\nAnswer:"


def _example(values: Any) -> Example:
    if not isinstance(values, dict):
        raise UserError(f"{values!r:.60} is no JSON object", _WANTED)
    for field in ("question", "answer"):
        if field not in values:
            raise UserError(f"{field} is missing", _WANTED)
        value = values[field]
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{field} = {value!r:.60}; allowed: a text", _WANTED)
    result = marked_number(values["answer"])
    if result is None:
        raise UserError(f"answer: no number behind ####: {values['answer'][-40:]!r}", _WANTED)
    return Example(values["question"], values["answer"], result)
