"""The generate command: text or JSON alone on stdout, all the rest on stderr.

Mistakes are test_mistakes.py's.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from tiny_models import greedy, linear_llm, write_tiny_model

from bailing_jax import LLM, SamplingParams
from bailing_jax.cli import flags, one_shot
from bailing_jax.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from bailing_jax.generate import main
from bailing_jax.request import Request

pytestmark = pytest.mark.unoptimised

# A preset's irregular plan in miniature.
SHRUNK = {
    "num_hidden_layers": 2,
    "layer_group_size": 2,
    "num_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
}

# An answer of so many tokens, whatever they are.
ON_AND_ON = ("--sampling", '{"ignore_eos": true}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("bare"), tokenizer=False)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile cache that the runs of this module share."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def environment(programs: Path) -> dict[str, str]:
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs), "TF_CPP_MIN_LOG_LEVEL": "3"}


def command(*args: object) -> list[str]:
    small = ("--max-model-len", 96, "--prefill-chunk", 16)
    return [sys.executable, "-m", "bailing_jax.generate", *map(str, (*small, *args))]


def run(environment: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*args), env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


# Answers.


def test_text_goes_in_and_only_text_comes_out(folder: Path, environment: dict[str, str]) -> None:
    """Through the chat template; what was loaded and measured stands on stderr."""
    done = run(environment, "--model", folder, "-p", "hello", "-n", 12, "--temp", 0)
    (want,) = linear_llm().chat([{"role": "user", "content": "hello"}], greedy(12))
    assert done.stdout == f"{want.outputs[0].text}\n"
    said = done.stderr.splitlines()
    assert said[0].startswith("BailingMoeLinearV2ForCausalLM: ")
    assert "1 sequence of 96 tokens, prefill chunk 16, decay layer offset 0" in said[1]
    prompt, answer = len(want.prompt_token_ids), len(want.outputs[0].token_ids)
    assert said[-1].startswith(f"prompt {prompt} tokens at ")
    assert f", answer {answer} tokens at " in said[-1]
    assert "first token after " in said[-1]
    assert "peak memory " in said[-1]


Answered = Callable[..., tuple[str, str]]


@pytest.fixture
def answered(capsys: pytest.CaptureFixture[str], programs: Path) -> Answered:
    """Runs the command in this process; what it wrote on stdout and on stderr."""

    def answered(*args: object) -> tuple[str, str]:
        small = ("--max-model-len", 96, "--prefill-chunk", 16, "--compile-cache", programs)
        assert main([str(arg) for arg in (*small, *args)]) == EXIT_OK
        return capsys.readouterr()

    return answered


def test_json_is_one_line_and_quiet_is_silent(folder: Path, answered: Answered) -> None:
    args = ("--model", folder, "--prompt-ids", "[5, 6,7]", "-n", 7, "--temp", 0, *ON_AND_ON)
    out, err = answered(*args, "--json", "--quiet")
    (want,) = linear_llm().generate([5, 6, 7], greedy(7, ignore_eos=True))[0].outputs
    assert err == ""
    assert out.endswith("}\n")
    assert out.count("\n") == 1
    answer = json.loads(out)
    stats = answer.pop("stats")
    assert answer == {
        "text": want.text,
        "token_ids": want.token_ids,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 3, "completion_tokens": 7},
    }
    assert stats["decode_tokens_per_s"] > 0
    assert 0 < stats["time_to_first_token_s"] < 60


def test_several_answers_come_one_after_the_other(folder: Path, answered: Answered) -> None:
    """As text under headings, as JSON in a list, each with its log probabilities."""
    fields: dict[str, Any] = {"n": 2, "logprobs": 3, "seed": 4, "ignore_eos": True}
    args = ("--model", folder, "-p", "hello", "--raw", "-n", 5, "--temp", 1)
    flags = (*args, "--sampling", json.dumps(fields))
    params = SamplingParams(max_tokens=5, temperature=1.0, **fields)
    want = linear_llm().generate("hello", params)[0].outputs
    first, second = (output.text for output in want)
    assert answered(*flags)[0] == f"--- 1 of 2\n{first}\n--- 2 of 2\n{second}\n"
    answer = json.loads(answered(*flags, "--json")[0])
    assert [output["text"] for output in answer["outputs"]] == [first, second]
    assert [output["token_ids"] for output in answer["outputs"]] == [o.token_ids for o in want]
    assert answer["usage"]["completion_tokens"] == 10
    for output in answer["outputs"]:
        for token, entry in zip(output["token_ids"], output["logprobs"], strict=True):
            assert str(token) in entry
            assert len(entry) in (3, 4)  # the best three, and the chosen one


@pytest.mark.parametrize("way", ["-p -", "--prompt-file", "--prompt-file -"])
def test_a_prompt_comes_from_a_pipe_or_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: Answered, way: str
) -> None:
    """Without the newline at its end."""
    raw = "hello\ntwo é\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    (tmp_path / "prompt.txt").write_bytes(raw)
    args = ["--prompt-file", str(tmp_path / "prompt.txt")] if way[-1] != "-" else way.split()
    out, _ = answered("--model", folder, *args, "-n", 4, "--temp", 0, "--raw", *ON_AND_ON)
    (want,) = linear_llm().generate("hello\ntwo é", greedy(4, ignore_eos=True))[0].outputs
    assert out == f"{want.text}\n"


def test_hide_thinking_leaves_the_answer(folder: Path, answered: Answered) -> None:
    """The model is made to say one tag or the other, by a bias on its token."""
    tokenizer = linear_llm().tokenizer
    assert tokenizer is not None
    close, hello = tokenizer.token_id("</think>"), tokenizer.token_id("hello")
    args = ("--model", folder, "-p", "x<think>", "--raw", "-n", 3, "--temp", 0, "--hide-thinking")
    # The prompt opens the block: what comes is thinking until it is closed.
    thinking = ("--sampling", json.dumps({"logit_bias": {str(hello): 1e6}}))
    assert answered(*args, *thinking)[0] == "\n"
    closed = ("--sampling", json.dumps({"logit_bias": {str(close): 1e6}}))
    out, _ = answered(*args, *closed)
    assert "<think>" not in out
    shown = answered(*args[:-1], *closed)[0]
    assert shown == "</think></think></think>\n"
    as_json = json.loads(answered(*args[:-1], *thinking, "--json")[0])
    assert (as_json["thinking"], as_json["answer"]) == ("hellohellohello", "")


def test_warmup_compiles_all_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answered: Answered
) -> None:
    compiled: list[set[tuple[int, ...]]] = []
    real = one_shot.answer

    def watched(llm: LLM, request: Request, **options: Any) -> None:
        for _ in range(2):
            compiled.append(set(llm._engine._programs._compiled))
            if len(compiled) == 1:
                real(llm, request, **options)

    monkeypatch.setattr(one_shot, "answer", watched)
    args = ("--model", folder, "-p", "hello the and", "-n", 5, *ON_AND_ON)
    _, err = answered(*args, "--warmup", "--max-num-seqs", 2)
    assert any(line.startswith("compiling 3 programs, ") for line in err.splitlines())
    lines = [line for line in err.splitlines() if line.startswith("compiled ") and " of " in line]
    assert [line.split(":")[0] for line in lines] == [f"compiled {i} of 3" for i in (1, 2, 3)]
    assert {line.split(": ")[1] for line in lines} == {
        "1 decode row", "2 decode rows", "2 decode rows, 16 prefill rows"
    }  # fmt: skip
    before, after = compiled
    assert len(before) == 3
    assert before == after


def test_the_second_run_finds_its_programs_in_the_cache(folder: Path, answered: Answered) -> None:
    args = ("--model", folder, "-p", "hello", "--raw", "-n", 2)
    answered(*args)
    _, err = answered(*args)
    (line,) = (line for line in err.splitlines() if line.startswith("compiled in "))
    assert re.fullmatch(r"compiled in \d+\.\d s \(cache: [1-9]\d* hits?, 0 misses\)", line)


def test_without_a_tokenizer_ids_go_in_and_out(bare: Path, answered: Answered) -> None:
    """The same seed draws the same ids, also as JSON; one token has no decode rate."""
    args = ("--model", bare, "--prompt-ids", "3,1,4", "--temp", 1.0, "--seed", 5, *ON_AND_ON)
    text, _ = answered(*args, "-n", 6)
    ids = [int(word) for word in text.split()]
    assert text == "".join(f"{i} " for i in ids) + "\n"
    assert len(ids) == 6
    rare = ("--sampling", '{"logprobs": 2}')
    answer = json.loads(answered(*args, "-n", 1, *rare, "--json")[0])
    assert (answer["token_ids"], answer["text"]) == (ids[:1], None)
    (entry,) = answer["logprobs"]
    assert str(ids[0]) in entry
    assert max(entry.values()) < 0
    assert answer["stats"]["decode_tokens_per_s"] is None


def test_a_preset_shrunk_by_overrides_runs_with_random_weights(answered: Answered) -> None:
    args = ("--model", "Ring-mini-linear-2.0", "--hf-overrides", json.dumps(SHRUNK))
    out, err = answered(*args, "--prompt-ids", "1,2,499", "-n", 3, "--temp", 0, "--seed", 4)
    assert len(out.split()) == 3
    assert "ring-mini-linear-2.0: random weights from seed 4" in err


def test_download_is_passed_on_and_never_without_the_flag(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answered: Answered
) -> None:
    asked: list[tuple[str, bool]] = []

    def find(model: str, *, download: bool) -> Path:
        asked.append((model, download))
        return folder

    monkeypatch.setattr("bailing_jax.hub.find", find)
    args = ("--model", "org/name", "--prompt-ids", "1", "-n", 1)
    answered(*args, "--download")
    answered(*args)
    answered("--model", "org/name", "--dry-run")
    assert asked == [("org/name", True), ("org/name", False), ("org/name", False)]


@pytest.mark.parametrize("model", ["folder", "ring-mini-linear-2.0"])
def test_a_dry_run_says_what_it_would_need(folder: Path, answered: Answered, model: str) -> None:
    """More is in cli/test_dry_run.py."""
    own = ("--model", folder)
    args = own if model == "folder" else ("--model", model, "--hf-overrides", json.dumps(SHRUNK))
    out, _ = answered(*args, "--dry-run")
    assert "weights" in out
    plan = json.loads(answered(*args, "--dry-run", "--json")[0])
    assert isinstance(plan, dict)


def test_env_needs_no_model(answered: Answered) -> None:
    facts = json.loads(answered("--env", "--json")[0])
    assert {"versions", "devices", "kernels"} <= set(facts)


# A job and a chat.


def test_a_job_runs_and_is_not_done_again(
    folder: Path, tmp_path: Path, environment: dict[str, str], answered: Answered
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": "a", "prompt": "hello"}, {"id": "b", "prompt_ids": [1, 2], "max_tokens": 2}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ("--model", folder, "--input", source, "--output", output, "-n", 4, "--max-num-seqs", 2)
    done = run(environment, *args, *ON_AND_ON)
    assert done.stdout == ""
    answers = {a["id"]: a for a in map(json.loads, output.read_text().splitlines())}
    assert {key: len(answer["token_ids"]) for key, answer in answers.items()} == {"a": 4, "b": 2}
    out, err = answered(*args, *ON_AND_ON)
    assert (out, "all 2 requests are done already" in err) == ("", True)


def test_a_chat_from_a_pipe_answers_line_by_line(folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command("--model", folder, "--chat", "-n", 4, "--temp", 0),
        env=environment, input="hello\n/undo\nhello\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (want,) = linear_llm().chat([{"role": "user", "content": "hello"}], greedy(4))[0].outputs
    assert done.stdout == f"{want.text}\n" * 2


# Interruptions.


def long_answer(folder: Path) -> list[str]:
    overrides = json.dumps({"max_position_embeddings": 200_000})
    args = ("--hf-overrides", overrides, "--max-model-len", 100_000, "-n", 90_000, *ON_AND_ON)
    return command("--model", folder, "--prompt-ids", "1,2", *args)


def wait_for(stream: IO[str], word: str) -> None:
    for line in stream:
        if word in line:
            return
    pytest.fail(f"ended without saying {word}")


@pytest.mark.parametrize("moment", ["compiling", "answering"])
def test_ctrl_c_ends_with_130_and_one_word(
    folder: Path, environment: dict[str, str], moment: str
) -> None:
    process = subprocess.Popen(
        long_answer(folder),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    wait_for(process.stderr, "compiling")
    if moment == "answering":
        assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_INTERRUPTED
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said


def test_a_reader_that_leaves_ends_it_quietly(folder: Path, environment: dict[str, str]) -> None:
    """As in `... | head`."""
    process = subprocess.Popen(
        [*long_answer(folder), "--quiet"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == EXIT_FAILURE
    process.stderr.close()


# What costs nothing.


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert done.stdout.startswith("usage: ")
        assert done.stderr == ""
    assert min(times) < 0.5


def test_the_flags_stay_few_enough_to_read() -> None:
    groups = flags.parser()._action_groups
    assert sum(len(group._group_actions) for group in groups) <= 42
    *_, text = flags.parser().format_help().partition("\nmodel:")
    assert max(len(group.splitlines()) for group in text.split("\n\n")) <= 24


def test_flags_are_checked_before_jax_is_loaded() -> None:
    """Mistakes in the command line itself do not cost the seconds jax takes to load."""
    script = """
import sys
from bailing_jax.generate import main
for args in (
    ["--temp", "-1"], ["--model", "m"], ["--model", "m", "--prompt-ids", "x"],
    ["--model", "m", "-p", "x", "--sampling", '{"best_of": 1}'],
    ["--model", "m", "-p", "x", "--hf-overrides", "{"],
    ["--model", "m", "-p", "x", "--top-p", "7"],
):
    assert main(args) == 2, args
assert not {"jax", "numpy", "flax"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 6
