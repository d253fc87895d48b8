"""The public file's form, what is wrong with a file, and the prompts made of its lines."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation import gsm8k
from bailing_jax.evaluation.numbers import marked_number
from bailing_jax.evaluation.shots import SHOTS

LINE = {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "problems.jsonl"


def write(path: Path, *lines: Any) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def test_lines_are_read_in_order_and_blank_ones_are_none(path: Path) -> None:
    second = {"question": "Ünd?", "answer": "#### 1,234", "source": "elsewhere"}
    found = gsm8k.read(write(path, LINE, "", second))
    assert found == [
        gsm8k.Example("How many?", LINE["answer"], Decimal(7)),
        gsm8k.Example("Ünd?", "#### 1,234", Decimal(1234)),
    ]


def test_no_more_lines_are_read_than_asked_for(path: Path) -> None:
    assert len(gsm8k.read(write(path, LINE, LINE, "{"), 2)) == 2


MISTAKES = [
    ("{", "not JSON"),
    ("[]", "[] is no JSON object"),
    ({"answer": "#### 7"}, "question is missing"),
    ({"question": "How many?"}, "answer is missing"),
    ({**LINE, "question": 7}, "question = 7; allowed: a text"),
    ({**LINE, "question": " "}, "question = ' '; allowed: a text"),
    ({**LINE, "answer": None}, "answer = None; allowed: a text"),
    ({**LINE, "answer": "7"}, "answer: no number behind ####: '7'"),
    ({**LINE, "answer": "#### seven"}, "answer: no number behind ####"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_mistake_names_file_line_and_field(path: Path, line: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        gsm8k.read(write(path, LINE, line, LINE))
    assert caught.value.message.startswith(f"{path}, line 2: {message}")
    assert caught.value.exit_code == EXIT_USAGE


def test_all_mistakes_are_listed(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        gsm8k.read(write(path, *(line for line, _ in MISTAKES)))
    assert len(caught.value.message.splitlines()) == len(MISTAKES)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_problems_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match="holds no problem"):
        gsm8k.read(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot be read: No such file")):
        gsm8k.read(path)


# Prompts.


def test_shots_are_the_first_eight_lines_of_a_file(path: Path) -> None:
    lines = [{**LINE, "question": f"Number {i}?"} for i in range(9)]
    shots = gsm8k.read_shots(write(path, *lines))
    assert [shot.question for shot in shots] == [f"Number {i}?" for i in range(8)]
    with pytest.raises(UserError, match="7 problems; 8 are needed"):
        gsm8k.read_shots(write(path, *lines[:7]))


def test_a_shot_prompt_is_worked_examples_and_the_open_question(path: Path) -> None:
    """Without the calculator's notes; ended where the answer begins."""
    shots = gsm8k.read(write(path, LINE, LINE))
    want = "Question: How many?\nAnswer: 3 + 4 = 7\n#### 7\n\n" * 2
    assert gsm8k.shot_prompt("And now?", shots) == want + "Question: And now?\nAnswer:"


def test_the_stop_text_ends_an_answer_where_the_next_question_begins() -> None:
    prompt = gsm8k.shot_prompt("And now?", SHOTS)
    assert prompt.count(gsm8k.STOP) == len(SHOTS) == gsm8k.NUM_SHOTS


def test_the_chat_prompt_holds_the_question_and_asks_for_the_mark() -> None:
    prompt = gsm8k.chat_prompt("How many are left?")
    assert prompt.endswith("\n\nHow many are left?")
    assert "####" in prompt


@pytest.mark.parametrize("shot", SHOTS, ids=lambda shot: str(shot.result))
def test_the_worked_examples_are_right(shot: gsm8k.Example) -> None:
    """Every equation of the answer holds, and the last one has the result."""
    assert marked_number(shot.answer) == shot.result
    equations = re.findall(r"([\d,][\d,%*/+ -]*) = \$?([\d,]+)%?", shot.answer)
    assert equations
    for left, right in equations:
        value = eval(re.sub("[,%]", "", left), {"__builtins__": {}})
        assert value == int(right.replace(",", "")), (left, right)
    assert Decimal(equations[-1][1]) == shot.result
