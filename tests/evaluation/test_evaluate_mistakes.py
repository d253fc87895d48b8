"""What goes wrong at the evaluate command: cause and remedy in a line or two, and the exit code.

Everything here is refused before a model runs, most of it before one is loaded. Nothing prints a
traceback or a word on stdout, and nothing leaves a file of answers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from spoiled_folders import Spoil, config, cut_short, remove
from tiny_models import LINEAR, MODEL_LEN, write_tiny_model

from bailing_jax import small_model
from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE
from bailing_jax.evaluate import main
from bailing_jax.evaluation import options

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
# Where the message says all there is to do.
NO_HINT = ("not JSON", "want a JSON object", "no permission to write it", "; allowed: ")
LINE = {"question": "How many?", "answer": "#### 7"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "m"))


def check(
    capsys: Capture, args: tuple[object, ...], says: str, code: int = EXIT_USAGE
) -> list[str]:
    """Run the command; the lines on stderr."""
    small = ("--max-model-len", MODEL_LEN, "--prefill-chunk", 16, "--compile-cache", "off")
    assert main([str(arg) for arg in (*args[:1], *small, "--quiet", *args[1:])]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert len(lines) <= (6 if code == EXIT_DOES_NOT_FIT else 2)
    assert max(map(len, lines)) < 300
    if len(lines) == 1:
        assert any(word in err for word in NO_HINT)
    else:
        assert re.match("  [^ ]", lines[-1])
    return lines


OFFSETS = ("perplexity", "--decay-layer-offset")
FLAGS: list[tuple[tuple[object, ...], str]] = [
    (("word-problems", "--num", 0), "--num = 0; allowed: an integer >= 1"),
    (("recall", "--num", -3), "--num = -3; allowed: "),
    (("word-problems", "--concurrency", 0), "--concurrency = 0; allowed: an integer >= 1"),
    (("word-problems", "--max-tokens", 0), "--max-tokens = 0; allowed: "),
    (("word-problems", "--seed", -1), "--seed = -1; allowed: an integer from 0 to 4294967295"),
    (("word-problems", "--seed", 2**32), "--seed = 4294967296; allowed: "),
    (("recall", "--distance", 49), "--distance = 49; allowed: 50 to 1500"),
    (("recall", "--distance", 1501), "--distance = 1501; allowed: 50 to 1500"),
    (("perplexity", "--window", 1), "--window = 1; allowed: an integer >= 2"),
    ((*OFFSETS, "2"), "--decay-layer-offset = '2'; allowed: 0, 1 or 0,1"),
    ((*OFFSETS, "0,0"), "--decay-layer-offset = '0,0'; allowed: "),
    ((*OFFSETS, ""), "--decay-layer-offset = ''; allowed: "),
    (
        (*OFFSETS, "0,1", "--hf-overrides", '{"decay_layer_offset": 1}'),
        "--decay-layer-offset and --hf-overrides both name decay_layer_offset",
    ),
    (("word-problems", "--data", "x"), "--data is of gsm8k and perplexity, not of word-problems"),
    (("perplexity", "--concurrency", 4), "--concurrency is of word-problems and recall and gsm8k"),
    (("perplexity", "--max-tokens", 4), "--max-tokens is of "),
    (("word-problems", "--distance", 60), "--distance is of recall, not of word-problems"),
    (("recall", "--prompt", "chat"), "--prompt is of gsm8k, not of recall"),
    (("recall", "--window", 9), "--window is of perplexity, not of recall"),
    (("recall", *OFFSETS[1:], "0"), "--decay-layer-offset is of perplexity, not of recall"),
    (("gsm8k",), "gsm8k: --data is missing"),
    (("gsm8k", "--data", "a", "--data", "b"), "gsm8k: --data is given twice"),
    (("gsm8k", "--data", "nowhere"), "nowhere: cannot be read: No such file"),
    (("gsm8k", "--data", "x", "--prompt", "4shot"), "--prompt = '4shot'; allowed: 8shot, chat"),
    (("gsm8k", "--data", "x", "--shots", "y"), "--shots is of --prompt 8shot"),
    (
        ("gsm8k", "--data", "x", "--prompt", "8shot", "--chat-template-args", "{}"),
        "--chat-template-args goes through the chat template",
    ),
    (("perplexity", "--data", "nowhere"), "--data nowhere: cannot be read: No such file"),
    (("word-problems", "--hf-overrides", "{"), "--hf-overrides: not JSON"),
    (("word-problems", "--hf-overrides", "[]"), "--hf-overrides: want a JSON object"),
    (("word-problems", "--chat-template-args", "7"), "--chat-template-args: want a JSON object"),
    (("word-problems", "--output", "-"), "--output: stdout carries the result"),
    (("word-problems", "--output", "nowhere/x"), "there is no folder"),
    (("word-problems", "--dtype", "int4"), "--dtype = 'int4'; allowed: "),
    (("word-problems", "--state-dtype", "x"), "--state-dtype = 'x'; allowed: "),
    (("word-problems", "--max-model-len", 0), "--max-model-len = 0; allowed: "),
    (("perplexity", "--prefill-chunk", 0), "--prefill-chunk = 0; allowed: "),
    (("word-problems", "--kernels", "x"), "--kernels = 'x'; allowed: "),
    (("word-problems", "--memory-fraction", 2), "--memory-fraction = 2; allowed: "),
    (("word-problems", "--hf-overrides", '{"x_y": 1}'), "x_y"),
    (("word-problems",), "problem 0: "),  # longer than 96 tokens of the tiny tokenizer
]


@pytest.mark.parametrize(("args", "says"), FLAGS, ids=[says[:40] for _, says in FLAGS])
def test_flags(good: Path, capsys: Capture, args: tuple[object, ...], says: str) -> None:
    check(capsys, (*args, "--model", good), says)


Case = tuple[tuple[object, ...], str, int]


def gsm8k(text: str, says: str) -> Callable[[Path, Path], Case]:
    def case(good: Path, tmp: Path) -> Case:
        (tmp / "x.jsonl").write_text(text)
        return ("gsm8k", "--model", good, "--data", tmp / "x.jsonl"), says, EXIT_USAGE

    return case


def few_shots(good: Path, tmp: Path) -> Case:
    (tmp / "x.jsonl").write_text(json.dumps(LINE) + "\n")
    data = ("--data", tmp / "x.jsonl", "--prompt", "8shot", "--shots", tmp / "x.jsonl")
    return ("gsm8k", "--model", good, *data), "1 problems; 8 are needed", EXIT_USAGE


def perplexity(
    raw: bytes, says: str, *args: object, name: str = "x.txt"
) -> Callable[[Path, Path], Case]:
    def case(good: Path, tmp: Path) -> Case:
        (tmp / name).write_bytes(raw)
        return ("perplexity", "--model", good, "--data", tmp / name, *args), says, EXIT_USAGE

    return case


def spoiled(spoil: Spoil, says: str, *task: object) -> Callable[[Path, Path], Case]:
    def case(good: Path, tmp: Path) -> Case:
        folder = Path(shutil.copytree(good, tmp / "m"))
        spoil(folder)
        return (*(task or ("word-problems",)), "--model", folder), says, EXIT_USAGE

    return case


def output_exists(good: Path, tmp: Path) -> Case:
    (tmp / "out").write_text("precious")
    return ("recall", "--model", good, "--output", tmp / "out"), "exists already", EXIT_USAGE


def no_folder(_good: Path, tmp: Path) -> Case:
    return ("recall", "--model", tmp / "nowhere"), "no such folder", EXIT_USAGE


def preset(_good: Path, _tmp: Path) -> Case:
    """Random weights that fit, and no tokenizer."""
    changes = {key: LINEAR[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    args = ("recall", "--model", "ring-mini-linear-2.0", "--hf-overrides", json.dumps(changes))
    return args, "has no tokenizer.json", EXIT_USAGE


def too_large(good: Path, _tmp: Path) -> Case:
    args = ("recall", "--model", good, "--memory-fraction", "1e-9")
    return args, "the model does not fit", EXIT_DOES_NOT_FIT


def no_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["chat_template"]
    path.write_text(json.dumps(values))


OTHERS: dict[str, Callable[[Path, Path], Case]] = {
    "gsm8k not JSON": gsm8k("{", "x.jsonl, line 1: not JSON"),
    "gsm8k no question": gsm8k('{"answer": "#### 7"}', "x.jsonl, line 1: question is missing"),
    "gsm8k no number": gsm8k('{"question": "a", "answer": "7"}', "no number behind ####"),
    "gsm8k empty": gsm8k("", "x.jsonl: holds no problem"),
    "gsm8k few shots": few_shots,
    "text empty": perplexity(b"", "x.txt: empty"),
    "text not UTF-8": perplexity(b"\xff", "x.txt: not UTF-8 (byte 0)"),
    "text too short": perplexity(b"a", "x.txt: a single token"),
    "text a bad line": perplexity(b"7", "x.jsonl, line 1: needs", name="x.jsonl"),
    "window too long": perplexity(
        b"a b", "--window = 97; allowed: 2 to 96 (--max-model-len)", "--window", 97
    ),
    "output exists": output_exists,
    "no folder": no_folder,
    "no weights": spoiled(remove("model.safetensors"), "safetensors"),
    "cut short": spoiled(cut_short, "model.safetensors"),
    "no config": spoiled(remove("config.json"), "config.json"),
    "bad config": spoiled(config(decay_layer_offset=2), "decay_layer_offset = 2"),
    "no tokenizer": spoiled(remove("tokenizer.json"), "the model has no tokenizer.json"),
    "no tokenizer for text": spoiled(
        remove("tokenizer.json"), "has no tokenizer.json, so it can't read a text", "perplexity"
    ),
    "no template": spoiled(no_template, "word-problems: the model has no chat template"),
    "no template for text": spoiled(
        no_template, "word-problems: the model has no chat template", "perplexity"
    ),
    "preset": preset,
    "does not fit": too_large,
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_files_and_folders(
    good: Path, tmp_path: Path, capsys: Capture, case: Callable[[Path, Path], Case]
) -> None:
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    args, says, code = case(good, tmp_path)
    check(capsys, args, says, code)
    assert all(path.stat().st_size == size for path, size in before.items())


def test_the_tables_are_long_enough() -> None:
    assert len(FLAGS) + len(OTHERS) >= 60


def test_a_refused_run_leaves_neither_a_file_nor_a_changed_one(
    good: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    check(capsys, ("word-problems", "--model", good, "--output", out), "problem 0: ")
    assert not out.exists()
    check(capsys, *output_exists(good, tmp_path)[:2])
    assert out.read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """As access() answers; to root a folder's mode says nothing."""
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    args = ("recall", "--model", "nowhere", "--output", tmp_path / "out")
    check(capsys, args, f"{tmp_path / 'out'}: no permission to write it")


def test_an_installation_without_the_small_model(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(small_model, "__file__", str(tmp_path / "__init__.py"))
    check(capsys, ("recall",), "the small model's weights are not installed", EXIT_FAILURE)


def test_an_unknown_task_is_answered_with_the_tasks(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["arithmetic"])
    assert ended.value.code == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert all(task in err.splitlines()[-1] for task in options.TASKS)


def test_a_closed_stdout_is_refused(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["recall", "--model", "nowhere"]) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("error: stdout is closed\n  ")


def test_an_interruption_while_loading_is_one_word(
    good: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def interrupted(_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bailing_jax.cli.flags.engine_options", interrupted)
    assert main(["recall", "--model", str(good)]) == EXIT_INTERRUPTED
    assert capsys.readouterr() == ("", "interrupted\n")
