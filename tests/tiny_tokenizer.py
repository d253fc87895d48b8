"""A tokenizer of the family's kind, small enough for tiny models: byte-level BPE, single digits.

`write_tiny_tokenizer(folder)` writes tokenizer.json, tokenizer_config.json (with a chat template
in the style of the second generation) and generation_config.json, as a checkpoint has them.
"""

from __future__ import annotations

import json
from pathlib import Path

# In the order of the released files: the control tokens come after all others.
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>")
ORDINARY_ADDED_TOKENS = ("<think>", "</think>")

# "Ġ" is the blank in byte-level spelling. Each merge uses only letters and earlier results.
_MERGES = (
    "h e|Ġ t|i n|e r|a n|Ġt he|o n|r e|Ġ a|e n|o u|in g|l l|Ġ s|he r|an d|Ġ w|i s|i t|o r|Ġa nd|"
    "e s|a t|Ġ c|Ġ i|o w|Ġi s|Ġ o|Ġo f|a r|Ġ p|Ġ b|Ġ m|l e|ou t|h o|ho w|s t|e d|Ġ f|Ġ d|i c|a l|"
    "Ġ h|Ġ n|he ll|hell o|Ġ ="
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + len(ORDINARY_ADDED_TOKENS)

V2_TEMPLATE = """\
{{- '<role>SYSTEM</role>' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{% endif %}
{%- if tools %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n' }}
{%- endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {%- set role = 'HUMAN' if message.role == 'user' else 'SYSTEM' %}
        {{- '<role>' + role + '</role>' + message.content + '<|role_end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<role>ASSISTANT</role>' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|role_end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}
            {{- '<role>OBSERVATION</role>' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|role_end|>' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<role>ASSISTANT</role>' }}{% endif %}
"""


def write_tiny_tokenizer(folder: Path, vocab_size: int = 320) -> dict[str, int]:
    """Write the three files into `folder` and return the ids of the added tokens.

    The tokenizer has at most `vocab_size` ids (at least MIN_VOCAB_SIZE); the rest of the model's
    rows are padding, as in the releases.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if not MIN_VOCAB_SIZE <= vocab_size <= 400:
        raise ValueError(f"vocab_size {vocab_size}: allowed {MIN_VOCAB_SIZE} to 400")
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for merge in _MERGES.split("|")[: vocab_size - MIN_VOCAB_SIZE]:
        left, _, right = merge.partition(" ")
        if left in vocab and right in vocab and left + right not in vocab:
            merges.append((left, right))
            vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ORDINARY_ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    _write_configs(folder, ids)
    return ids


def _write_configs(folder: Path, ids: dict[str, int]) -> None:
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|role_end|>",
        "pad_token": {"content": "<|endoftext|>", "special": True},
        "clean_up_tokenization_spaces": False,
        "chat_template": V2_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": [ids["<|endoftext|>"], ids["<|role_end|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    for name, config in (
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(config, indent=2), encoding="utf-8")
