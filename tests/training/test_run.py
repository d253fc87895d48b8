"""A whole run: it goes on exactly where it stopped, learns, and leaves a model that generates."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_models import LATENT
from training_cases import tiny_options, tiny_origin, write_data

from bailing_jax import LLM, SamplingParams
from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.params import describe
from bailing_jax.train import main
from bailing_jax.training import log, step
from bailing_jax.training import run as run_module
from bailing_jax.training.export import checkpoint_tensors
from bailing_jax.training.run import Pace, train
from bailing_jax.training.start import read_weights, weights_of

pytestmark = pytest.mark.unoptimised

STEPS = 6


class Stop(Exception):
    """Stands for a kill."""


def run(origin, options, output: Path, *, kill_after: int | None = None, **pace) -> list[str]:
    """Train; `kill_after` raises as soon as that step is logged. Returns what was said."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if kill_after is not None and line.startswith(f"step {kill_after}/"):
            raise Stop

    settings = {"checkpoint_every": 2, "log_every": 1, **pace}
    try:
        train(origin, options, Pace(**settings), output, say)
    except Stop:
        assert kill_after is not None
    return said


@pytest.fixture(scope="module", autouse=True)
def _steps_are_traced_once() -> Iterator[None]:
    """Runs of equal options share a step, which keeps nothing between calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_step", functools.cache(step.make_step))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> tuple[Path, list[str]]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    origin = tiny_origin(folder / "origin")
    return folder, run(origin, tiny_options(data, steps=STEPS), folder / "run")


def losses(folder: Path) -> list[dict]:
    """The log without times."""
    return [
        {k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_s")}
        for entry in log.read(folder)
    ]


@pytest.mark.parametrize("kill_after", [1, 3, 4])
def test_an_interrupted_run_is_the_uninterrupted_one(whole, tmp_path, data, kill_after):
    """Killed before its first checkpoint, between two, and right before one: same bits."""
    folder, _ = whole
    origin, options = tiny_origin(tmp_path / "origin"), tiny_options(data, steps=STEPS)
    run(origin, options, tmp_path / "run", kill_after=kill_after)
    said = run(origin, options, tmp_path / "run")
    done = (kill_after - 1) // 2 * 2
    assert (f"on from step {done}" if done else "from the start") in said[0]
    assert losses(tmp_path / "run") == losses(folder / "run")
    assert [entry["step"] for entry in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    for name in sorted(p.name for p in (folder / "run/model").iterdir()):
        ours = (tmp_path / "run/model" / name).read_bytes()
        assert ours == (folder / "run/model" / name).read_bytes(), name


def test_a_finished_run_is_left_as_it_is(whole, data):
    folder, _ = whole
    before = {p: p.read_bytes() for p in (folder / "run/model").iterdir()}
    run(tiny_origin(folder / "origin"), tiny_options(data, steps=STEPS), folder / "run")
    assert {p: p.read_bytes() for p in (folder / "run/model").iterdir()} == before


def test_another_run_is_refused(whole, data):
    folder, _ = whole
    options = tiny_options(data, steps=STEPS, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"other settings: learning_rate .*0\.005 there, 0\.001 he"):
        run(tiny_origin(folder / "origin"), options, folder / "run")


def test_a_folder_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="not a training run"):
        run(tiny_origin(tmp_path / "o"), tiny_options(data), tmp_path)
    assert (tmp_path / "diary.txt").exists()


def test_what_a_run_leaves(whole):
    """The record, a log line a step, the curve, and a checkpoint with the publishers' names."""
    folder, said = whole
    output = folder / "run"
    record = json.loads((output / "run.json").read_text())
    assert record["steps"] == STEPS
    assert record["config"]["num_hidden_layers"] == LATENT["num_hidden_layers"]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    entry = log.read(output)[-1]
    assert entry["step"] == STEPS
    assert entry["tokens_per_s"] > 0
    assert said[0].startswith("BailingMoeV2_5ForCausalLM: ")
    assert any(line.startswith(f"step {STEPS}/{STEPS}  lines.jsonl ") for line in said)
    assert max(len(line) for line in said if line.startswith("step ")) <= 100
    names = sorted(p.name for p in (output / "model").iterdir())
    assert names == [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_the_time_limit_keeps_what_was_done(tmp_path, data):
    origin, options = tiny_origin(tmp_path / "origin"), tiny_options(data, steps=STEPS)
    said = run(origin, options, tmp_path / "run", minutes=1e-6, checkpoint_every=100)
    assert said[-1] == "stopped at step 1; the same command goes on"
    assert not (tmp_path / "run/model").exists()
    assert "on from step 1" in run(origin, options, tmp_path / "run", minutes=1e-6)[0]


@pytest.mark.slow
def test_a_run_learns_and_its_model_generates(tmp_path, data):
    """Twenty sums by heart, asked through the engine and the exported folder, float32 on CPU."""
    data = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{n} and {n}?", "answer": f"{2 * n}"} for n in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = tiny_options(
        data, steps=225, rows=512, learning_rate=1e-2, warmup_steps=10, prompt_loss=0.0
    )
    run(tiny_origin(tmp_path / "origin"), options, tmp_path / "run", log_every=25)
    entries = log.read(tmp_path / "run")
    assert entries[-1]["loss"] < 0.1 < 1 < entries[0]["loss"]
    llm = LLM(
        tmp_path / "run/model", max_num_seqs=4, max_model_len=128, prefill_chunk=16,
        report=lambda _: None, dtype="float32",
    )  # fmt: skip
    params = SamplingParams(max_tokens=8, temperature=0)
    prompts = [[{"role": "user", "content": line["prompt"]}] for line in lines]
    answers = [output.outputs[0].text for output in llm.chat(prompts, params)]
    right = sum(a == line["answer"] for a, line in zip(answers, lines, strict=True))
    assert right >= 19, answers


def test_training_starts_from_a_checkpoint(tmp_path, data):
    """Its weights, not random ones: with a rate of almost nothing they come out again."""
    origin = tiny_origin(tmp_path / "origin", weights=True)
    options = tiny_options(data, steps=1, learning_rate=1e-12, warmup_steps=0, bias_rate=0.0)
    run(origin, options, tmp_path / "run")
    config = ModelConfig.from_hf(LATENT)
    before, after = (read_weights(tmp_path / name, config) for name in ("origin", "run/model"))
    for path, array in before.items():
        np.testing.assert_allclose(after[path], array, rtol=2**-8, atol=1e-6, err_msg=path)


def test_export_is_the_inverse_of_reading(rng):
    config = ModelConfig.from_hf(LATENT)
    weights = {p.path: rng.standard_normal(p.shape).astype(np.float32) for p in describe(config)}
    tensors = checkpoint_tensors(config, weights, np.dtype(np.float32))
    for path, array in weights_of(config, tensors).items():
        np.testing.assert_array_equal(array, weights[path])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, data):
    origin = tiny_origin(tmp_path / "origin", weights=True)
    assert origin.weights is not None
    broken = {path: array.copy() for path, array in origin.weights.items()}
    broken["model.norm.weight"][0] = np.nan
    origin = dataclasses.replace(origin, weights=broken)
    with pytest.raises(UserError, match=r"step 1: loss nan.*"):
        run(origin, tiny_options(data), tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--beta2", "2"), "error: --beta2 = 2.0; allowed: a number >= 0 and < 1"),
        (("--learning-rate", "nan"), "error: --learning-rate = nan; allowed: "),
        (("--data", "x=y"), "error: --data = 'x=y'; allowed: NAME or NAME=SHARE"),
        (("--log-every", "0"), "error: --log-every = 0; allowed: 1 or more"),
    ],
)
def test_mistakes_name_flags(
    args: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--model", str(tmp_path), "--output", str(tmp_path / "run"), "--data", "recall")
    assert main([*run, "--steps", "3", *args]) == EXIT_USAGE
    assert capsys.readouterr().err.startswith(says)
    assert not (tmp_path / "run").exists()
