"""SamplingParams: how one request picks its tokens and when it stops. No jax."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from bailing_jax.errors import EXIT_USAGE, UserError, bad_value

MAX_LOGPROBS = 20
MAX_COMPLETIONS = 64
# Beyond, a penalty or a bias would turn float32 logits into infinities.
_SMALL, _LARGE = 1e-30, 1e30
_MAX_DIGITS = 20  # of a token id as JSON has it; Python reads no thousands of them


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. None means the model's generation_config, else greedy.

    Attributes:
        max_tokens: the most tokens to generate.
        temperature: 0 is greedy.
        top_k: keep the k best tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of best tokens with this probability.
        min_p: keep tokens at least this fraction as probable as the best.
        repetition_penalty: divides positive and multiplies negative logits of tokens that have
            occurred in prompt or answer.
        presence_penalty: taken off the logits of tokens that have occurred in the answer, -2 to 2.
        frequency_penalty: the same, times how often they have occurred there.
        logit_bias: added to the logits of these token ids.
        seed: of this request's random numbers, which depend on seed and position only; None
            draws one.
        stop: strings that end the answer and are not part of it.
        stop_token_ids: ids that end the answer.
        ignore_eos: do not end at the model's own end ids.
        logprobs: also give the log probabilities of that many best tokens at each position
            (and of the chosen one); at most 20.
        n: answers to one prompt; the i-th uses seed + i.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1)
        _integer("n", self.n, 1, MAX_COMPLETIONS)
        for name, low, high in (
            ("top_k", -1, 2**31 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("seed", 0, 2**64 - 1),
        ):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low, high)
        _number("temperature", self.temperature, 0, math.inf)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, _SMALL, _LARGE)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        if not isinstance(self.ignore_eos, bool):
            raise bad_value("ignore_eos", self.ignore_eos, "true, false")
        self._check_collections()

    def _check_collections(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping) or None in bias.values():
            raise bad_value("logit_bias", bias, "a number for each token id")
        for key, value in bias.items():
            _integer("logit_bias", key, 0)
            _number("logit_bias", value, -_LARGE, _LARGE)
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, Sequence):
            raise bad_value("stop_token_ids", ids, "a list of token ids")
        for token in ids:
            _integer("stop_token_ids", token, 0)
        if not isinstance(self.stop, str | Sequence | None) or not all(
            isinstance(string, str) for string in self.stop_strings
        ):
            raise bad_value("stop", self.stop, "a string, or a list of strings")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


NEUTRAL: Mapping[str, float] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def resolve(
    params: SamplingParams, generation_config: Mapping[str, object], where: str
) -> SamplingParams:
    """Fill every None from the model's generation_config, else with the neutral value.

    `do_sample: false` in the file means greedy, whatever temperature stands beside it.

    Raises:
        UserError: a value of the file is out of range; names `where`.
    """
    named = {name: generation_config.get(name) for name in NEUTRAL}
    defaults = {**NEUTRAL, **{name: v for name, v in named.items() if v is not None}}
    # A file that samples without naming a temperature means 1.
    if generation_config.get("do_sample") and named["temperature"] is None:
        defaults["temperature"] = 1.0
    if generation_config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    missing = {name: defaults[name] for name in NEUTRAL if getattr(params, name) is None}
    try:
        return replace(params, **missing)  # pyright: ignore[reportArgumentType]
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint, EXIT_USAGE) from error


def from_mapping(values: Mapping[str, object], where: str) -> SamplingParams:
    """SamplingParams from JSON names.

    Raises:
        UserError: an unknown name or a bad value.
    """
    known = {field.name for field in fields(SamplingParams)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(
            f"{where}: unknown sampling field {', '.join(unknown)}",
            f"Known: {', '.join(sorted(known))}",
            EXIT_USAGE,
        )
    bias = values.get("logit_bias")
    if isinstance(bias, Mapping):
        # JSON has string keys only.
        keys = [str(key) for key in bias]
        if not all(key.isdecimal() and len(key) <= _MAX_DIGITS for key in keys):
            raise bad_value("logit_bias", bias, "token ids as keys")
        ids = dict(zip(map(int, keys), bias.values(), strict=True))
        if len(ids) != len(keys):
            raise bad_value("logit_bias", bias, "each token id once")
        values = {**values, "logit_bias": ids}
    return SamplingParams(**values)  # pyright: ignore[reportArgumentType]


def _integer(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_value(name, value, f"an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if value is None:
        return
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            number = float(value)
    inside = math.isfinite(number) and low <= number <= high
    if not inside or (open_low and number == low):
        most = "" if math.isinf(high) else f" and <= {high}"
        raise bad_value(name, value, f"a number {'>' if open_low else '>='} {low}{most}")
