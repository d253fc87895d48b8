"""Which decay? Two models trained alike but for the offset: each is named right.

Two layers, so that the two offsets are decays of one and of two slopes; nothing else tells the
models apart. Three hundred steps suffice for the likelihood to be best where it was trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluations import result

from bailing_jax import small_model
from bailing_jax.errors import EXIT_OK
from bailing_jax.train import main

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "layer_group_size": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "group_norm_size": 2,
    "head_dim": 24,
    "rotary_dim": 12,
    "intermediate_size": 96,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
}
STEPS = 300


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1])
def test_the_offset_of_training_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, offset: int
) -> None:
    overrides = json.dumps({**TINY, "decay_layer_offset": offset})
    args = (
        "--model", small_model.folder(), "--from-scratch", "--output", tmp_path,
        "--hf-overrides", overrides, "--data", "word-problems", "--steps", STEPS,
        "--rows", 1024, "--max-length", 512, "--prompt-loss", 1, "--learning-rate", 5e-3,
        "--warmup-steps", 20, "--workers", 0, "--quiet",
    )  # fmt: skip
    assert main([str(arg) for arg in args]) == EXIT_OK
    model = tmp_path / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["decay_layer_offset"] == offset  # the trainer's export keeps it
    # Said as 0 to both, so that only the weights can tell.
    (model / "config.json").write_text(json.dumps({**config, "decay_layer_offset": 0}))
    args = ("perplexity", "--model", model, "--max-model-len", 512, "--num", 64, "--quiet")
    found = result(capsys, *args, "--decay-layer-offset", "0,1")
    assert found["trained_offset"] == offset
    assert found["verdict"] == f"these weights were trained with decay_layer_offset {offset}"
    assert (found["warning"] is None) == (offset == 0)
    assert found["control"]["difference_ci95"][0] > 0
