"""Recall problems: distances and lengths as promised, one true code word, held-out pairs."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import pytest

from bailing_jax.errors import UserError
from bailing_jax.tasks.filler import filler_sentence
from bailing_jax.tasks.held_out import random_of
from bailing_jax.tasks.recall import (
    FIRST_WORDS,
    SECOND_WORDS,
    RecallProblem,
    is_held_out_pair,
    recall_problem,
)

FACT = re.compile(r"The code word of ([A-Z][a-z]+) is (([a-z]+)-([a-z]+)-(\d\d))\.")
SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
# The longest sentence in words and signs: a distance is met to within one.
SENTENCE = 20
DIGEST = "96266e81d033f07ea4093d49ebdd84e2ba07f78b5ac57b421993e1d1d151eb55"
DIGEST_CODE = """
import hashlib, re
from bailing_jax.tasks.recall import recall_problem
def words(text): return len(re.findall("[A-Za-z]+|[^A-Za-z ]", text))
problems = [recall_problem(3, i, s, words) for s in ("train", "test") for i in range(50)]
print(hashlib.sha256(repr(problems).encode()).hexdigest())
"""


def words(text: str) -> int:
    """Words, digits and signs: additive over sentences joined by spaces."""
    return len(re.findall(r"[A-Za-z]+|[^A-Za-z ]", text))


@pytest.fixture(scope="module")
def problems() -> dict[str, list[RecallProblem]]:
    return {split: [recall_problem(5, i, split, words) for i in range(2_000)] for split in SPLITS}


@pytest.fixture(scope="module")
def both(problems: dict[str, list[RecallProblem]]) -> list[RecallProblem]:
    return problems["train"] + problems["test"]


def test_the_answer_is_what_the_asked_persons_sentence_says(both: list[RecallProblem]) -> None:
    for problem in both:
        asked = re.search(r" What is the code word of ([A-Z][a-z]+)\?$", problem.prompt)
        assert asked is not None
        said = [word for name, word, *_ in FACT.findall(problem.prompt) if name == asked[1]]
        assert said == [problem.answer]
        assert problem.prompt.count(problem.answer) == 1


def test_distance_is_counted_from_the_end_of_that_sentence(both: list[RecallProblem]) -> None:
    for problem in both:
        _, _, after = problem.prompt.partition(f"{problem.answer}.")
        assert words(after) == problem.distance
        assert 50 <= problem.distance <= 1_500


def test_prompts_are_shorter_than_1800_tokens(both: list[RecallProblem]) -> None:
    assert max(words(problem.prompt) for problem in both) < 1_800


def test_distances_cover_every_octave(both: list[RecallProblem]) -> None:
    ends = (100, 200, 400, 800, 1_501)
    octaves = collections.Counter(
        next(end for end in ends if problem.distance < end) for problem in both
    )
    assert all(octaves[end] > len(both) / 8 for end in ends)


@pytest.mark.parametrize("distance", [50, 51, 77, 400, 1_499, 1_500])
@pytest.mark.parametrize("split", SPLITS)
def test_a_wanted_distance_is_met_within_a_sentence(
    distance: int, split: Literal["train", "test"]
) -> None:
    for index in range(60):
        problem = recall_problem(6, index, split, words, distance)
        assert abs(problem.distance - distance) <= SENTENCE
        assert 50 <= problem.distance <= 1_500


def test_one_to_eight_people_have_code_words_of_their_own(both: list[RecallProblem]) -> None:
    counts = set()
    for problem in both:
        facts = FACT.findall(problem.prompt)
        counts.add(len(facts))
        for part in (0, 2, 3):
            assert len({fact[part] for fact in facts}) == len(facts)
        # Nothing else looks like one.
        assert len(facts) == problem.prompt.count("-") / 2 == problem.prompt.count("word of ") - 1
        assert all(fact[2] in FIRST_WORDS and fact[3] in SECOND_WORDS for fact in facts)
    assert counts == set(range(1, 9))


def test_facts_stand_before_and_after_the_asked_one(both: list[RecallProblem]) -> None:
    where = collections.Counter(
        problem.prompt.index(fact[1]) > problem.prompt.index(problem.answer)
        for problem in both
        for fact in FACT.findall(problem.prompt)
        if fact[1] != problem.answer
    )
    assert min(where[True], where[False]) > len(both) / 2


def test_no_train_prompt_has_a_held_out_pair(problems: dict[str, list[RecallProblem]]) -> None:
    for problem in problems["train"]:
        for _, _, first, second, _ in FACT.findall(problem.prompt):
            assert not is_held_out_pair(first, second)


def test_every_test_answer_is_a_held_out_pair(problems: dict[str, list[RecallProblem]]) -> None:
    for problem in problems["test"]:
        first, second, _ = problem.answer.split("-")
        assert is_held_out_pair(first, second)


def test_an_eighth_of_the_pairs_is_held_out() -> None:
    assert len(set(FIRST_WORDS)) >= 64
    assert len(set(SECOND_WORDS)) >= 64
    share = [is_held_out_pair(a, b) for a in FIRST_WORDS for b in SECOND_WORDS]
    # Five standard deviations of a binomial of 4,096 draws.
    assert abs(sum(share) - len(share) / 8) < 106


def test_filler_is_plain_and_of_few_words() -> None:
    random = random_of("filler", 0, "train", 0)
    sentences = {filler_sentence(random) for _ in range(20_000)}
    assert len(sentences) > 5_000
    assert all(re.fullmatch(r"[A-Z][a-z ]+\.", sentence) for sentence in sentences)
    vocabulary = {word for sentence in sentences for word in re.findall("[a-z]+", sentence.lower())}
    assert len(vocabulary) < 250
    assert vocabulary.isdisjoint({"code", "word", *FIRST_WORDS, *SECOND_WORDS})


@pytest.mark.parametrize("count", [len, lambda text: len(text) // 3], ids=["letters", "thirds"])
def test_tokens_may_be_of_any_size(count: Callable[[str], int]) -> None:
    for index in range(100):
        problem = recall_problem(8, index, "train", count)
        assert 50 <= problem.distance <= 1_500
        assert count(problem.prompt) < 1_800


def test_each_sentence_is_counted_once() -> None:
    counted: collections.Counter[str] = collections.Counter()

    def count(text: str) -> int:
        counted[text] += 1
        return words(text)

    for index in range(100):
        recall_problem(9, index, "train", count)
    assert set(counted.values()) == {1}


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_same_recall_problems_in_every_process(hash_seed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIGEST_CODE], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == DIGEST


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"split": "all"}, "split = 'all'"),
        ({"seed": -1}, "seed = -1"),
        ({"index": -1}, "index = -1"),
        ({"distance": 49}, "distance = 49"),
        ({"distance": 1_501}, "distance = 1501"),
    ],
)
def test_bad_arguments_of_recall_are_named(changed: dict, named: str) -> None:
    arguments = {"seed": 0, "index": 0, "split": "train", "count_tokens": words} | changed
    with pytest.raises(UserError, match=named):
        recall_problem(**arguments)


@pytest.mark.parametrize("count", [lambda _: 0, lambda _: 2_000], ids=["none", "too many"])
def test_a_count_that_cannot_be_is_refused(count: Callable[[str], int]) -> None:
    with pytest.raises(ValueError, match="count_tokens"):
        recall_problem(0, 0, "train", count)
