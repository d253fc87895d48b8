"""Jobs: each answer is that of its line alone, in whatever order and company lines come."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from job_runs import (
    SHORT,
    Entry,
    read,
    refused,
    run,
    sorted_lines,
    watch_os,
    whole_run,
    write_input,
)
from tiny_models import NUM_SEQS, linear_llm, tiny_llm

from bailing_jax import LLM, SamplingParams
from bailing_jax.cli import job, job_output
from bailing_jax.cli.job_input import Requests
from bailing_jax.request import CompletionOutput

pytestmark = pytest.mark.unoptimised


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def finished(source: Path, tmp_path: Path) -> list[bytes]:
    return whole_run(source, tmp_path)


MIXED: list[Entry] = [
    {"id": "plain", "prompt": "hello and the other", "max_tokens": 9},
    {"id": "talk", "messages": [{"role": "system", "content": "in"},
                                {"role": "user", "content": "how is it?"}], "max_tokens": 7},
    {"id": "ids", "prompt_ids": [5, 6, 7]},
    {"id": "drawn", "prompt_ids": [8, 9], "temperature": 1.0, "seed": 11, "max_tokens": 12},
    {"id": "drawn by the flag's seed", "prompt_ids": [8, 9], "temperature": 1.0},
    {"id": "cut", "prompt_ids": [8, 9], "temperature": 0.9, "top_k": 40, "top_p": 0.9},
    {"id": "long", "prompt_ids": list(range(40, 80)), "max_tokens": 21},
    {"id": 7, "prompt": "naïve 😀 \u2028 \u0000 text", "repetition_penalty": 1.3},
    {"id": "7", "prompt_ids": [300], "logit_bias": {"17": 50.0}, "max_tokens": 3},
    {"id": "two", "prompt_ids": [1, 2, 3], "n": 2, "temperature": 1.0, "seed": 5},
    {"id": "bound to stop", "prompt_ids": [4, 4], "stop_token_ids": [17],
     "logit_bias": {"17": 50.0}},
    {"prompt_ids": [301, 1], "min_p": 0.1, "temperature": 2.0, "top_k": None},
]  # fmt: skip


def alone(llm: LLM, entry: Entry, line: int) -> Entry:
    """What the engine answers to a line when nobody else is there."""
    fields = {"max_tokens": 5, "seed": 0, "ignore_eos": True, **entry}
    request_id = fields.pop("id", line)
    ids = fields.pop("prompt_ids", None)
    if ids is None:
        text = fields.pop("prompt", None)
        talk = [{"role": "user", "content": text}] if text else fields.pop("messages")
        ids = llm.chat_prompt(talk)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(k): v for k, v in fields["logit_bias"].items()}
    (answer,) = llm.generate([ids], SamplingParams(**fields))
    parts = [
        {"text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason}
        for o in answer.outputs
    ]
    generated = sum(len(part["token_ids"]) for part in parts)
    usage = {"prompt_tokens": len(ids), "completion_tokens": generated}
    if len(parts) > 1:
        return {"id": request_id, "outputs": parts, "usage": usage}
    return {"id": request_id, **parts[0], "usage": usage}


# Answers.


def test_each_answer_is_that_of_its_line_alone(source: Path, output: Path) -> None:
    llm = linear_llm()
    run(llm, write_input(source, MIXED), output)
    answers = read(output)
    expected = [alone(llm, entry, line) for line, entry in enumerate(MIXED, 1)]
    assert answers == {answer["id"]: answer for answer in expected}
    assert len(answers) == len(MIXED)
    # The cases are what they are called.
    assert answers["bound to stop"]["finish_reason"] == "stop"
    assert answers["7"]["token_ids"] == [17, 17, 17]
    assert len(answers["two"]["outputs"]) == 2
    assert answers["two"]["outputs"][0] != answers["two"]["outputs"][1]
    assert answers["two"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 10}
    seeded = {**MIXED[4], "seed": 1}
    assert alone(llm, seeded, 5) != alone(llm, MIXED[4], 5)


@pytest.fixture(scope="module")
def narrow_llm() -> LLM:
    return tiny_llm(max_num_seqs=1)


@pytest.mark.parametrize("order", [1, 2])
def test_order_and_company_change_no_line(
    source: Path, output: Path, tmp_path: Path, narrow_llm: LLM, order: int
) -> None:
    entries = [{"id": line, **entry} for line, entry in enumerate(MIXED, 1)]
    run(linear_llm(), write_input(source, entries), output)
    random.Random(order).shuffle(entries)
    other = tmp_path / "other.jsonl"
    run((linear_llm(), narrow_llm)[order % 2], write_input(source, entries), other)
    assert sorted_lines(other) == sorted_lines(output)


def test_answers_come_as_they_finish_each_in_one_write(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a slow one."""
    written = watch_os(monkeypatch, "write")
    lengths = [30, 3, 4, 5, 6]
    entries = [{"prompt_ids": [9], "max_tokens": length} for length in lengths]
    run(linear_llm(), write_input(source, entries), output)
    order = list(read(output))
    assert sorted(order) == [1, 2, 3, 4, 5]
    assert order[-1] == 1
    assert b"".join(written) == output.read_bytes()
    assert [piece.count(b"\n") for piece in written] == [1] * 5
    assert all(piece.endswith(b"\n") for piece in written)


def test_fields_of_the_line_win_over_the_flags(source: Path, output: Path) -> None:
    entries = [
        {"id": "flag", "prompt_ids": [5]},
        {"id": "own", "prompt_ids": [5], "max_tokens": 2, "logit_bias": {"19": 50}},
        {"id": "off", "prompt_ids": [5], "logit_bias": None, "max_tokens": 4},
    ]
    run(linear_llm(), write_input(source, entries), output, max_tokens=3, logit_bias={17: 50})
    answers = read(output)
    assert answers["flag"]["token_ids"] == [17] * 3
    assert answers["own"]["token_ids"] == [19] * 2
    assert 17 not in answers["off"]["token_ids"]


def test_a_prompt_goes_through_the_template_unless_raw(source: Path, output: Path) -> None:
    llm = linear_llm()
    talk = [{"role": "user", "content": "hello"}]
    entries = [{"id": "text", "prompt": "hello"}, {"id": "talk", "messages": talk}]
    run(llm, write_input(source, entries), output)
    answers = read(output)
    assert answers["text"]["token_ids"] == answers["talk"]["token_ids"]
    wrapped = len(llm.chat_prompt(talk))
    assert answers["text"]["usage"]["prompt_tokens"] == wrapped
    output.unlink()
    run(llm, source, output, raw=True)
    answers = read(output)
    assert answers["talk"]["usage"]["prompt_tokens"] == wrapped
    assert answers["text"]["usage"]["prompt_tokens"] == len(llm.encode("hello")) < wrapped


def test_log_probabilities_are_there_if_asked_for(source: Path, output: Path) -> None:
    llm = linear_llm()
    entries = [
        {"id": "asked", "prompt_ids": [5, 6], "logprobs": 2},
        {"id": "chosen", "prompt_ids": [5, 6], "logprobs": 0, "n": 2},
        {"id": "not", "prompt_ids": [5, 6]},
    ]
    run(llm, write_input(source, entries), output)
    answers = read(output)
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2)
    (want,) = llm.generate([5, 6], params)[0].outputs
    got = [{int(k): v for k, v in entry.items()} for entry in answers["asked"]["logprobs"]]
    assert got == [pytest.approx(entry, abs=1e-4) for entry in want.logprobs or ()]
    assert [len(entry) for entry in got] == [2] * 5
    for one in answers["chosen"]["outputs"]:
        assert [list(entry) for entry in one["logprobs"]] == [[str(i)] for i in one["token_ids"]]
    assert "logprobs" not in answers["not"]


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(source: Path, output: Path) -> None:
    llm = linear_llm()
    (whole,) = llm.generate([5, 6], SamplingParams(max_tokens=20, ignore_eos=True))[0].outputs
    stop = (whole.text or "")[4:7]
    entries = [
        {"id": "one", "prompt_ids": [5, 6], "max_tokens": 20, "stop": stop},
        {"id": "list", "prompt_ids": [5, 6], "max_tokens": 20, "stop": ["nowhere", stop]},
    ]
    run(llm, write_input(source, entries), output, stop=["not there"])
    for answer in read(output).values():
        assert answer["finish_reason"] == "stop"
        assert answer["text"] == (whole.text or "").partition(stop)[0]
        assert len(answer["token_ids"]) < 20


def test_without_a_tokenizer_there_is_no_text(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_llm(), "tokenizer", None)
    run(linear_llm(), write_input(source, [{"prompt_ids": [3, 1, 4]}]), output)
    answer = read(output)[1]
    assert answer["text"] is None
    assert len(answer["token_ids"]) == 5


def test_unicode_is_written_as_it_is(source: Path, output: Path) -> None:
    llm = linear_llm()
    letters = llm.encode("ñ")
    assert len(letters) == 2
    entry = {"id": "ключ \u2028", "prompt_ids": [1], "max_tokens": 1}
    biased = {**entry, "id": "half", "logit_bias": {str(letters[0]): 60}}
    run(llm, write_input(source, [entry, biased]), output)
    assert '{"id": "ключ \u2028", "text": '.encode() in output.read_bytes()
    assert read(output)["half"]["text"] == "\ufffd"
    assert "\ufffd".encode() in output.read_bytes()


def test_numbers_json_lacks_become_null() -> None:
    entry = {3: -0.5, 4: float("-inf"), 5: float("nan")}
    answer = CompletionOutput(0, "", [3], [entry], "stop")
    request: Any = SimpleNamespace(
        output=lambda: SimpleNamespace(outputs=[answer]),
        prompt_token_ids=[1],
        params=SamplingParams(logprobs=3),
    )
    record = job_output.record_of("x", request)
    assert record["logprobs"] == [{"3": -0.5, "4": None, "5": None}]


def test_blank_lines_count_but_ask_nothing(source: Path, output: Path) -> None:
    source.write_bytes(b'\n{"prompt_ids": [1]}\r\n \t\n\n{"prompt_ids": [2]}')
    run(linear_llm(), source, output)
    assert sorted(read(output)) == [2, 5]


def test_no_more_is_submitted_than_keeps_the_engine_busy(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough that a slot never waits, few enough for a million lines; n counts n times."""
    llm, active, seen = linear_llm(), [], []
    submit, step = llm.submit, llm.step
    monkeypatch.setattr(llm, "submit", lambda r, p: (active.append(r), submit(r, p)))

    def counting() -> None:
        seen.append(sum(r.params.n for r in active if llm.is_unfinished(r)))
        step()

    monkeypatch.setattr(llm, "step", counting)
    entries = [{"prompt_ids": [i], "max_tokens": 1 + i % 5, "n": 1 + i % 2} for i in range(1, 31)]
    run(llm, write_input(source, entries), output)
    assert len(read(output)) == 30
    assert 2 * NUM_SEQS <= max(seen) <= 2 * NUM_SEQS + 1
    assert min(seen[: len(seen) // 2]) >= NUM_SEQS


# stdin, stdout.


def stdin_of(raw: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(raw), encoding="ascii")


def test_stdin_is_read_as_a_file_is(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job from stdin goes on too, if it is given the same once more."""
    raw = source.read_bytes()
    output.write_bytes(b"".join(finished[:3]) + finished[3][:20])
    monkeypatch.setattr(sys, "stdin", stdin_of(raw))
    run(linear_llm(), None, output)
    assert sorted_lines(output) == sorted(finished)
    monkeypatch.setattr(sys, "stdin", stdin_of(b"{}\n"))
    assert refused(None, output).message.startswith("stdin, line 1: no prompt")
    monkeypatch.setattr(sys, "stdin", None)
    assert refused(None, output).message == "stdin is closed"


def test_a_pipe_is_read_once(source: Path, output: Path, finished: list[bytes]) -> None:
    """As `<(...)` of a shell gives it."""
    fifo = source.with_name("fifo")
    os.mkfifo(fifo)
    with subprocess.Popen(["cp", str(source), str(fifo)]):
        run(linear_llm(), fifo, output)
    assert sorted_lines(output) == sorted(finished)


def test_stdout_gets_the_lines_and_nothing_else(
    source: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    reader, writer = os.pipe()
    with open(writer, "w") as pipe, open(reader, "rb") as end:
        monkeypatch.setattr(sys, "stdout", pipe)
        run(linear_llm(), source, None, say=said.append)
        pipe.close()
        assert sorted(end) == sorted(finished)
    assert said[0] == f"{source}: 8 requests"


def test_ctrl_c_promises_nothing_for_stdout(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(linear_llm(), "step", interrupted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(linear_llm(), write_input(source, SHORT), None, say=said.append)
    assert said[-1] == "8 of 8 requests are left"
    assert capfd.readouterr().out == ""


def test_a_closed_stdout_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert refused(write_input(source, SHORT), None).message == "stdout is closed"


# Remarks.


def test_progress_names_what_is_done_how_fast_and_what_is_left(
    source: Path, output: Path, finished: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output.write_bytes(b"".join(finished[:3]))
    monkeypatch.setattr(job, "PROGRESS_S", 0)
    said: list[str] = []
    run(linear_llm(), source, output, say=said.append)
    assert said[0] == f"{source}: 8 requests, 3 done"
    assert said[1:6] == [f"{n}/5 prompts checked" for n in range(1, 6)]
    numbers = [int(line.partition("/8 requests, ")[0]) for line in said[6:-1]]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (3, 8)
    assert all(" tokens/s" in line for line in said[6:-1])
    assert all((", about " in line) == (n > 3) for n, line in zip(numbers, said[6:-1], strict=True))
    tokens = sum(len(json.loads(line)["token_ids"]) for line in finished[3:])
    assert said[-1].startswith("8/8 requests; 5 in ")
    assert f": 10 prompt tokens, {tokens} generated at " in said[-1]
    monkeypatch.undo()
    output.unlink()
    said.clear()
    run(linear_llm(), source, output, say=said.append)
    assert len(said) == 2  # no more than a line every few seconds


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(job.time, "monotonic", lambda: now)
    progress = job._Progress(total=50, found=10)
    for _ in range(240):
        progress.token(None)  # pyright: ignore
    now = 160.0
    assert progress.is_due()
    assert not progress.is_due()
    assert progress.line(0) == "10/50 requests, 4.0 tokens/s"
    assert progress.line(4) == "14/50 requests, 4.0 tokens/s, about 0:09:00 left"
    assert progress.line(39) == "49/50 requests, 4.0 tokens/s, about 1.5 s left"
    now = 100 + 3723
    assert progress.total(40).startswith("50/50 requests; 40 in 1:02:03: ")


def test_a_step_that_compiles_does_not_count_in_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it took, rate and time left are those of the same job with warm programs."""
    now = 100.0
    monkeypatch.setattr(job.time, "monotonic", lambda: now)
    cold, warm = (job._Progress(total=50, found=10) for _ in range(2))

    def step(progress: job._Progress, seconds: float, tokens: int, compiles: bool) -> None:
        nonlocal now
        with progress.step():
            if compiles:
                progress.compiles()
            now += seconds
            for _ in range(tokens):
                progress.token(None)  # pyright: ignore

    steps = ((30, 1, True), (20, 100, False), (45, 2, True), (5, 50, False))
    for seconds, tokens, compiles in steps:
        step(cold, seconds, tokens, compiles)
        assert cold.is_due() == (not compiles)  # it has just been said
    now = 100.0
    for seconds, tokens in ((20, 100), (5, 50)):
        step(warm, seconds, tokens, False)
    assert warm.line(4) == "14/50 requests, 6.0 tokens/s, about 0:03:45 left"
    assert warm.total(4) == "14/50 requests; 4 in 25.0 s: 0 prompt tokens, 150 generated at 6.0/s"
    now = 200.0
    assert cold.line(4) == "14/50 requests, 6.0 tokens/s, about 0:03:45 left"
    total = "14/50 requests; 4 in 0:01:40 (0:01:15 of it compiling): 0 prompt tokens, 153 generated"
    assert cold.total(4) == f"{total} at 6.0/s"


def test_a_job_of_nothing_but_compiling_steps_claims_no_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(job.time, "monotonic", lambda: now)
    progress = job._Progress(total=1, found=0)
    with progress.step():
        progress.compiles()
        now = 3.0
        progress.token(None)  # pyright: ignore
    assert progress.total(1) == (
        "1/1 requests; 1 in 3.0 s (3.0 s of it compiling): 0 prompt tokens, 1 generated"
    )


def test_a_job_says_when_it_compiles_and_only_then(source: Path, output: Path) -> None:
    llm, said = tiny_llm(max_num_seqs=2), list[str]()
    write_input(source, [{"prompt_ids": [i, 3], "max_tokens": 2 + 6 * i} for i in range(4)])
    run(llm, source, output, say=said.append)
    compiling = [line for line in said if line.startswith("compiling ")]
    assert said == [said[0], *compiling, said[-1]]
    assert sorted(compiling) == [
        "compiling 1 decode row",
        "compiling 2 decode rows",
        "compiling 2 decode rows, 16 prefill rows",
    ]
    assert " of it compiling): " in said[-1]
    output.unlink()
    said.clear()
    run(llm, source, output, say=said.append)
    assert len(said) == 2
    assert "compiling" not in said[-1]


def test_after_a_job_nobody_is_told_of_compiling(source: Path, output: Path) -> None:
    llm, said = tiny_llm(max_num_seqs=2), list[str]()
    run(llm, write_input(source, [{"prompt_ids": [3]}]), output, say=said.append)
    assert "compiling 2 decode rows" not in said
    before = list(said)
    llm.generate([[1], [2]], SamplingParams(max_tokens=3, ignore_eos=True))  # that compiles it
    assert said == before


# Cost.


def test_a_long_input_is_not_held_in_memory(source: Path, output: Path) -> None:
    """Some 200 bytes a request; the lines here have 700."""
    count, text = 20_000, "wörd " * 110
    with source.open("w", encoding="utf-8") as file:
        for i in range(count):
            file.write(json.dumps({"id": f"request-{i:09}", "prompt": text}) + "\n")
    assert source.stat().st_size > 14_000_000

    class Measured(Exception):
        pass

    def load() -> Any:
        now, peak = tracemalloc.get_traced_memory()
        assert peak < 6_000_000
        assert now < 1_000_000  # the ids are gone
        raise Measured

    tracemalloc.start()
    try:
        with pytest.raises(Measured):
            job.run_job(load, source, output, {}, lambda _line: None)
    finally:
        tracemalloc.stop()
    with Requests(source, {}) as requests:
        last = requests.load(count - 1)
        assert (last.id, last.prompt) == (f"request-{count - 1:09}", text)


def test_the_input_is_checked_without_jax(source: Path, output: Path) -> None:
    write_input(source, [{"prompt": "x", "top_p": 7}, {"prompt": "x"}])
    script = f"""
import sys
from pathlib import Path
from bailing_jax.cli.job import run_job
from bailing_jax.errors import UserError
try:
    run_job(None, Path({str(source)!r}), Path({str(output)!r}), {{}}, print)
except UserError as error:
    print(error.message)
assert not {{"jax", "numpy", "flax", "tokenizers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{source}, line 1: top_p = 7; allowed: ")
