"""Writes what the shipped small model starts from: config, tokenizer, template, no weights.

    python scripts/make_small_model.py FOLDER

The tokenizer is trained on texts of the tasks' training split (bailing_jax/tasks). docs/
small_model.md has the whole way from here to the shipped weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bailing_jax.config import ModelConfig
from bailing_jax.params import describe
from bailing_jax.tasks.vocabulary import corpus

VOCAB_SIZE = 1536
NUM_TEXTS = 20_000
# Control tokens come after all others, in the order of the released files.
CONTROL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>")
ORDINARY_ADDED_TOKENS = ("<think>", "</think>")

TEMPLATE = """\
{%- for message in messages %}
    {%- set role = {'user': 'HUMAN', 'assistant': 'ASSISTANT'}.get(message.role) %}
    {%- if not role %}
        {{- raise_exception('this model was trained on user and assistant turns only') }}
    {%- endif %}
    {{- '<role>' + role + '</role>' + message.content + '<|role_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<role>ASSISTANT</role>' }}{% endif %}
"""

# Every irregularity of the architecture that fits: a dense first layer, an incomplete last group
# (so two softmax layers end the model), three norm groups over six heads, rotated halves, low-rank
# queries, key and value widths that differ, router groups.
CONFIG = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 7,
    "layer_group_size": 3,
    "max_position_embeddings": 4096,
    "rope_theta": 600000.0,
    "rope_scaling": None,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 32,
    "linear_silu": False,
    "group_norm_size": 3,
    "decay_layer_offset": 0,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 48,
    "v_head_dim": 48,
    "rope_interleave": True,
    "intermediate_size": 640,
    "first_k_dense_replace": 1,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 48,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 128,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "num_nextn_predict_layers": 0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(CONTROL_TOKENS) + len(ORDINARY_ADDED_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The template's words come as often as every text does.
    texts = (f"HUMAN\n{text}\nASSISTANT" for text in corpus(seed=0, num=NUM_TEXTS))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ORDINARY_ADDED_TOKENS])
    return tokenizer


def write(folder: Path) -> None:
    """Write the five files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    end, turn = ids["<|endoftext|>"], ids["<|role_end|>"]
    config = {**CONFIG, "eos_token_id": turn, "pad_token_id": end}
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|role_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": [end, turn],
        "pad_token_id": end,
        "do_sample": False,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    parameters = sum(param.size for param in describe(ModelConfig.from_hf(config)))
    print(f"{folder}: {parameters:,} parameters, {2 * parameters / 2**20:.2f} MiB in bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
