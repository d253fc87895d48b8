"""Tiny random checkpoints with tokenizer and chat template, and engines that tests share.

Few layers, because compiling them is what takes time; of both attention kinds, one dense, one
after the last full group, with experts in groups and a vocabulary longer than the tokenizer's.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from random_checkpoints import INERT, LINEAR_V2, V2_5, random_tensors, write_checkpoint
from tiny_tokenizer import write_tiny_tokenizer

from bailing_jax import LLM, SamplingParams

VOCAB_SIZE = 323
# Ends an answer by config.json; the tokenizer's files name two more (tiny_tokenizer.py).
EOS_ID = 315
NUM_SEQS, MODEL_LEN, CHUNK = 3, 96, 16
SEED = 7

_COMMON: dict[str, Any] = {
    **INERT,
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": EOS_ID,
    "eos_token_id": EOS_ID,
    "max_position_embeddings": 512,
    "num_hidden_layers": 3,
    "layer_group_size": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 14,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 22,
    "routed_scaling_factor": 2.5,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "group_norm_size": 3,
    "linear_silu": False,
}
LINEAR: dict[str, Any] = {
    **_COMMON,
    "architectures": [LINEAR_V2],
    "model_type": "bailing_moe_linear",
}
LATENT: dict[str, Any] = {
    **_COMMON,
    "architectures": [V2_5],
    "model_type": "bailing_hybrid",
    "q_lora_rank": 26,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 18,
    "v_head_dim": 12,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "seq_aux": True,
}


def write_tiny_model(
    folder: Path, config: dict[str, Any] = LINEAR, *, tokenizer: bool = True
) -> Path:
    """Write a checkpoint into `folder` and return it; the tokenizer has ids 0 to 309."""
    write_checkpoint(folder, config, random_tensors(config, SEED))
    if tokenizer:
        write_tiny_tokenizer(folder)
    return folder


def tiny_llm(config: dict[str, Any] = LINEAR, *, tokenizer: bool = True, **options: Any) -> LLM:
    """An engine of one of these models; what is not given is small."""
    defaults = {
        "max_num_seqs": NUM_SEQS,
        "max_model_len": MODEL_LEN,
        "prefill_chunk": CHUNK,
        "report": lambda _line: None,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder), config, tokenizer=tokenizer)
        return LLM(folder, **{**defaults, **options})


@functools.cache
def linear_llm() -> LLM:
    """Lightning and grouped-query attention; one for all tests, for the sake of its programs."""
    return tiny_llm()


@functools.cache
def latent_llm() -> LLM:
    """Lightning and latent attention, without tokenizer."""
    return tiny_llm(LATENT, tokenizer=False)


def is_idle(llm: LLM) -> bool:
    """Nothing is left to do, and nobody holds a slot or a page."""
    scheduler = llm._engine._scheduler
    return (
        not llm._engine.has_work
        and scheduler.slots.num_free == scheduler.slots.capacity
        and scheduler.pages.num_free == scheduler.pages.capacity
    )


def greedy(max_tokens: int = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)
