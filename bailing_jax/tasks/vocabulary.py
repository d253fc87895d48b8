"""Texts of both tasks to train a tokenizer on, from the train split only."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bailing_jax.tasks.recall import recall_problem
from bailing_jax.tasks.word_problems import word_problem

# A recall prompt is several times as long as a word problem.
_RECALL_ONE_IN = 8


def corpus(seed: int, num: int) -> Iterator[str]:
    """`num` texts, a question and its answer each; the same arguments give the same texts."""
    for index in range(num):
        if index % _RECALL_ONE_IN == 0:
            recall = recall_problem(seed, index, "train", _words)
            yield f"{recall.prompt}\n{recall.answer}"
        else:
            problem = word_problem(seed, index, "train")
            yield f"{problem.question}\n{problem.answer}"


def _words(sentence: str) -> int:
    """Words, digits and signs: about the tokens of a tokenizer trained on these texts."""
    return len(re.findall(r"[A-Za-z]+|[^A-Za-z\s]", sentence))
