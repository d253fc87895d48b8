"""The shipped model answers its tasks: what is counted, kept and printed is what it wrote.

Bounds are far below what trained weights reach and far above what broken ones do (nothing), so
that other weights can take the place of these.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluations import records, result, run

from bailing_jax import small_model
from bailing_jax.config import ModelConfig
from bailing_jax.evaluation.intervals import wilson
from bailing_jax.evaluation.numbers import marked_number
from bailing_jax.tasks.recall import is_held_out_pair
from bailing_jax.tasks.word_problems import word_problem
from bailing_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.unoptimised

SIZES = ("--concurrency", 2, "--max-model-len", 1024, "--prefill-chunk", 64, "--quiet")
SEED, NUM = 3, 6
FIELDS = {"task", "num", "correct", "accuracy", "ci95", "tokens_per_s", "seed", "concurrency"}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers") / "answers.jsonl"


def test_word_problems_are_answered_counted_and_kept(capsys: Capture, kept: Path) -> None:
    """The JSON line against the file, and the file against the generator and the tokenizer."""
    args = ("word-problems", *SIZES, "--seed", SEED, "--num", NUM, "--output", kept)
    found = result(capsys, *args)
    assert found.keys() >= FIELDS
    assert (found["task"], found["num"], found["seed"]) == ("word-problems", NUM, SEED)
    assert (found["concurrency"], found["max_model_len"]) == (2, 1024)
    assert (found["dtype"], found["state_dtype"]) == ("float32", "float32")
    answers = sorted(records(kept), key=lambda record: record["index"])
    assert [answer["index"] for answer in answers] == list(range(NUM))
    tokenizer = load_tokenizer(small_model.folder(), 1536)
    assert tokenizer is not None
    for answer in answers:
        problem = word_problem(SEED, answer["index"], "test")
        assert answer["prompt"] == problem.question
        assert answer["reference"] == problem.answer
        assert answer["num_steps"] == len(problem.steps)
        assert tokenizer.decode(answer["tokens"]) == answer["answer"]
        assert answer["correct"] == (marked_number(answer["answer"]) == problem.result)
        assert answer["finish_reason"] == "stop"
    correct = sum(answer["correct"] for answer in answers)
    assert found["correct"] == correct
    assert found["accuracy"] == pytest.approx(correct / NUM, abs=1e-6)
    assert found["ci95"] == pytest.approx(wilson(correct, NUM), abs=1e-6)
    assert found["output_tokens"] == sum(len(answer["tokens"]) for answer in answers)
    rate = found["output_tokens"] / found["seconds"]
    assert found["tokens_per_s"] == pytest.approx(rate, rel=1e-2)
    steps = [str(answer["num_steps"]) for answer in answers]
    assert {key: row["num"] for key, row in found["by_steps"].items()} == {
        key: steps.count(key) for key in sorted(set(steps))
    }
    assert sum(row["correct"] for row in found["by_steps"].values()) == correct
    assert correct >= 3


def test_an_answer_is_the_same_whoever_is_asked_beside(capsys: Capture, kept: Path) -> None:
    """Two of the problems, as the only ones."""
    again = kept.with_name("again.jsonl")
    result(capsys, "word-problems", *SIZES, "--seed", SEED, "--num", 2, "--output", again)
    both = {record["index"]: record for record in records(kept)}
    assert [both[record["index"]] for record in records(again)] == records(again)


def test_recall_finds_code_words_and_tables_distances(capsys: Capture, tmp_path: Path) -> None:
    kept = tmp_path / "answers.jsonl"
    args = ("recall", *SIZES, "--num", 3, "--distance", 60, "--output", kept)
    out, err = run(capsys, *args)
    assert err == ""
    answers = records(kept)
    for answer in answers:
        first, second, _number = answer["reference"].split("-")
        assert is_held_out_pair(first, second)
        assert f"is {answer['reference']}." in answer["prompt"]
        assert answer["correct"] == (answer["answer"].strip() == answer["reference"])
        assert 50 <= answer["distance"] <= 60
    correct = sum(answer["correct"] for answer in answers)
    assert correct >= 2
    head, heading, row, speed = out.splitlines()
    assert head.startswith(f"recall: {correct} of 3 correct, {correct / 3:.1%} (95 % interval ")
    assert heading.split() == ["distance", "problems", "correct", "accuracy"]
    assert row.split() == ["50-99", "3", str(correct), f"{correct / 3:.1%}"]
    assert speed.endswith("tokens/s")


def test_its_config_says_which_decay_it_was_trained_with() -> None:
    config = json.loads((small_model.folder() / "config.json").read_text())
    assert config["decay_layer_offset"] == 0
    assert ModelConfig.from_hf(config).decay_layer_offset == 0
