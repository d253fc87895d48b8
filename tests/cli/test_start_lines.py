"""What is said of a model when it starts: all of it, in lines that fit a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_llm

from bailing_jax.config import SUPPORTED, ModelConfig
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine_options import EngineOptions
from bailing_jax.loading import _in_words, _memory_in_words
from bailing_jax.memory import MemoryPlan
from bailing_jax.presets import PRESETS, Preset

WIDTH = 100
RUNNABLE = [p for p in PRESETS.values() if p.hf_config["architectures"] in [[a] for a in SUPPORTED]]


@pytest.mark.parametrize("preset", RUNNABLE, ids=lambda preset: preset.name)
def test_no_line_is_longer_than_a_terminal_is_wide(preset: Preset) -> None:
    """With the longest value of every option that somebody would set."""
    config = ModelConfig.from_hf(preset.hf_config)
    options = EngineOptions(
        dtype="bfloat16",
        rope_dtype="bfloat16",
        state_dtype="bfloat16",
        kernels="reference",
        max_num_seqs=1024,
        max_model_len=config.max_positions,
        prefill_chunk=16384,
    )
    lines = _in_words(config, options.runtime(config, "gpu"), options.limits(config), options)
    assert len(lines) == 2
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[0].startswith(f"{config.architecture}: ")
    assert lines[0].endswith(" M parameters, bfloat16, state bfloat16, rope bfloat16")
    decay = "" if config.lightning is None else ", decay layer offset 0"
    sizes = f"1024 sequences of {config.max_positions} tokens, prefill chunk 16384{decay}"
    assert lines[1].startswith(f"{sizes}, kernels reference on ")


def test_the_memory_line_names_slots_and_pages_and_fits_too() -> None:
    limits = EngineLimits(1024, 2**18, 64, 64, max_num_pages=1234567)
    size = 999_999_900_000
    names = ("weights", "recurrent_state", "pages", "temporaries")
    plan = MemoryPlan(
        limits, limits.state_spec("bfloat16", "float32"), dict.fromkeys(names, size), None, None
    )
    line = _memory_in_words(plan)
    assert "1024 slots 999,999.9 MB, 1234567 pages of 4194304 999,999.9 MB" in line
    assert len(line) <= WIDTH + 20  # a line of a million pages may wrap


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"max_num_seqs": 1, "max_model_len": 96}, "1 sequence of 96 tokens, prefill chunk 16, "),
        ({"max_num_seqs": 2, "max_model_len": 1}, "2 sequences of 1 token, prefill chunk 16, "),
    ],
)
def test_one_is_one_and_two_are_two(sizes: dict[str, Any], shown: str) -> None:
    said: list[str] = []
    tiny_llm(report=said.append, **sizes)
    assert said[1].startswith(shown)
