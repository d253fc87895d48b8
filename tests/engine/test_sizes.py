"""The static sizes of steps: few, each large enough, and warmed up ahead of time."""

from __future__ import annotations

import pytest
from tiny_models import linear_llm

from bailing_jax import SamplingParams
from bailing_jax.engine.engine import EngineLimits
from bailing_jax.engine.sizes import decode_size, job_programs, prefill_size, prompt_programs


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


def test_after_warming_everything_up_nothing_compiles() -> None:
    llm = linear_llm()
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    said: list[str] = []
    llm.warm_up_all(params, said.append)
    compiled = dict(llm._engine._programs._compiled)
    assert len(said) >= len(job_programs(llm.limits))
    llm.generate([[1, 2, 3], list(range(40)), [5]], params)
    assert llm._engine._programs._compiled == compiled
