"""The evaluate command on a tiny random model: GSM8K files, tables, what a run leaves behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluations import records, result, run
from tiny_models import write_tiny_model

from bailing_jax import LLM
from bailing_jax.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from bailing_jax.evaluate import main
from bailing_jax.evaluation import answer_file, gsm8k
from bailing_jax.evaluation.numbers import final_number
from bailing_jax.tasks.word_problems import word_problem

pytestmark = pytest.mark.unoptimised

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
LINES = [
    {"question": f"Ann has {n} cats and {n} dogs?", "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n}"}
    for n in range(1, 6)
]
COMMON = ("--quiet", "--concurrency", 2, "--max-model-len", 2048, "--prefill-chunk", 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without end tokens it would write to the end; long prompts need positions."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    # Penalties and temperature of a release must not reach an evaluation.
    path = folder / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 5.0, "presence_penalty": 2.0, "top_k": 3}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sampling}))
    return folder


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.mark.parametrize("prompt", ["chat", "8shot"])
def test_gsm8k_asks_as_it_says_and_judges_what_was_answered(
    capsys: Capture, model: Path, problems: Path, tmp_path: Path, prompt: str
) -> None:
    kept = tmp_path / "answers.jsonl"
    args = ("gsm8k", "--model", model, *COMMON, "--data", problems, "--num", 3, "-n", 12)
    found = result(capsys, *args, "--prompt", prompt, "--output", kept)
    assert (found["task"], found["num"], found["prompt"]) == ("gsm8k", 3, prompt)
    assert found["max_tokens"] == 12
    answers = sorted(records(kept), key=lambda record: record["index"])
    assert [answer["reference"] for answer in answers] == [x["answer"] for x in LINES[:3]]
    for answer, line, n in zip(answers, LINES, (2, 4, 6), strict=False):
        want = {"chat": gsm8k.chat_prompt, "8shot": lambda q: f"Question: {q}\nAnswer:"}[prompt]
        assert answer["prompt"].endswith(want(line["question"]))
        assert answer["prompt"].count("\nAnswer: ") == 8 * (prompt == "8shot")
        assert answer["correct"] == (final_number(answer["answer"]) == n)
        assert len(answer["tokens"]) <= 12
    assert found["correct"] == sum(answer["correct"] for answer in answers)
    assert found["truncated"] == sum(a["finish_reason"] == "length" for a in answers)


def test_gsm8k_answers_are_greedy_whatever_the_release_samples_with(
    capsys: Capture, model: Path, problems: Path, tmp_path: Path
) -> None:
    """Token by token the best of the model's logits."""
    kept = tmp_path / "answers.jsonl"
    args = ("gsm8k", "--model", model, *COMMON, "--data", problems, "--num", 1, "-n", 5)
    result(capsys, *args, "--output", kept)
    (answer,) = records(kept)
    sizes = {"max_num_seqs": 1, "max_model_len": 2048, "prefill_chunk": 64}
    llm = LLM(model, report=lambda _line: None, **sizes)
    ids = llm.chat_prompt([{"role": "user", "content": answer["prompt"]}])
    for token in answer["tokens"]:
        assert int(llm.logits(ids)[-1].argmax()) == token
        ids = [*ids, token]


def test_shots_of_a_file_stand_before_the_question(
    capsys: Capture, model: Path, problems: Path, tmp_path: Path
) -> None:
    shots, kept = tmp_path / "train.jsonl", tmp_path / "answers.jsonl"
    lines = [{"question": f"Shot {i}?", "answer": f"<<{i}>>{i}\n#### {i}"} for i in range(9)]
    shots.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ("gsm8k", "--model", model, *COMMON, "--data", problems, "--num", 1, "-n", 1)
    run(capsys, *args, "--prompt", "8shot", "--shots", shots, "--output", kept)
    (answer,) = records(kept)
    assert answer["prompt"].startswith("Question: Shot 0?\nAnswer: 0\n#### 0\n\nQuestion: Shot 1?")
    assert "Shot 7" in answer["prompt"]
    assert "Shot 8" not in answer["prompt"]


def interrupted_after(patch: Patch, count: int) -> None:
    """Ctrl-C at the first step after so many answers are kept."""
    step, write = LLM.step, answer_file.AnswerFile.write
    written: list[Any] = []

    def noted(self: answer_file.AnswerFile, record: dict[str, Any]) -> None:
        write(self, record)
        written.append(record)

    def stepped(self: LLM) -> None:
        if len(written) >= count:
            raise KeyboardInterrupt
        step(self)

    patch.setattr(answer_file.AnswerFile, "write", noted)
    patch.setattr(LLM, "step", stepped)


def test_ctrl_c_keeps_what_was_answered_and_says_so(
    capsys: Capture, model: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    kept = tmp_path / "answers.jsonl"
    interrupted_after(monkeypatch, 3)
    args = ("word-problems", "--model", model, *COMMON[1:], "-n", 3, "--num", 9, "--json")
    out, err = run(capsys, *args, "--output", kept, code=EXIT_INTERRUPTED)
    assert out == ""
    answers = records(kept)
    assert 3 <= len(answers) < 9
    last, word = err.splitlines()[-2:]
    assert last == f"{len(answers)} of 9 problems are done, and in {kept}"
    assert word == "interrupted"
    assert all(a["prompt"] == word_problem(0, a["index"], "test").question for a in answers)


def test_ctrl_c_before_the_first_answer_leaves_no_file(
    capsys: Capture, model: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    kept = tmp_path / "answers.jsonl"
    interrupted_after(monkeypatch, 0)
    args = ("word-problems", "--model", model, *COMMON, "-n", 3, "--num", 9)
    assert run(capsys, *args, "--output", kept, code=EXIT_INTERRUPTED) == ("", "interrupted\n")
    assert not kept.exists()


def test_a_disk_that_fills_up_is_told_with_the_file(
    capsys: Capture, model: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """What fitted stays; the rest of a line that did not is no answer."""
    kept = tmp_path / "windows.jsonl"
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog and the hen " * 9)

    def write(fd: int, data: memoryview) -> int:
        if os.fstat(fd).st_size > 100:
            raise OSError(28, "No space left on device")
        return os.write(fd, data[:150])

    names = {**vars(os), "write": write}
    monkeypatch.setattr(answer_file, "os", SimpleNamespace(**names))
    args = ("perplexity", "--model", model, "--quiet", "--data", text, "--window", 8)
    out, err = run(capsys, *args, "--output", kept, code=EXIT_FAILURE)
    assert out == ""
    assert err.splitlines() == [
        f"error: --output {kept}: cannot be written: No space left on device",
        "  Make room, or give another file.",
    ]
    assert 100 < kept.stat().st_size <= 150


def test_help_ends_well(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == EXIT_OK
    assert "word-problems, recall, gsm8k, perplexity" in capsys.readouterr().out
