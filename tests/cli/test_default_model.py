"""Without --model: the small model that ships with the package; without a prompt, a problem too."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import greedy, linear_llm, tiny_llm, write_tiny_model

from bailing_jax import LLM, small_model
from bailing_jax.errors import EXIT_OK, EXIT_USAGE
from bailing_jax.generate import main
from bailing_jax.tasks.word_problems import WordProblem, word_problem

pytestmark = pytest.mark.unoptimised

LENGTH = 512  # a problem has several hundred tokens of the tiny tokenizer
NAME = "the shipped small model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def _shipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_model, "folder", lambda: folder)


Answered = Callable[..., tuple[str, str]]


@pytest.fixture
def answered(capsys: pytest.CaptureFixture[str], programs: Path) -> Answered:
    """Runs the command; what it wrote on stdout and on stderr."""

    def answered(*args: object) -> tuple[str, str]:
        small = ("--max-model-len", LENGTH, "--prefill-chunk", 64, "--compile-cache", programs)
        assert main([str(arg) for arg in (*small, *args)]) == EXIT_OK
        return capsys.readouterr()

    return answered


@pytest.fixture(scope="module")
def long_llm() -> LLM:
    return tiny_llm(max_num_seqs=1, max_model_len=LENGTH, prefill_chunk=64)


def asked(llm: LLM, problem: WordProblem, tokens: int) -> str | None:
    talk = [{"role": "user", "content": problem.question}]
    return llm.chat(talk, greedy(tokens))[0].outputs[0].text


@pytest.mark.parametrize("seed", [None, 5])
def test_the_first_command_asks_a_problem_held_out_and_streams_the_answer(
    answered: Answered, long_llm: LLM, seed: int | None
) -> None:
    out, err = answered("-n", 8, *(() if seed is None else ("--seed", seed)))
    problem = word_problem(seed or 0, 0, "test")
    assert out == f"{asked(long_llm, problem, 8)}\n"
    said = err.splitlines()
    assert said[0] == f"no model was named: this is {NAME}"
    assert any(line.startswith("reading ") and line.endswith(NAME) for line in said)
    assert said.count(problem.question) == 1
    assert said[said.index(problem.question) - 1].startswith("no prompt was given ")
    assert said[-1] == f"the right result is {problem.result}"


def test_each_seed_asks_another_problem(answered: Answered) -> None:
    shown = {answered("-n", 1, "--seed", seed)[1].splitlines()[-3] for seed in range(3)}
    assert shown == {word_problem(seed, 0, "test").question for seed in range(3)}


def test_quiet_and_json_are_what_they_are_elsewhere(answered: Answered, long_llm: LLM) -> None:
    out, err = answered("-n", 6, "--json", "--quiet")
    assert err == ""
    assert json.loads(out)["text"] == asked(long_llm, word_problem(0, 0, "test"), 6)


def test_a_prompt_of_ones_own_is_asked_instead(answered: Answered) -> None:
    out, err = answered("-p", "hello", "--raw", "-n", 5)
    assert out == f"{linear_llm().generate('hello', greedy(5))[0].outputs[0].text}\n"
    assert "no prompt" not in err
    assert "right result" not in err
    assert f"no model was named: this is {NAME}" in err


def test_chat_and_dry_run_take_it_too(
    answered: Answered, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    out, err = answered("--chat", "-n", 4)
    (want,) = linear_llm().chat([{"role": "user", "content": "hello"}], greedy(4))[0].outputs
    assert out == f"{want.text}\n"
    assert NAME in err
    assert str(folder) in answered("--dry-run")[0]


def test_a_named_model_is_asked_nothing_by_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(folder)]) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("error: no prompt\n")


def test_the_python_interface_has_the_same_default(folder: Path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"max_num_seqs": 1, "max_model_len": 96, "prefill_chunk": 16}
    llm = LLM(report=said.append, **options)
    assert said[0] == f"no model was named: this is {NAME}"
    assert llm.generate([5, 6], greedy(4)) == linear_llm().generate([5, 6], greedy(4))
    said.clear()
    LLM(folder, report=said.append, **options)
    assert not any(NAME in line for line in said)
