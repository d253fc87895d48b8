"""Text in and out of token ids: the tokenizer and the chat template a checkpoint ships.

Everything here is host-side Python; it knows nothing of models, devices or arrays.
"""
