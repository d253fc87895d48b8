"""The generate command: text alone on stdout, mistakes in two lines, and the agreed exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from tiny_models import VOCAB_SIZE, greedy, linear_llm, write_tiny_model

from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE
from bailing_jax.generate import main
from bailing_jax.presets import preset_names

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("bare"), tokenizer=False)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A compile cache that the processes of this module share."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


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
    assert "decay layer offset 0" in said[0]
    prompt, answer = len(want.prompt_token_ids), len(want.outputs[0].token_ids)
    assert said[-1].startswith(f"prompt {prompt} tokens at ")
    assert f", answer {answer} tokens at " in said[-1]
    assert "first token after " in said[-1]
    assert "peak memory " in said[-1]


def test_json_is_one_line_and_quiet_is_silent(folder: Path, environment: dict[str, str]) -> None:
    args = ("--model", folder, "--prompt-ids", "[5, 6,7]", "-n", 7, "--temp", 0, "--ignore-eos")
    done = run(environment, *args, "--json", "--quiet")
    (want,) = linear_llm().generate([5, 6, 7], greedy(7, ignore_eos=True))[0].outputs
    assert done.stderr == ""
    assert done.stdout.endswith("}\n")
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    stats = answer.pop("stats")
    assert answer == {
        "text": want.text,
        "token_ids": want.token_ids,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 3, "completion_tokens": 7},
    }
    assert stats["decode_tokens_per_s"] > 0
    assert 0 < stats["time_to_first_token_s"] < 60


def test_without_a_tokenizer_ids_go_in_and_out(bare: Path, environment: dict[str, str]) -> None:
    """The same seed draws the same ids, also as JSON; one token has no decode rate."""
    args = ("--model", bare, "--prompt-ids", "3,1,4", "--temp", 1.0, "--seed", 5, "--ignore-eos")
    text = run(environment, *args, "-n", 6).stdout
    ids = [int(word) for word in text.split()]
    assert text == "".join(f"{i} " for i in ids) + "\n"
    assert len(ids) == 6
    rare = ("--sampling", '{"logprobs": 2}')
    answer = json.loads(run(environment, *args, "-n", 1, *rare, "--json").stdout)
    assert (answer["token_ids"], answer["text"]) == (ids[:1], None)
    (entry,) = answer["logprobs"]
    assert str(ids[0]) in entry
    assert max(entry.values()) < 0
    assert answer["stats"]["decode_tokens_per_s"] is None


def test_a_preset_shrunk_by_overrides_runs_with_random_weights(
    environment: dict[str, str],
) -> None:
    args = ("--model", "Ring-mini-linear-2.0", "--hf-overrides", json.dumps(SHRUNK))
    done = run(environment, *args, "--prompt-ids", "1,2,499", "-n", 3, "--temp", 0, "--seed", 4)
    assert len(done.stdout.split()) == 3
    assert "ring-mini-linear-2.0: random weights from seed 4" in done.stderr


# Interruptions.


def long_answer(folder: Path) -> list[str]:
    overrides = json.dumps({"max_position_embeddings": 200_000})
    args = ("--hf-overrides", overrides, "--max-model-len", 100_000, "-n", 90_000, "--ignore-eos")
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


# Mistakes.


def mistake(capsys: pytest.CaptureFixture[str], code: int, *args: object) -> list[str]:
    """The lines on stderr; stdout stays empty."""
    assert main([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err.splitlines()


IDS = ("--prompt-ids", "1,2,3")
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no prompt"),
        (("--prompt-ids", "1,x"), "--prompt-ids: '1,x' is not a list of token ids"),
        (("--prompt-ids", "²"), "--prompt-ids: '²' is not a list"),
        (("--prompt-ids", "9" * 5000), "--prompt-ids: '999"),
        (("--prompt-ids", "-5"), "--prompt-ids: '-5' is not a list"),
        (("--prompt-ids", ""), "prompt: empty"),
        (("--prompt-ids", f"1,{VOCAB_SIZE}"), f"prompt: token id {VOCAB_SIZE}; allowed: 0 to"),
        (("-p", "", "--raw"), "prompt: empty"),
        (("-p", "x", "--raw", "--system", "y"), "--system goes through the chat template"),
        ((*IDS, "--system", "y"), "--system goes through the chat template"),
        ((*IDS, "--hf-overrides", "{"), "--hf-overrides: not JSON"),
        ((*IDS, "--hf-overrides", DEEP), "--hf-overrides: not JSON"),
        ((*IDS, "--hf-overrides", "[1]"), "--hf-overrides: want a JSON object, got [1]"),
        ((*IDS, "--hf-overrides", '{"nonsense": 1}'), "hf_overrides: unknown name nonsense"),
        ((*IDS, "--hf-overrides", '{"head_dim": "x"}'), "head_dim = 'x'"),
        ((*IDS, "--sampling", "nope"), "--sampling: not JSON"),
        ((*IDS, "--sampling", "3"), "--sampling: want a JSON object"),
        ((*IDS, "--sampling", '{"best_of": 1}'), "unknown sampling field best_of"),
        ((*IDS, "--sampling", '{"stop": 5}'), "stop = 5; allowed: "),
        ((*IDS, "--sampling", '{"n": 2}'), "n = 2; a stream gives one answer"),
        ((*IDS, "--sampling", '{"logit_bias": {"x": 1}}'), "logit_bias = {'x': 1}; allowed: "),
        ((*IDS, "--sampling", '{"logit_bias": {"999": 1}}'), "token id 999; allowed: 0 to"),
        ((*IDS, "--sampling", '{"stop_token_ids": [400]}'), "token id 400; allowed: 0 to"),
        ((*IDS, "--sampling", '{"logit_bias": {"1": NaN}}'), "logit_bias = nan; allowed: "),
        ((*IDS, "--temperature", "-1"), "temperature = -1.0; allowed: "),
        ((*IDS, "--temp", "nan"), "temperature = nan; allowed: "),
        ((*IDS, "--top-p", "0"), "top_p = 0.0; allowed: "),
        ((*IDS, "--top-k", "-2"), "top_k = -2; allowed: "),
        ((*IDS, "--min-p", "2"), "min_p = 2.0; allowed: "),
        ((*IDS, "-n", "0"), "max_tokens = 0; allowed: "),
        ((*IDS, "--seed", "-1"), "seed = -1; allowed: "),
        ((*IDS, "--stop", ""), "stop string '' has 0 characters; allowed: "),
        ((*IDS, "--max-model-len", "3"), "3 tokens leave no room for an answer"),
        ((*IDS, "--max-model-len", "0"), "max_model_len = 0; allowed: "),
        ((*IDS, "--max-model-len", "9999"), "max_model_len = 9999; allowed: up to 512"),
        ((*IDS, "--prefill-chunk", "0"), "prefill_chunk = 0; allowed: "),
        ((*IDS, "--memory-fraction", "0"), "memory_fraction = 0.0; allowed: "),
        ((*IDS, "--memory-fraction", "nan"), "memory_fraction = nan; allowed: "),
        ((*IDS, "--dtype", "int8"), "dtype = 'int8'; allowed: float32, bfloat16"),
        ((*IDS, "--state-dtype", "x"), "state_dtype = 'x'; allowed: float32, bfloat16"),
        ((*IDS, "--rope-dtype", "x"), "rope_dtype = 'x'; allowed: float32, bfloat16"),
        ((*IDS, "--kernels", "cuda"), "kernels = 'cuda'; allowed: auto, "),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_is_one_or_two_lines_and_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    # --quiet also shows that errors are no remarks.
    said = mistake(capsys, EXIT_USAGE, "--model", folder, *args, "--quiet")
    assert message in said[0]
    assert len(said) <= 2
    assert max(len(line) for line in said) < 300


def test_the_model_must_be_named_and_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--model is missing" in mistake(capsys, EXIT_USAGE, *IDS)[0]
    missing, presets = mistake(capsys, EXIT_USAGE, "--model", tmp_path / "nowhere", *IDS)
    assert f"{tmp_path / 'nowhere'}: no such folder, and no preset of that name" in missing
    assert all(name in presets for name in preset_names())
    assert "ling-3.0-tiny (not supported yet)" in presets
    assert "ring-mini-linear-2.0 (not" not in presets
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        said = mistake(capsys, EXIT_USAGE, "--model", path, *IDS)
        assert str(tmp_path) in said[0]
        assert len(said) <= 2


def test_a_broken_folder_is_refused_naming_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path)
    for name in ("generation_config.json", "tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{")
        said = mistake(capsys, EXIT_USAGE, "--model", tmp_path, *IDS, "--quiet")
        assert name in said[0]
        assert len(said) <= 2


def test_a_text_prompt_needs_a_tokenizer(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (("-p", "hello"), (*IDS, "--stop", "x")):
        said = mistake(capsys, EXIT_USAGE, "--model", bare, *args, "--quiet")
        assert "tokenizer.json" in said[0]
    said = mistake(capsys, EXIT_USAGE, "--model", bare, "-p", "x", "--system", "y", "--quiet")
    assert "--system: the model has no chat template" in said[0]


def test_a_preset_of_an_unsupported_architecture_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    what, why = mistake(capsys, EXIT_USAGE, "--model", "ling-3.0-tiny", *IDS)
    assert what.startswith("error: ling-3.0-tiny: architectures = 'BailingMoeV3ForCausalLM'")
    assert "recognised but not supported yet" in why


@pytest.mark.parametrize("args", [("--model", "ling-1t"), ("--memory-fraction", "1e-9")], ids=str)
def test_what_does_not_fit_is_refused_with_a_table_and_code_3(
    folder: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    said = mistake(capsys, EXIT_DOES_NOT_FIT, "--model", folder, *args, *IDS, "--quiet")
    assert said[0].startswith("error: the model does not fit: ")
    assert [line.split()[0] for line in said[1:]] == ["weights", "state", "Smaller:"]
    assert "memory_fraction" in said[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--nope",), "unrecognized arguments: --nope"),
        (("--temperature", "hot"), "argument --temperature/--temp: invalid float value: 'hot'"),
        (("-n", "1.5"), "argument -n/--max-tokens: invalid int value: '1.5'"),
        ((*IDS, "-p", "a"), "not allowed with argument"),
    ],
)
def test_a_bad_flag_is_two_lines_and_code_2(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*args])
    out, err = capsys.readouterr()
    assert (out, caught.value.code) == ("", EXIT_USAGE)
    usage, error = err.splitlines()
    assert usage.startswith("usage: python -m bailing_jax.generate ")
    assert message in error


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert done.stdout.startswith("usage: ")
        assert done.stderr == ""
    assert min(times) < 0.5


def test_flags_are_checked_before_jax_is_loaded() -> None:
    """Mistakes in the command line itself do not cost the seconds jax takes to load."""
    script = """
import sys
from bailing_jax.generate import main
for args in (
    [], ["--model", "m"], ["--model", "m", "--prompt-ids", "x"],
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
