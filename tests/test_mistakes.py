"""What goes wrong at the generate command: cause and remedy in a line or two, and the exit code.

Three tables: flags with a good folder, folders with something missing or broken, and prompts,
jobs and the hub. Nothing of it prints a traceback or a word on stdout.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from spoiled_folders import (
    Spoil,
    config,
    cut_short,
    foreign_tokenizer,
    half_downloaded,
    hostile_tokenizer,
    moved_into,
    native_without_manifest,
    only_pickles,
    orbax_export,
    remove,
    template,
    write,
)
from tiny_models import VOCAB_SIZE, write_tiny_model

from bailing_jax import LLM, small_model
from bailing_jax.cli import flags
from bailing_jax.errors import (
    EXIT_DOES_NOT_FIT,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    UserError,
)
from bailing_jax.generate import main
from bailing_jax.presets import preset_names

# Where the message says all there is to do.
NO_HINT = (
    "not JSON",
    "want a JSON object",
    "no permission to write it",
)
IDS = ("--prompt-ids", "1,2,3")
JOB = ("--input", "x", "--output", "y")
HOSTS = ("--num-processes", "2", "--process-id", "1")
MISSING = "nowhere"
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "m"))


def check(
    capsys: pytest.CaptureFixture[str], args: tuple[object, ...], says: str, code: int
) -> list[str]:
    """Run the command; the lines on stderr, which say what is wrong and what to do."""
    small = ("--max-model-len", 96, "--prefill-chunk", 16, "--compile-cache", "off", "--quiet")
    assert main([str(arg) for arg in (*small, *args)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    lines = err.splitlines()
    assert says in lines[0]
    listed = code == EXIT_DOES_NOT_FIT or "the tensors do not fit" in err  # what, line by line
    assert len(lines) <= (6 if listed else 2)
    assert max(map(len, lines)) < 450
    if len(lines) == 1:
        assert "; allowed: " in err or any(word in err for word in NO_HINT)
    else:
        assert lines[-1].startswith("  ")
        assert lines[-1].strip()
    return lines


# Flags.


def sampling(**fields: object) -> tuple[str, ...]:
    return (*IDS, "--sampling", json.dumps(fields))


FLAGS: list[tuple[tuple[str, ...], str]] = [
    ((), "no prompt"),
    (("-p", "", "--raw"), "prompt: empty"),
    (("-p", "a b c d " * 50), "leave no room for an answer"),
    (("--prompt-ids", "1,x"), "is not a list of token ids"),
    (("--prompt-ids", "²"), "--prompt-ids: '²' is not a list"),
    (("--prompt-ids", "-5"), "--prompt-ids: '-5' is not a list"),
    (("--prompt-ids", "9" * 5000), "--prompt-ids: '999"),
    (("--prompt-ids", f"1,{VOCAB_SIZE}"), f"token id {VOCAB_SIZE}; allowed: 0 to"),
    (("--prompt-ids", ""), "prompt: empty"),
    ((*IDS, "--system", "x"), "--system goes through the chat template"),
    (("-p", "x", "--raw", "--chat-template-args", "{}"), "--chat-template-args goes through"),
    (("--chat", "--raw"), "--chat needs the chat template"),
    (("--chat", "--json"), "--json is for one prompt"),
    ((*IDS, "--output", "x"), "--output is of a job"),
    (("--input", "x"), "--input needs --output"),
    (("--input", "x", "--output", "y", "--json"), "--json is for one prompt"),
    ((*IDS, "--num-processes", "2"), "--num-processes and --process-id are of a job"),
    ((*JOB, "--num-processes", "0"), "--num-processes = 0; allowed: an integer >= 1"),
    ((*JOB, "--num-processes", "2", "--process-id", "1"), "--coordinator-address: missing"),
    ((*JOB, *HOSTS, "--coordinator-address", "h"), "--coordinator-address = 'h'; allowed: "),
    (
        (*JOB, *HOSTS, "--coordinator-address", "h:1", "--process-id", "2"),
        "--process-id = 2; allowed: 0 to 1 (--num-processes = 2)",
    ),
    ((*IDS, "--compile-cache", "memory://x"), "--compile-cache = memory://x; allowed: a folder"),
    ((*IDS, "--max-tokens", "0"), "--max-tokens = 0; allowed: "),
    ((*IDS, "--temperature", "-1"), "--temperature = -1; allowed: a number >= 0"),
    ((*IDS, "--temperature", "-1e3"), "--temperature = -1000; allowed: a number >= 0"),
    ((*IDS, "--temperature", "-inf"), "--temperature = -inf; allowed: a number >= 0"),
    ((*IDS, "--temperature", "-0.25"), "--temperature = -0.25; allowed: a number >= 0"),
    ((*IDS, "--temperature", "nan"), "--temperature = nan; allowed: "),
    ((*IDS, "--temperature", "9" * 400), "--temperature = inf; allowed: a number >= 0"),
    (sampling(temperature=10**400), "temperature (in --sampling) = 1000000"),
    ((*IDS, "--top-p", "0"), "--top-p = 0; allowed: "),
    ((*IDS, "--top-p", "2"), "--top-p = 2; allowed: "),
    ((*IDS, "--top-k", "-5"), "--top-k = -5; allowed: "),
    ((*IDS, "--min-p", "2"), "--min-p = 2; allowed: "),
    (sampling(presence_penalty=-2.5), "presence_penalty (in --sampling) = -2.5; allowed: "),
    (sampling(presence_penalty=3), "presence_penalty (in --sampling) = 3; allowed: "),
    (sampling(frequency_penalty=2.01), "frequency_penalty (in --sampling) = 2.01; allowed: "),
    (sampling(frequency_penalty=-3), "frequency_penalty (in --sampling) = -3; allowed: "),
    (sampling(presence_penalty=-9), "presence_penalty (in --sampling) = -9; allowed: "),
    (sampling(frequency_penalty="x"), "frequency_penalty (in --sampling) = 'x'; allowed: "),
    ((*IDS, "--seed", "-1"), "--seed = -1; allowed: "),
    ((*IDS, "--max-model-len", "0"), "--max-model-len = 0; allowed: "),
    ((*IDS, "--max-model-len", "9999"), "--max-model-len = 9999; allowed: up to 512"),
    ((*IDS, "--max-model-len", "3"), "3 tokens leave no room for an answer"),
    ((*IDS, "--max-num-seqs", "-1"), "--max-num-seqs = -1; allowed: "),
    ((*IDS, "--max-num-seqs", "0"), "--max-num-seqs = 0; allowed: "),
    ((*IDS, "--prefill-chunk", "0"), "--prefill-chunk = 0; allowed: "),
    ((*IDS, "--memory-fraction", "0"), "--memory-fraction = 0; allowed: "),
    ((*IDS, "--memory-fraction", "nan"), "--memory-fraction = nan; allowed: "),
    ((*IDS, "--memory-fraction", "2"), "--memory-fraction = 2; allowed: "),
    ((*IDS, "--dtype", "int8"), "--dtype = 'int8'; allowed: "),
    ((*IDS, "--dtype", "x" * 9000), "--dtype = 'xxx"),
    ((*IDS, "--state-dtype", "int8"), "--state-dtype = 'int8'; allowed: "),
    ((*IDS, "--rope-dtype", "int8"), "--rope-dtype = 'int8'; allowed: "),
    ((*IDS, "--kernels", "cuda"), "--kernels = 'cuda'; allowed: "),
    ((*IDS, "--mesh", "data=1,tensors=2"), "--mesh = 'data=1,tensors=2'; allowed: data=D,expert=E"),
    ((*IDS, "--mesh", "expert=2"), "mesh: data=1,expert=2,tensor=1 is 2 devices; there is 1"),
    ((*IDS, "--mesh", "tensor=16"), "mesh: tensor=16 does not divide "),
    ((*IDS, "--batch-invariant", "--kernels", "reference"), "--kernels = 'reference'; allowed: "),
    ((*IDS, "--batch-invariant", "--prefill-chunk", "65"), "--prefill-chunk = 65; allowed: a mult"),
    ((*IDS, "--stop", ""), "--stop = '', of 0 characters; allowed: "),
    ((*IDS, "--stop", "x" * 100_000), "of 100000 characters; allowed: "),
    (sampling(stop=[str(i) for i in range(1000)]), "stop (in --sampling) = 1000 strings"),
    ((*IDS, "--hf-overrides", "{"), "--hf-overrides: not JSON"),
    ((*IDS, "--hf-overrides", "[" * 100_000), "--hf-overrides: not JSON"),
    ((*IDS, "--hf-overrides", '{"head_dim": "x"}'), "--hf-overrides: head_dim = 'x'"),
    ((*IDS, "--hf-overrides", "[1]"), "--hf-overrides: want a JSON object, got [1]"),
    ((*IDS, "--hf-overrides", '{"nonsense": 1}'), "--hf-overrides: unknown name nonsense"),
    (("-p", "x", "--chat-template-args", "{"), "--chat-template-args: not JSON"),
    (("-p", "x", "--chat-template-args", '{"messages": []}'), "--chat-template-args: 'messages'"),
    ((*IDS, "--sampling", "{"), "--sampling: not JSON"),
    ((*IDS, "--sampling", f'{{"seed": {"9" * 5000}}}'), "--sampling: not JSON: Exceeds the"),
    ((*IDS, "--sampling", "3"), "--sampling: want a JSON object"),
    (sampling(stop=5), "stop (in --sampling) = 5; allowed: "),
    (sampling(logit_bias={"x": 1}), "logit_bias (in --sampling) = {'x': 1}; allowed: "),
    (sampling(logit_bias={"1": float("nan")}), "logit_bias (in --sampling) = nan; allowed: "),
    (sampling(best_of=1), "unknown sampling field best_of"),
    (sampling(n=100), "n (in --sampling) = 100; allowed: "),
    (sampling(stop="x" * 9000, top_p="x" * 9000), "top_p (in --sampling) = 'xxx"),
    (sampling(logit_bias={"9" * 5000: 1}), "logit_bias (in --sampling) = {'999"),
    (sampling(logit_bias={"1": 1, "01": 2}), "(in --sampling) = {'1': 1, '01': 2}; allowed: each"),
    (sampling(logit_bias={"999": 1}), "logit_bias (in --sampling): token id 999; allowed: 0 to"),
    (sampling(stop_token_ids=[999]), "stop_token_ids (in --sampling): token id 999; allowed: 0"),
]


@pytest.mark.parametrize(("args", "says"), FLAGS, ids=lambda value: str(value)[:60])
def test_flags(
    good: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], says: str
) -> None:
    check(capsys, ("--model", good, *args), says, EXIT_USAGE)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--nope",), "unrecognized arguments: --nope"),
        (("--seed", "x"), "argument --seed: invalid int value: 'x'"),
        (("--max-num-seqs", "1.5"), "argument --max-num-seqs: invalid int value: '1.5'"),
        (("--top-p", "high"), "argument --top-p: invalid number value: 'high'"),
        ((*IDS, "-p", "a"), "not allowed with argument"),
        (("-p", "a", "--prompt-file", "b"), "not allowed with argument"),
        (("--chat", "--input", "b"), "not allowed with argument"),
        (("--model",), "argument --model: expected one argument"),
        (("--temperature",), "argument --temperature/--temp: expected one argument"),
    ],
    ids=str,
)
def test_flags_that_argparse_refuses(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*args])
    out, err = capsys.readouterr()
    assert (out, caught.value.code) == ("", EXIT_USAGE)
    usage, error = err.splitlines()
    assert usage.startswith("usage: ")
    assert says in error


# Folders.


TEXT = ("-p", "hello")
NO_TEMPLATE = config("tokenizer_config.json", chat_template=None)
FOLDERS: list[tuple[str, Spoil, tuple[str, ...], str]] = [
    ("gone", shutil.rmtree, IDS, "no such folder, and no preset of that name"),
    ("half", half_downloaded, IDS, "1 shard ('model-2-of-2.safetensors') of the 2"),
    ("cut", cut_short, IDS, "model.safetensors"),
    ("parent", moved_into("ling"), IDS, "has no config.json"),
    ("snapshot", moved_into("snapshots/0123abc"), IDS, "has no config.json"),
    ("pickles", only_pickles, IDS, "has no safetensors file, only 1 file ('pytorch_model.bin')"),
    ("no weights", remove("model.safetensors"), IDS, "has no safetensors file"),
    ("native", native_without_manifest, IDS, "looks like a native folder"),
    ("orbax", orbax_export, IDS, "orbax"),
    ("no tokenizer", remove("tokenizer.json"), TEXT, "has no tokenizer.json"),
    ("no tokenizer, stop", remove("tokenizer.json"), (*IDS, "--stop", "x"), "need tokenizer.json"),
    ("no tokenizer, chat", remove("tokenizer.json"), ("--chat",), "has no tokenizer.json"),
    ("tokenizer", write("tokenizer.json", "{"), TEXT, "tokenizer.json: not a tokenizer"),
    ("foreign tokenizer", foreign_tokenizer, TEXT, "tokenizer.json: its largest token id is 350"),
    ("hostile tokenizer", hostile_tokenizer, ("--raw", "-p", "x" * 60), "tokenizer.json can't"),
    ("no template", NO_TEMPLATE, (*TEXT, "--system", "x"), "--system: the model has no chat"),
    ("no template, chat", NO_TEMPLATE, ("--chat",), "has no chat template"),
    ("template", template("{% if %}"), TEXT, "chat_template.jinja"),
    ("raising", template("{{ raise_exception('not so') }}"), TEXT, "not so"),
    ("tokenizer_config", write("tokenizer_config.json", "{"), TEXT, "tokenizer_config.json"),
    ("generation", write("generation_config.json", "{"), IDS, "generation_config.json"),
    ("generation value", config("generation_config.json", top_p=7), IDS, "top_p = 7"),
    ("generation end", config("generation_config.json", eos_token_id="x"), IDS, "eos_token_id"),
    ("no config", remove("config.json"), IDS, "has no config.json"),
    ("config", write("config.json", "{"), IDS, "config.json"),
    ("config list", write("config.json", "[]"), IDS, "config.json"),
    ("architecture", config(architectures=["LlamaForCausalLM"]), IDS, "LlamaForCausalLM"),
    ("quantised", config(quantization_config={"quant_method": "fp8"}), IDS, "quantization_config"),
    ("missing key", config(hidden_size=None), IDS, "hidden_size"),
    ("wrong type", config(hidden_size="36"), IDS, "hidden_size = '36'"),
    ("wrong shape", config(intermediate_size=50), IDS, "the tensors do not fit"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "args", "says"), [f[1:] for f in FOLDERS], ids=[f[0] for f in FOLDERS]
)
def test_folders(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    args: tuple[str, ...],
    says: str,
) -> None:
    spoil(folder)
    check(capsys, ("--model", folder, *args), says, EXIT_USAGE)


def test_the_level_of_the_folder_that_was_meant_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved_into("snapshots/0123abc")(folder)
    lines = check(capsys, ("--model", folder, *IDS), "has no config.json", EXIT_USAGE)
    assert lines[1] == f"  Did you mean {folder / 'snapshots/0123abc'}?"


# Prompts, jobs, presets and the hub; all but the first item of a result is what `check` takes.

Case = tuple[tuple[object, ...], str, int]


def stdin(patch: Patch, raw: bytes) -> None:
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def prompt_file(raw: bytes | None, says: str) -> Callable[[Path, Path, Patch], Case]:
    """A prompt file of these bytes; None: a folder."""

    def case(good: Path, tmp: Path, _patch: Patch) -> Case:
        path = tmp / "prompt"
        path.mkdir() if raw is None else path.write_bytes(raw)
        return ("--model", good, "--prompt-file", path), says, EXIT_USAGE

    return case


def no_prompt_file(good: Path, tmp: Path, _patch: Patch) -> Case:
    return ("--model", good, "-f", tmp / MISSING), "cannot be read: No such file", EXIT_USAGE


def piped(raw: bytes, says: str) -> Callable[[Path, Path, Patch], Case]:
    def case(good: Path, _tmp: Path, patch: Patch) -> Case:
        stdin(patch, raw)
        return ("--model", good, "-p", "-"), says, EXIT_USAGE

    return case


def job(
    lines: str | None, says: str, spoil: Spoil = lambda _tmp: None, output: str = "out"
) -> Callable[[Path, Path, Patch], Case]:
    def case(good: Path, tmp: Path, _patch: Patch) -> Case:
        if lines is not None:
            (tmp / "in").write_text(lines)
        spoil(tmp)
        return (
            ("--model", good, "--input", tmp / "in", "--output", tmp / output), says, EXIT_USAGE
        )  # fmt: skip

    return case


def read_only_job(good: Path, tmp: Path, patch: Patch) -> Case:
    """As access() answers; to root a folder's mode says nothing."""
    patch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    return job('{"prompt_ids": [1]}\n', "no permission to write it")(good, tmp, patch)


def hub(error: Exception | None, says: str, code: int) -> Callable[[Path, Path, Patch], Case]:
    """--download that meets an error; None: no --download."""

    def case(_good: Path, _tmp: Path, patch: Patch) -> Case:
        def fetch(*_args: Any, **options: Any) -> str:
            assert options["local_files_only"] is (error is None)
            raise error or LocalEntryNotFoundError("not in the cache")

        patch.setattr(huggingface_hub, "snapshot_download", fetch)
        flags = () if error is None else ("--download",)
        return ("--model", "some-org/some-name", *IDS, *flags), says, code

    return case


def preset(*args: str, says: str, code: int = EXIT_USAGE) -> Callable[[Path, Path, Patch], Case]:
    return lambda _good, _tmp, _patch: ((*args, *IDS), says, code)


def no_small_model(_good: Path, tmp: Path, patch: Patch) -> Case:
    """An installation without the weights of the shipped model."""
    patch.setattr(small_model, "__file__", str(tmp / "__init__.py"))
    return (), "the small model's weights are not installed", EXIT_FAILURE


def profile_in_a_file(good: Path, tmp: Path, _patch: Patch) -> Case:
    (tmp / "file").write_text("")
    return ("--model", good, *IDS, "--profile", tmp / "file/x"), "can't be written", EXIT_USAGE


def too_large(good: Path, _tmp: Path, _patch: Patch) -> Case:
    args = ("--model", good, *IDS, "--memory-fraction", "1e-9")
    return args, "the model does not fit", EXIT_DOES_NOT_FIT


def response(kind: type[Exception]) -> Exception:
    """An error of the hub as the library raises it, less the response it came with."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error.\n\nRepository Not Found for url: ...",)
    return error


GOOD_LINE = '{"prompt_ids": [1]}\n'
OTHERS: dict[str, Callable[[Path, Path, Patch], Case]] = {
    "no prompt file": no_prompt_file,
    "prompt file not UTF-8": prompt_file(b"\xff\xfe", "not UTF-8"),
    "prompt file a folder": prompt_file(None, "cannot be read: Is a directory"),
    "prompt file empty": prompt_file(b"\n", "empty"),
    "stdin empty": piped(b"", "stdin: empty"),
    "stdin not UTF-8": piped(b"\xff", "stdin: not UTF-8"),
    "job not JSON": job("{", "line 1: not JSON"),
    "job unknown key": job('{"prompt_ids": [1], "x": 1}\n', "line 1: unknown key 'x'"),
    "job empty": job("", "no requests"),
    "job missing": job(None, "no such file"),
    "job output nowhere": job(GOOD_LINE, "there is no folder", output="nowhere/out"),
    "job output read-only": read_only_job,
    "job output of another": job(GOOD_LINE, "out", write("out", '{"id": 7, "x": 1}\n')),
    "job output is its input": job(GOOD_LINE, "both the job's input and its", output="in"),
    "unknown preset": preset("--model", "ling-9", says="ling-9: no such folder"),
    "no small model": no_small_model,
    "download what": preset("--download", says="--model is missing"),
    "unsupported preset": preset("--model", "ling-3.0-tiny", says="BailingMoeV3ForCausalLM"),
    "huge preset": preset(
        "--model", "ling-1t", says="the model does not fit", code=EXIT_DOES_NOT_FIT
    ),
    "does not fit": too_large,
    "not in the cache": hub(None, "some-org/some-name: no such folder", EXIT_USAGE),
    "no network": hub(LocalEntryNotFoundError("no\nway"), "from the hub: no", EXIT_FAILURE),
    "bad name": hub(response(RepositoryNotFoundError), "from the hub: 401", EXIT_FAILURE),
    "gated": hub(response(GatedRepoError), "from the hub: 401", EXIT_FAILURE),
    "hub without a message": hub(OSError(), "from the hub: OSError", EXIT_FAILURE),
    "proxy": hub(RuntimeError("proxy"), "from the hub: proxy", EXIT_FAILURE),
    "profile": profile_in_a_file,
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_prompts_jobs_presets_and_the_hub(
    good: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    case: Callable[[Path, Path, Patch], Case],
) -> None:
    check(capsys, *case(good, tmp_path, monkeypatch))


def test_a_model_nobody_knows_is_answered_with_the_presets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, presets = check(capsys, ("--model", tmp_path / MISSING, *IDS), "no preset", EXIT_USAGE)
    assert all(name in presets for name in preset_names())
    assert "ling-3.0-tiny (not supported yet)" in presets
    assert "ring-mini-linear-2.0 (not" not in presets


def test_what_does_not_fit_comes_with_a_table(
    good: Path, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = check(capsys, *too_large(good, tmp_path, monkeypatch))
    shown = [line.split("  ")[1] for line in lines[1:-1]]
    assert shown == ["weights", "recurrent state", "pages", "temporaries"]
    smaller = "--max-num-seqs, --max-model-len, --dtype bfloat16"
    assert lines[-1] == f"  Smaller: {smaller}. Larger: --memory-fraction, --mesh."


def test_the_tables_are_long_enough() -> None:
    assert len(FLAGS) + len(FOLDERS) + len(OTHERS) >= 60


HINTS: list[tuple[Spoil, tuple[str, ...], str]] = [
    (lambda _: None, ("-p", "a b c d " * 50), "Shorten the prompt or raise --max-model-len."),
    (remove("tokenizer.json"), (*IDS, "--stop", "x"), "Use stop_token_ids (in --sampling)."),
]


@pytest.mark.parametrize(("spoil", "args", "hint"), HINTS, ids=[h[2] for h in HINTS])
def test_remedies_name_flags(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    args: tuple[str, ...],
    hint: str,
) -> None:
    spoil(folder)
    assert check(capsys, ("--model", folder, *args), "", EXIT_USAGE)[-1] == f"  {hint}"


def test_no_mistake_speaks_of_an_option_by_another_name_than_its_flag(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only in --sampling fields keep their names, and it is said that they stand there."""
    options = "|".join(flags.names(flags.parser().parse_args([])))
    bare = re.compile(rf"(?<![\w'-])({options})(?= = | is |: |[.,;])")
    for args, _ in FLAGS:
        main(["--max-model-len", "96", "--quiet", "--model", str(good), *args])
        shown = capsys.readouterr().err.splitlines()
        assert shown
        # What follows "Known: " are the fields of --sampling.
        assert not any(bare.search(line) for line in shown if "Known: " not in line), args


def test_a_line_of_a_job_keeps_its_keys_and_the_flags_beside_it_are_named(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text('{"prompt_ids": [1], "top_p": 7}\n')
    args = ("--model", good, "--input", tmp_path / "in", "--output", tmp_path / "out")
    lines = check(capsys, args, "in, line 1: top_p = 7; allowed: ", EXIT_USAGE)
    assert "--" not in lines[0].replace(str(tmp_path), "")
    check(capsys, (*args, "--top-p", 7), "error: --top-p = 7; allowed: ", EXIT_USAGE)
    (tmp_path / "in").write_text(json.dumps({"prompt_ids": [1] * 200}) + "\n")
    lines = check(capsys, args, "no room for an answer; --max-model-len is 96", EXIT_USAGE)
    assert lines[1] == "  Shorten the prompt or raise --max-model-len."


def test_a_value_that_is_an_options_name_stays_as_it_was_typed(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(capsys, ("--model", good, *IDS, "--dtype", "dtype"), "--dtype = 'dtype'; ", EXIT_USAGE)


def test_the_python_interface_keeps_its_own_names(good: Path) -> None:
    with pytest.raises(UserError, match=r"^max_model_len = 0; allowed: "):
        LLM(good, max_model_len=0)


# Not mistakes, or not of the user's.


def test_a_compile_cache_that_cannot_be_written_is_only_a_warning(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    args = ["--model", str(good), *IDS, "-n", "1", "--prefill-chunk", "16"]
    assert main([*args, "--compile-cache", cache, "--max-model-len", "96"]) == EXIT_OK
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert f"compile cache: {cache} can't be used: " in err
    assert "going on without a cache" in err
    assert "(cache: off)" in err


def test_a_closed_stdout_is_refused_before_anything_is_loaded(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--model", MISSING, *IDS]) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("error: stdout is closed\n  ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_a_full_disk_under_stdout_is_told_once() -> None:
    command = [sys.executable, "-m", "bailing_jax.generate", "--env"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == EXIT_FAILURE
    assert done.stderr.splitlines() == [
        "error: stdout can't be written: No space left on device",
        "  Make room where it leads, or send it elsewhere.",
    ]


def test_an_interruption_is_one_word_and_code_130(
    good: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_args: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("bailing_jax.cli.prompts.read_text", interrupted)
    assert main(["--model", str(good), "-p", "x"]) == EXIT_INTERRUPTED
    assert capsys.readouterr() == ("", "interrupted\n")
