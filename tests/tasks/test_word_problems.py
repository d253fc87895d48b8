"""Word problems: true to their text, within bounds, varied, held out, the same everywhere."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from typing import Literal

import pytest
from problem_reader import solve

from bailing_jax.errors import UserError
from bailing_jax.tasks.stories import MONEY_STORIES, NAMES, STORIES
from bailing_jax.tasks.vocabulary import corpus
from bailing_jax.tasks.word_problems import (
    WordProblem,
    is_held_out_numbers,
    is_held_out_steps,
    word_problem,
)

# A line may begin with what it needs: how two people compare, or what an earlier person has.
LINE = re.compile(
    r"(?:(?P<fact>[^,]+), so )?(?P<name>[A-Z][a-z]+) (?:now )?(?:has|keeps|gets|fills|buys) "
    r"(?P<left>\d+) (?P<sign>[-+*/]) (?P<right>\d+) = <<(?P<inner>.*)>>(?P<result>\d+) "
    r"(?P<unit>[a-z]+)(?: left)?\."
)
CALCULATE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: divmod(a, b)[0] if a % b == 0 else None,
}
# The numbers that a step's words say.
CONSTANTS = {"half": 2, "third": 3, "quarter": 4, "double": 2, "triple": 3}
# Steps with a small factor, which multiply or divide.
FACTOR_STEPS = {"piles", "times", "rooms", "rate", "share", "pack", "trade", "sell", "buy"}
EARLIER_STEPS = {"combine", "match", "take"}
COMPARISONS = {"more", "fewer"}
# Changes with every word of a problem: models trained before it then saw other problems.
DIGEST = "432705635581d53fb86e8638d63daa3f2a138811fdc591c00b4f93098c34298e"
DIGEST_CODE = """
import hashlib
from bailing_jax.tasks.word_problems import word_problem
problems = [word_problem(3, i, s) for s in ("train", "test") for i in range(100)]
print(hashlib.sha256(repr(problems).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def train() -> list[WordProblem]:
    return [word_problem(7, index, "train") for index in range(20_000)]


@pytest.fixture(scope="module")
def test() -> list[WordProblem]:
    return [word_problem(7, index, "test") for index in range(4_000)]


@pytest.fixture(scope="module")
def both(train: list[WordProblem], test: list[WordProblem]) -> list[WordProblem]:
    return train[:8_000] + test


def calculations(problem: WordProblem) -> list[tuple[int, str, int, int]]:
    """(left, sign, right, result) of each line of the answer but the last."""
    found = []
    for match in lines(problem):
        left, sign, right, result = match.group("left", "sign", "right", "result")
        assert match["inner"] == f"{left}{sign}{right}={result}"
        found.append((int(left), sign, int(right), int(result)))
    return found


def lines(problem: WordProblem) -> list[re.Match[str]]:
    """The lines of the answer but the last, as `LINE` reads them."""
    *written, _ = problem.answer.split("\n")
    matches = [LINE.fullmatch(line) for line in written]
    assert all(matches), written
    return [match for match in matches if match]


def test_reading_the_question_gives_the_result(both: list[WordProblem]) -> None:
    for problem in both:
        assert solve(problem.question, NAMES) == problem.result, problem.question


def test_every_calculation_holds(both: list[WordProblem]) -> None:
    for problem in both:
        done = calculations(problem)
        assert len(done) == len(problem.steps)
        for left, sign, right, result in done:
            assert CALCULATE[sign](left, right) == result


def test_what_a_line_begins_with_is_true(both: list[WordProblem]) -> None:
    seen: collections.Counter[str] = collections.Counter()
    for problem in both:
        owner = next(word for word in re.findall("[A-Z][a-z]+", problem.question) if word in NAMES)
        has = {owner: str(problem.numbers[0])}
        for kind, line in zip(problem.steps, lines(problem), strict=True):
            assert bool(line["fact"]) == (kind in EARLIER_STEPS | COMPARISONS)
            if kind in COMPARISONS:
                assert re.search(rf"[.] {line['fact']}[.] ", problem.question), line
            elif line["fact"]:
                earlier, amount = re.fullmatch(
                    rf"([A-Z][a-z]+) has (\d+) {line['unit']}", line["fact"]
                ).groups()  # type: ignore[union-attr]
                assert earlier != line["name"]
                assert has[earlier] == amount == line["right"]
            has[line["name"]] = line["result"]
            seen[kind] += 1
    assert min(seen[kind] for kind in EARLIER_STEPS | COMPARISONS) > 500


def test_operands_come_from_the_text_or_from_results_before(both: list[WordProblem]) -> None:
    for problem in both:
        numbers = list(problem.numbers[1:])
        amounts = [problem.numbers[0]]
        for kind, (left, sign, right, result) in zip(
            problem.steps, calculations(problem), strict=True
        ):
            operands = [left, right]
            operands.remove(amounts[-1])
            (operand,) = operands
            if kind in CONSTANTS:
                assert operand == CONSTANTS[kind]
            elif kind in EARLIER_STEPS:
                assert operand in amounts
            else:
                assert operand == numbers.pop(0)
            assert kind not in FACTOR_STEPS or 2 <= operand <= 12
            assert (sign in "*/") == (kind in FACTOR_STEPS or kind in CONSTANTS)
            amounts.append(result)
        assert numbers == []


def test_numbers_are_those_of_the_question_in_order(both: list[WordProblem]) -> None:
    for problem in both:
        assert tuple(map(int, re.findall(r"\d+", problem.question))) == problem.numbers


def test_result_is_the_last_calculation_and_the_last_line(both: list[WordProblem]) -> None:
    for problem in both:
        assert calculations(problem)[-1][3] == problem.result
        assert problem.answer.endswith(f"\n#### {problem.result}")
        assert (problem.question + problem.answer).count("#") == 4


def test_bounds(both: list[WordProblem]) -> None:
    for problem in both:
        assert all(1 <= number <= 999 for number in problem.numbers)
        assert problem.result >= 1
        for left, sign, right, result in calculations(problem):
            assert 0 <= result <= 9_999
            assert sign != "*" or left <= 999
            assert right <= 9_999


def test_the_answer_ends_with_what_the_question_asks_for(both: list[WordProblem]) -> None:
    for problem in both:
        asked = re.search(r"(?:How many|number of) (\w+)[^.?]*[.?]$", problem.question)
        last = re.search(r">>\d+ (\w+)", problem.answer.split("\n")[-2])
        assert asked is not None
        assert last is not None
        assert asked[1] == last[1]


def test_step_counts_are_even(train: list[WordProblem]) -> None:
    counts = collections.Counter(len(problem.steps) for problem in train)
    assert sorted(counts) == list(range(2, 9))
    # Five standard deviations of a binomial of 20,000 draws at 1/7.
    assert all(abs(count - 20_000 / 7) < 250 for count in counts.values())


def test_every_story_and_kind_occurs(train: list[WordProblem]) -> None:
    stories = collections.Counter(problem.story for problem in train)
    assert set(stories) == {story.name for story in (*STORIES, *MONEY_STORIES)}
    assert len(stories) == len(STORIES) + len(MONEY_STORIES) >= 44
    assert min(stories.values()) > 100
    kinds = collections.Counter(kind for problem in train for kind in problem.steps)
    assert len(kinds) >= 14
    assert min(kinds.values()) > 1_000


def test_the_four_operations_are_about_as_frequent(train: list[WordProblem]) -> None:
    signs = collections.Counter(c[1] for problem in train for c in calculations(problem))
    assert set(signs) == set("+-*/")
    assert min(signs.values()) > signs.total() / 6


def test_no_train_problem_is_held_out(train: list[WordProblem]) -> None:
    for problem in train:
        assert not is_held_out_steps(problem.steps)
        assert not is_held_out_numbers(problem.numbers)


def test_every_test_problem_is_held_out_twice(test: list[WordProblem]) -> None:
    for problem in test:
        assert is_held_out_steps(problem.steps)
        assert is_held_out_numbers(problem.numbers)


def test_splits_share_neither_numbers_nor_steps(
    train: list[WordProblem], test: list[WordProblem]
) -> None:
    assert {p.steps for p in train}.isdisjoint(p.steps for p in test)
    assert {p.numbers for p in train}.isdisjoint(p.numbers for p in test)


def test_shares_held_out_are_an_eighth_and_a_sixteenth() -> None:
    steps = [is_held_out_steps((str(i), "gain")) for i in range(20_000)]
    numbers = [is_held_out_numbers((i, 5)) for i in range(20_000)]
    # Five standard deviations of a binomial.
    assert abs(sum(steps) - 20_000 / 8) < 234
    assert abs(sum(numbers) - 20_000 / 16) < 172


def test_two_steps_leave_many_combinations_on_either_side() -> None:
    trained = {word_problem(0, index, "train", 2).steps for index in range(6_000)}
    tested = {word_problem(0, index, "test", 2).steps for index in range(2_000)}
    assert len(tested) >= 14**2 // 8
    assert len(trained | tested) >= 14**2


def test_texts_are_ascii_of_few_words(both: list[WordProblem]) -> None:
    words: set[str] = set()
    for problem in both:
        text = problem.question + "\n" + problem.answer
        assert text.isascii()
        assert "  " not in text
        assert not set("{}_\t") & set(text)
        words |= set(re.findall("[A-Za-z]+", text))
    assert len(words) < 900


def test_eight_steps_are_compact(both: list[WordProblem]) -> None:
    lengths = [
        len(re.findall(r"[A-Za-z]+|[^A-Za-z ]", f"{problem.question}\n{problem.answer}"))
        for problem in both
        if len(problem.steps) == 8
    ]
    assert max(lengths) < 440
    assert sum(lengths) / len(lengths) < 360


def test_problems_differ() -> None:
    questions = {word_problem(seed, i, "train").question for seed in (0, 1) for i in range(1_000)}
    assert len(questions) == 2_000


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_same_problems_in_every_process(hash_seed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIGEST_CODE], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == DIGEST


@pytest.mark.parametrize("num_steps", range(2, 9))
@pytest.mark.parametrize("split", ["train", "test"])
def test_number_of_steps_is_kept(num_steps: int, split: Literal["train", "test"]) -> None:
    for index in range(50):
        assert len(word_problem(1, index, split, num_steps).steps) == num_steps


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0, "validation"), "split = 'validation'"),
        ((-1, 0, "train"), "seed = -1"),
        ((0, -5, "train"), "index = -5"),
        ((0, 0, "train", 1), "num_steps = 1"),
        ((0, 0, "test", 9), "num_steps = 9"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(UserError, match=named):
        word_problem(*arguments)


def test_corpus_has_both_tasks_and_repeats() -> None:
    texts = list(corpus(2, 64))
    assert len(texts) == 64
    assert texts == list(corpus(2, 64))
    assert sum("code word" in text for text in texts) == 8
    assert sum("####" in text for text in texts) == 56


def test_tasks_import_no_library() -> None:
    code = (
        "import sys; import bailing_jax.tasks.vocabulary; "
        "print({'jax', 'numpy', 'jaxlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"
