"""The perplexity task: its figures against the Python interface and against float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import records, result, run
from random_checkpoints import random_tensors
from reference_numpy import reference_forward
from tiny_models import LATENT, SEED, VOCAB_SIZE, write_tiny_model
from tolerances import TOLERANCES

from bailing_jax import LLM
from bailing_jax.errors import EXIT_INTERRUPTED, EXIT_USAGE
from bailing_jax.evaluation import likelihood
from bailing_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.unoptimised

Capture = pytest.CaptureFixture[str]
SIZES = ("--max-model-len", 96, "--prefill-chunk", 16, "--quiet")
TEXT = "the cat and the dog are in the house, and 12 hens on the hill. " * 5
WINDOW = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lightning layers whose two decays differ much: there are only 3 layers."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), LATENT)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def log_likelihoods(ids: list[int], offset: int) -> np.ndarray:
    """float64 [T - 1]: of every token but the first, by the model written in numpy."""
    logits = reference_forward(
        LATENT, random_tensors(LATENT, SEED), ids, decay_layer_offset=offset
    ).logits[:-1]
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, np.asarray(ids[1:])[:, None], -1)[:, 0]
    return chosen - np.log(np.exp(logits).sum(-1))


def test_figures_are_those_of_float64_and_of_the_python_interface(
    capsys: Capture, model: Path, text: Path, tmp_path: Path
) -> None:
    """Both offsets, window by window, and what is made of the windows."""
    kept = tmp_path / "windows.jsonl"
    args = ("perplexity", "--model", model, *SIZES, "--data", text, "--window", WINDOW)
    found = result(capsys, *args, "--decay-layer-offset", "0,1", "--output", kept)
    windows = records(kept)
    tokenizer = load_tokenizer(model, VOCAB_SIZE)
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)
    starts = range(0, len(ids) - WINDOW + 1, WINDOW - 1)
    assert [w["tokens"] for w in windows] == [ids[start : start + WINDOW] for start in starts]
    assert [w["index"] for w in windows] == list(range(len(windows)))
    tokens = len(windows) * (WINDOW - 1)
    assert (found["num"], found["tokens"], found["window"]) == (len(windows), tokens, WINDOW)
    for offset in (0, 1):
        want = [log_likelihoods(w["tokens"], offset) for w in windows]
        close = TOLERANCES["reference_logits"] * (WINDOW - 1)
        got = [w["nll"][str(offset)] for w in windows]
        np.testing.assert_allclose(got, [-w.sum() for w in want], rtol=0, atol=close)
        figures = found["offsets"][str(offset)]
        assert figures["nll"] == pytest.approx(sum(got) / tokens)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"]))
        assert figures["ci95"][0] < figures["nll"] < figures["ci95"][1]
    differences = [w["nll"]["1"] - w["nll"]["0"] for w in windows]
    assert found["difference"] == pytest.approx(sum(differences) / tokens)
    # The offsets differ by far more than the arithmetic does.
    assert max(map(abs, differences)) > 20 * TOLERANCES["reference_logits"] * (WINDOW - 1)
    llm = LLM(
        model, hf_overrides={"decay_layer_offset": 1}, report=lambda _line: None,
        max_num_seqs=1, max_model_len=96, prefill_chunk=16,
    )  # fmt: skip
    for window in windows[:2]:
        logprobs = llm.token_logprobs(window["tokens"])
        assert window["nll"]["1"] == -float(np.sum(logprobs, dtype=np.float64))


def test_one_likelihood_without_offsets(capsys: Capture, model: Path, text: Path) -> None:
    """That of the offset in force; fields of every task are there, if empty."""
    args = ("perplexity", "--model", model, *SIZES, "--data", text, "--window", WINDOW, "--num", 3)
    found = result(capsys, *args, "--hf-overrides", '{"decay_layer_offset": 1}')
    assert found["num"] == 3
    assert list(found["offsets"]) == ["1"]
    assert found["offsets"]["1"] == {key: found[key] for key in ("perplexity", "nll", "ci95")}
    assert (found["correct"], found["accuracy"], found["concurrency"]) == (None, None, 1)
    assert found["tokens_per_s"] > 0
    assert "verdict" not in found
    alone = result(capsys, *args, "--decay-layer-offset", "1")
    assert alone["offsets"] == found["offsets"]
    assert "verdict" not in alone
    assert alone["config_offset"] is None


def test_both_offsets_are_printed_with_interval_and_verdict(
    capsys: Capture, model: Path, text: Path
) -> None:
    args = ("perplexity", "--model", model, *SIZES, "--data", text, "--window", WINDOW)
    out, err = run(capsys, *args, "--decay-layer-offset", "1,0", "--num", 5)
    assert err == ""
    head, heading, zero, one, config, difference, verdict, speed = out.splitlines()
    assert head == f"perplexity: 5 windows of up to {WINDOW} tokens, {5 * (WINDOW - 1)} predicted"
    assert heading.split() == ["offset", "perplexity", "nats", "a", "token", "95", "%", "interval"]
    for offset, line in enumerate((zero, one)):
        words = line.split()
        assert int(words[0]) == offset
        assert float(words[1]) == pytest.approx(math.exp(float(words[2])), rel=1e-4)
        assert float(words[3]) < float(words[2]) < float(words[5])
    assert config == "config.json states offset none"
    assert difference.startswith("offset 1 minus offset 0: ")
    assert verdict == "undecided: too little text (5 windows; at least 8 are needed)"
    assert speed.endswith("tokens/s")


def test_worked_problems_are_the_default_text(capsys: Capture, model: Path, tmp_path: Path) -> None:
    """Cut at the model's limit here, since the tiny tokenizer makes them long."""
    kept = tmp_path / "windows.jsonl"
    out, _ = run(capsys, "perplexity", "--model", model, *SIZES, "--num", 2, "--output", kept)
    windows = records(kept)
    assert [(w["source"], len(w["tokens"])) for w in windows] == [("word-problems", 96)] * 2
    assert out.startswith("perplexity: 2 windows of up to 96 tokens, 190 predicted\n")


def test_ctrl_c_keeps_the_windows_that_were_scored(
    capsys: Capture, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "windows.jsonl"
    scored, score = [], likelihood._sum

    def interrupted(*args: Any) -> float:
        scored.append(args)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(likelihood, "_sum", interrupted)
    args = ("perplexity", "--model", model, *SIZES[:-1], "--data", text, "--window", WINDOW)
    out, err = run(capsys, *args, "--output", kept, code=EXIT_INTERRUPTED)
    assert out == ""
    assert len(records(kept)) == 3
    assert err.splitlines()[-2:] == [f"3 of 7 windows are done, and in {kept}", "interrupted"]


def test_numbers_that_overflow_are_said_with_their_window(
    capsys: Capture, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = likelihood.Scorer

    def nan(_self: Any, ids: list[int]) -> np.ndarray:
        return np.full(len(ids) - 1, np.nan, np.float32)

    monkeypatch.setattr(scorer, "token_logprobs", nan)
    args = ("perplexity", "--model", model, *SIZES, "--data", text, "--window", WINDOW)
    _, err = run(capsys, *args, code=1)
    assert err.splitlines() == [
        f"error: window 0 of {text}: its likelihood is nan",
        "  The model's numbers overflow: try --dtype float32, and check its weights.",
    ]


def test_a_likelihood_beyond_all_bounds_is_still_told(
    capsys: Capture, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite, but its exponential is not."""

    def hopeless(_self: Any, ids: list[int]) -> np.ndarray:
        return np.full(len(ids) - 1, -1e6, np.float32)

    monkeypatch.setattr(likelihood.Scorer, "token_logprobs", hopeless)
    args = ("perplexity", "--model", model, *SIZES, "--data", text, "--window", WINDOW)
    found = result(capsys, *args)
    assert (found["perplexity"], found["nll"]) == (None, 1e6)
    out, _ = run(capsys, *args)
    assert out.splitlines()[2].split()[:4] == ["0", "over", "1e300", "1000000.00000"]


def test_a_model_without_lightning_layers_has_no_decay(capsys: Capture, text: Path) -> None:
    folder = Path(__file__).parents[1] / "golden" / "v2-gqa"
    assert json.loads((folder / "config.json").read_text())["architectures"][0].endswith(
        "V2ForCausalLM"
    )
    args = ("perplexity", "--model", folder, *SIZES, "--data", text, "--decay-layer-offset", "0,1")
    _, err = run(capsys, *args, code=EXIT_USAGE)
    assert "has no lightning layer, so nothing decays\n  Leave it out.\n" in err
