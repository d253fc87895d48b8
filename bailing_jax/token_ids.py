"""Token ids as users and checkpoints give them, checked before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np

from bailing_jax.errors import EXIT_USAGE, UserError


def checked_ids(
    token_ids: Sequence[int], vocab_size: int, what: str, *, empty: bool = False
) -> list[int]:
    """The ids as Python integers, all of them in the vocabulary.

    Args:
        token_ids: any integers that can be iterated over.
        vocab_size: the model's.
        what: what messages call them.
        empty: whether there may be none.

    Raises:
        UserError: something else, none, or an id the model has not.
    """
    try:
        if isinstance(token_ids, str | bytes):
            raise TypeError("text, where token ids are wanted")
        ids = [operator.index(i) for i in token_ids]
    except TypeError as error:
        raise UserError(
            f"{what} = {token_ids!r:.60}; allowed: a list of token ids, or for a prompt a text",
            exit_code=EXIT_USAGE,
        ) from error
    if not ids and not empty:
        raise UserError(f"{what}: empty", "Give at least one token.", EXIT_USAGE)
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise UserError(
            f"{what}: token id {wrong[0]}; allowed: 0 to {vocab_size - 1}",
            exit_code=EXIT_USAGE,
            options=(what,),
        )
    return ids


def is_one_prompt(prompts: object) -> TypeGuard[Sequence[int]]:
    """Whether this is one prompt of token ids rather than a list of prompts."""
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    return (
        isinstance(prompts, Sequence)
        and bool(prompts)
        and all(isinstance(i, int | np.integer) for i in prompts)
    )


def eos_ids(
    config_ids: tuple[int, ...], generation_config: Mapping[str, object]
) -> frozenset[int]:
    """Both files' end ids: releases name one in config.json and more in the other.

    Raises:
        UserError: generation_config.json has something else in their place.
    """
    value = generation_config.get("eos_token_id")
    extra = value if isinstance(value, list) else [] if value is None else [value]
    ids = [i for i in extra if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    if len(ids) != len(extra):
        raise UserError(
            f"generation_config.json: eos_token_id = {value!r}; allowed: token ids",
            exit_code=EXIT_USAGE,
        )
    return frozenset([*config_ids, *ids])
