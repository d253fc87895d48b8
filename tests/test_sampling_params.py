"""Laws of SamplingParams: every bad value is refused by name, and the model fills the gaps."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.sampling_params import SamplingParams, from_mapping, resolve

NAN, INF = math.nan, math.inf
BAD: list[tuple[str, Any, str]] = [
    *(("max_tokens", v, "an integer from 1") for v in (0, -1, 2**31, 1.0, True, "5", None)),
    *(("n", v, "an integer from 1 to 64") for v in (0, 65, 1.0, False, "1", None)),
    *(("temperature", v, "a number >= 0") for v in (-0.1, NAN, INF, "0.7", True, [1.0])),
    *(("top_k", v, "an integer from -1") for v in (-2, 2**31, 40.0, True, "40")),
    *(("top_p", v, "a number > 0 and <= 1") for v in (0, 0.0, -0.5, 1.001, NAN, "0.9", True)),
    *(("min_p", v, "a number >= 0 and <= 1") for v in (-0.001, 1.5, NAN, "0", False)),
    *(
        ("repetition_penalty", v, "a number >= 1e-30 and <= 1e+30")
        for v in (0, 0.0, -1.0, 1e31, 1e-31, INF, NAN, "1.1", True)
    ),
    *(
        (name, v, "a number >= -2 and <= 2")
        for name in ("presence_penalty", "frequency_penalty")
        for v in (-2.001, 2.001, 3, INF, NAN, "1", False)
    ),
    *(("seed", v, f"an integer from 0 to {2**64 - 1}") for v in (-1, 2**64, 1.0, True, "7")),
    *(("logprobs", v, "an integer from 0 to 20") for v in (-1, 21, 2.0, True, "2")),
    *(("ignore_eos", v, "true, false") for v in (0, 1, None, "false")),
    *(("logit_bias", v, "a number for each token id") for v in ([1, 2], "1", 3, {5: None})),
    *(("logit_bias", {5: v}, "a number >= -1e+30") for v in (NAN, INF, -1e31, "2", True)),
    *(("logit_bias", {v: 1.0}, "an integer from 0") for v in (-1, "5", 1.0, None, True)),
    *(("stop_token_ids", v, "a list of token ids") for v in (5, np.array([5, 6]), {5}, 1.5)),
    *(("stop_token_ids", [v], "an integer from 0") for v in (-1, None, "5", 1.0, True)),
    *(("stop", v, "a string, or a list of strings") for v in (5, [5], ["a", None], {"a"}, b"a")),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=repr)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})
    message = caught.value.message
    assert message.startswith(f"{name} = ")
    assert allowed in message.split("; allowed: ")[1]
    assert "\n" not in message
    assert caught.value.exit_code == EXIT_USAGE


def test_every_field_has_values_it_refuses() -> None:
    assert {name for name, _, _ in BAD} == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 1, "n": 1, "seed": 0, "logprobs": 0, "top_k": -1, "temperature": 0},
        {"max_tokens": 2**31 - 1, "n": 64, "seed": 2**64 - 1, "logprobs": 20},
        {"temperature": 1e300, "top_p": 1, "min_p": 1, "repetition_penalty": 1e30},
        {"top_p": 1e-300, "min_p": 0, "repetition_penalty": 1e-30, "top_k": 2**31 - 1},
        {"logit_bias": {0: -1e30, 2**31 - 1: 5}, "stop_token_ids": (3, 4), "stop": ("a", "b")},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"presence_penalty": 2, "frequency_penalty": -2.0},
        {"logit_bias": {}, "stop_token_ids": [], "stop": []},
        dict.fromkeys(("temperature", "top_k", "seed", "stop", "logit_bias")),
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_allowed(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values} == values


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


# What the model says.

NEUTRAL = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
FROM_MODEL = tuple(NEUTRAL)
FILE = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.05,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "eos_token_id": 3,
}


def resolved(config: dict[str, Any], **given: Any) -> tuple[Any, ...]:
    params = resolve(SamplingParams(**given), config, "m")
    return tuple(getattr(params, name) for name in FROM_MODEL)


def test_without_a_word_from_anyone_it_is_greedy() -> None:
    assert resolved({}) == tuple(NEUTRAL.values())
    assert resolved({"eos_token_id": [1, 2], "top_k": None}) == tuple(NEUTRAL.values())


def test_the_model_fills_what_is_not_given() -> None:
    assert resolved(FILE) == (0.7, 20, 0.95, 0.01, 1.05, 0.5, -0.25)


@pytest.mark.parametrize("name", FROM_MODEL)
def test_what_is_given_wins_over_the_model(name: str) -> None:
    want = {key: FILE[key] for key in FROM_MODEL} | {name: NEUTRAL[name]}
    assert resolved(FILE, **{name: NEUTRAL[name]}) == tuple(want.values())


def test_do_sample_false_is_greedy_whatever_temperature_stands_beside_it() -> None:
    assert resolved({**FILE, "do_sample": False}) == (0, 20, 0.95, 0.01, 1.05, 0.5, -0.25)
    assert resolved({**FILE, "do_sample": False}, temperature=0.3)[0] == 0.3


def test_do_sample_without_a_temperature_means_one() -> None:
    assert resolved({"do_sample": True})[0] == 1
    assert resolved({"do_sample": True, "temperature": None})[0] == 1
    assert resolved({"do_sample": True, "temperature": 0.2})[0] == 0.2
    assert resolved({"do_sample": None})[0] == 0


def test_nothing_else_is_touched() -> None:
    given = SamplingParams(max_tokens=9, seed=3, stop="x", stop_token_ids=[2], n=2, logprobs=1)
    params = resolve(given, {**FILE, "max_tokens": 77, "seed": 5, "n": 4}, "m")
    for field in fields(SamplingParams):
        if field.name not in FROM_MODEL:
            assert getattr(params, field.name) == getattr(given, field.name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "0.7"), ("top_p", 2.0), ("top_k", 1.5), ("min_p", True), ("temperature", -1)],
)
def test_a_bad_value_in_the_file_is_refused_naming_the_file(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^folder/generation_config\.json: {name} = ") as caught:
        resolve(SamplingParams(), {name: value}, "folder/generation_config.json")
    assert caught.value.exit_code == EXIT_USAGE
    # A user who says otherwise is not stopped by it.
    resolve(SamplingParams(**{name: 1}), {name: value}, "folder/generation_config.json")


# From JSON.


def test_json_names_make_the_same_params() -> None:
    values = {"max_tokens": 3, "temperature": 0.5, "stop": ["a"], "logit_bias": {"7": 2, "0": -1}}
    want = SamplingParams(max_tokens=3, temperature=0.5, stop=["a"], logit_bias={7: 2, 0: -1})
    assert from_mapping(values, "w") == want


@pytest.mark.parametrize("key", ["", "-1", "x", "1.5", "²", " 1"])
def test_a_json_bias_needs_token_ids_as_keys(key: str) -> None:
    with pytest.raises(UserError, match="allowed: token ids as keys"):
        from_mapping({"logit_bias": {key: 1.0}}, "w")


@pytest.mark.parametrize("values", [{"1": 1.0, "01": 2.0}, {"3": 1.0, "٣": 2.0}, {"7": 1, 7: 2}])
def test_a_token_is_biased_once(values: dict[Any, float]) -> None:
    with pytest.raises(UserError, match="allowed: each token id once"):
        from_mapping({"logit_bias": values}, "w")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 10**400) for name in ("temperature", "top_p", "repetition_penalty", "max_tokens")),
        *((name, 10**5000) for name in ("temperature", "seed", "n")),  # Python can't write these
        ("logit_bias", {"1" * 5000: 1.0}),
        ("logit_bias", {5: 10**400}),
        ("stop_token_ids", [10**5000]),
        ("top_k", "x" * 9000),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "huge",
)
def test_no_value_is_too_long_to_be_refused_in_a_line(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name} = ") as caught:
        from_mapping({name: value}, "w")
    assert len(caught.value.message) < 200


def test_unknown_json_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"w: unknown sampling field best_of, use_beam") as caught:
        from_mapping({"use_beam": True, "n": 1, "best_of": 2}, "w")
    assert "top_k" in caught.value.hint
    assert caught.value.exit_code == EXIT_USAGE
