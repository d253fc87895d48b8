"""The static sizes of steps: few, each large enough, and warmed up ahead of time."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from tiny_models import tiny_llm

from bailing_jax import SamplingParams
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.sizes import (
    decode_size,
    decode_sizes,
    job_programs,
    prefill_size,
    prompt_programs,
)
from bailing_jax.engine.warming import compile_all

pytestmark = [pytest.mark.compiles, pytest.mark.unoptimised]


def limits(num_seqs: int, chunk: int) -> EngineLimits:
    return EngineLimits(num_seqs, 128, chunk, 64)


def test_sizes_by_hand() -> None:
    eight = limits(8, 512)
    assert job_programs(eight) == (
        (8, 64, 8), (8, 256, 8), (8, 512, 8), (1, 0, 0), (2, 0, 0), (4, 0, 0), (8, 0, 0),
    )  # fmt: skip
    assert job_programs(limits(1, 64)) == ((1, 64, 1), (1, 0, 0))
    assert job_programs(limits(3, 16)) == ((3, 16, 3), (1, 0, 0), (2, 0, 0), (3, 0, 0))
    assert prefill_size(limits(100, 2000), 257) == (100, 1024, 32)
    assert prompt_programs(eight, 700) == ((8, 256, 8), (8, 512, 8), (1, 0, 0))
    assert prompt_programs(eight, 512) == ((8, 512, 8), (1, 0, 0))


@pytest.mark.parametrize("num_seqs", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("chunk", [1, 16, 64, 65, 300, 1500])
def test_every_step_has_room_and_a_program(num_seqs: int, chunk: int) -> None:
    bound = limits(num_seqs, chunk)
    programs = job_programs(bound)
    assert len(programs) == len(set(programs)) <= 12
    for tokens in range(1, chunk + 1):
        size = prefill_size(bound, tokens)
        assert tokens <= size.prefill_rows <= chunk
        assert size.decode_rows == num_seqs
        assert size in programs
        assert size in prompt_programs(bound, tokens)
    for count in range(1, num_seqs + 1):
        size = decode_size(bound, count)
        assert count <= size.decode_rows <= num_seqs
        assert size.decode_rows < 2 * count
        assert size in programs


@pytest.mark.parametrize(
    ("num_seqs", "rows"),
    [
        (100, (1, 2, 4, 8, 16, 32, 64, 100)),
        (256, (1, 4, 8, 16, 32, 64, 128, 256)),
        (1024, (1, 4, 16, 64, 128, 256, 512, 1024)),
    ],
)
def test_where_many_run_at_once_small_steps_are_left_out(
    num_seqs: int, rows: tuple[int, ...]
) -> None:
    bound = limits(num_seqs, 2048)
    assert tuple(size.decode_rows for size in decode_sizes(bound)) == rows
    assert len(job_programs(bound)) == 12


def test_exact_mode_has_one_size_to_decode_and_a_few_to_prefill() -> None:
    exact = EngineLimits(5, 128, 32, 64, exact=True)
    assert job_programs(exact) == ((0, 32, 5), (5, 0, 0))
    assert prompt_programs(exact, 3) == ((0, 32, 5), (5, 0, 0))
    assert prefill_size(exact, 1).in_words() == "32 prefill rows"
    exact = EngineLimits(40, 128, 512, 64, exact=True)
    assert job_programs(exact) == ((0, 64, 32), (0, 256, 32), (0, 512, 32), (40, 0, 0))
    assert prompt_programs(exact, 600) == ((0, 256, 32), (0, 512, 32), (40, 0, 0))
    assert prompt_programs(exact, 70) == ((0, 256, 32), (40, 0, 0))


MIXED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0},
    "cut": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "biased": {"temperature": 0.7, "logit_bias": {5: 2.0}, "frequency_penalty": 0.1},
    "measured": {"temperature": 0.0, "logprobs": 3},
    "measured more": {"temperature": 1.0, "logprobs": 20, "n": 2},
    "several": {"temperature": 1.2, "n": 4, "seed": 3},
    "stopped": {"temperature": 0.0, "stop_token_ids": list(range(40, 60)), "stop": "lo"},
}


def test_after_warming_everything_up_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowering and compiling are counted wherever they happen in the process."""
    llm = tiny_llm()
    said: list[str] = []
    llm.warm_up_all(said.append)
    assert said[0].startswith(f"compiling {len(job_programs(llm.limits))} programs")
    assert len(said) == 1 + len(job_programs(llm.limits))
    llm.generate([1], SamplingParams(max_tokens=1))  # jax itself has a first time for some things
    events: list[str] = []
    listener = lambda event, _seconds, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        params = [SamplingParams(max_tokens=3 + i, **f) for i, f in enumerate(MIXED.values())]
        prompts = [list(range(1, 2 + 5 * i)) for i in range(len(params))]
        llm.generate(prompts, params)
        for prompt, param in zip(prompts, params, strict=True):
            llm.generate(prompt, param)
        assert [event for event in events if "compile" in event] == []
        jax.jit(lambda x: x + len(events))(1.0)
        assert any("compile" in event for event in events)  # the count works
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_compiling_stops_at_the_first_failure() -> None:
    done: list[int] = []

    def failing() -> None:
        raise ValueError("no")

    jobs = {"bad": failing} | {str(i): lambda i=i: done.append(i) for i in range(3)}
    with pytest.raises(ValueError, match="no"):
        compile_all(jobs, lambda _line: None)
