"""The perplexity task: windows, their likelihoods, the figures, and which decay they speak for."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bailing_jax.cli import flags
from bailing_jax.engine_options import EngineOptions
from bailing_jax.errors import EXIT_USAGE, UserError, bad_value
from bailing_jax.evaluation import decay, likelihood
from bailing_jax.evaluation.answer_file import AnswerFile
from bailing_jax.evaluation.intervals import mean_a_token
from bailing_jax.evaluation.options import offsets
from bailing_jax.evaluation.texts import Texts
from bailing_jax.evaluation.windows import Window, windows_of, worked_problems
from bailing_jax.loading import LoadedModel, find_folder, load
from convert.source import read_json

MAX_WINDOW = 2048
# Worked problems: for a figure, and to tell two offsets apart, whose difference is small.
DEFAULT_PROBLEMS = 64
DEFAULT_COMPARED = 512
KEY = "decay_layer_offset"
MAX_NLL = 700  # the exponential of more is no float64; only broken weights come near

Say = Callable[[str], None]
Found = dict[str, Any]


def run(args: argparse.Namespace, texts: Sequence[Texts], keep: AnswerFile, say: Say) -> Found:
    """Measure; returns the fields of the JSON line.

    Args:
        args: checked arguments.
        texts: the files; none: worked problems.
        keep: gets a record for each window.
        say: prints a line on stderr.

    Raises:
        UserError: model, window or texts can't be used.
    """
    options = EngineOptions(**flags.engine_options(args))
    overrides = flags.json_object("--hf-overrides", args.hf_overrides)
    loaded = load(args.model, options, overrides, args.seed, say, download=args.download)
    wanted = offsets(args.decay_layer_offset)
    if wanted is not None:
        likelihood.check_offsets(loaded)
    made = _windows(args, loaded, texts)
    tokens = [window.num_scored for window in made]
    say(f"{len(made)} windows, {sum(tokens)} tokens to predict")
    in_force = loaded.config.decay_layer_offset
    start = time.perf_counter()
    nll = _scored(loaded, wanted or (in_force,), made, keep, say)
    seconds = time.perf_counter() - start
    figures = {str(o): _figures(nll[o], tokens) for o in wanted or (in_force,)}
    main = figures.get(str(in_force)) or next(iter(figures.values()))
    found: Found = {
        "num": len(made),
        "correct": None,
        "accuracy": None,
        "ci95": main["ci95"],
        **{name: main[name] for name in ("perplexity", "nll")},
        "tokens": sum(tokens),
        "window": max(len(window.ids) for window in made),
        "data": [text.name for text in texts] or None,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(tokens) * len(nll) / seconds, 2),
        "offsets": figures,
        "dtype": loaded.runtime.dtype,
        "max_model_len": loaded.limits.max_model_len,
    }
    if wanted is not None:
        stated = _stated(args.model, loaded)
        found["config_offset"] = stated
        if len(wanted) == 2:
            verdict = decay.judge(nll, tokens)
            found |= decay.as_json(verdict)
            found["warning"] = decay.disagreement(verdict, stated)
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """The figures to be read."""
    lines = [
        f"perplexity: {found['num']} windows of up to {found['window']} tokens, "
        f"{found['tokens']} predicted"
    ]
    lines.append(f"{'offset':<8}{'perplexity':>12}{'nats a token':>14}  95 % interval")
    for offset, figures in found["offsets"].items():
        value = figures["perplexity"]
        perplexity = "over 1e300" if value is None else f"{value:.4f}"
        lines.append(
            f"{offset:<8}{perplexity:>12}{figures['nll']:>14.5f}  " + _shown(figures["ci95"])
        )
    if "config_offset" in found:
        stated = found["config_offset"]
        lines.append(f"config.json states offset {'none' if stated is None else stated}")
    if "verdict" in found:
        lines.append(_difference("1 minus offset 0", found))
        if found["control"]:
            leader = 0 if found["difference"] > 0 else 1
            beyond = found["control"]["offset"]
            lines.append(_difference(f"{beyond} minus offset {leader}", found["control"]))
        lines.append(found["verdict"])
        if found["warning"]:
            lines.append(f"warning: {found['warning']}")
    lines.append(f"{found['seconds']:.1f} s: {found['tokens_per_s']:.1f} tokens/s")
    return "\n".join(lines)


def _windows(args: argparse.Namespace, loaded: LoadedModel, texts: Sequence[Texts]) -> list[Window]:
    tokenizer, template = loaded.tokenizer, loaded.chat_template
    if tokenizer is None:
        raise UserError(
            f"{loaded.name}: has no tokenizer.json, so it can't read a text",
            "Use a complete release folder.",
            EXIT_USAGE,
        )
    limit = loaded.limits.max_model_len
    length = min(MAX_WINDOW, limit) if args.window is None else args.window
    if length > limit:
        allowed = f"2 to {limit} (max_model_len)"
        raise bad_value("window", length, allowed, options=("max_model_len",))
    if not texts:
        compares = offsets(args.decay_layer_offset) == (0, 1)
        num = DEFAULT_COMPARED if compares else DEFAULT_PROBLEMS
        texts = [worked_problems(args.seed, num if args.num is None else args.num)]
    made: list[Window] = []
    for text in texts:
        made += windows_of(text, tokenizer, template, length)
    return made[: args.num]


def _scored(
    loaded: LoadedModel,
    wanted: Sequence[int],
    made: Sequence[Window],
    keep: AnswerFile,
    say: Say,
) -> dict[int, list[float]]:
    """The likelihoods of each window by offset; of the control too, where a verdict needs it."""
    tokens = [window.num_scored for window in made]
    with keep.whole_run(f"{len(made)} windows", say):
        scorers = {offset: likelihood.scorer(loaded, offset) for offset in wanted}
        nll = likelihood.nll(
            scorers, made, lambda i, sums: keep.write(_record(i, made[i], sums)), say
        )
        if len(wanted) == 2 and (beyond := decay.control_offset(nll, tokens)) is not None:
            say(f"scoring offset {beyond} too, as a control")
            control = {beyond: likelihood.scorer(loaded, beyond)}
            nll |= likelihood.nll(control, made, lambda _i, _sums: None, say)
    return nll


def _figures(sums: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    mean = mean_a_token(sums, tokens)
    return {
        "perplexity": math.exp(mean.mean) if mean.mean < MAX_NLL else None,
        "nll": mean.mean,
        "ci95": decay.interval(mean),
    }


def _record(index: int, window: Window, nll: Mapping[int, float]) -> dict[str, Any]:
    return {
        "index": index,
        "source": window.source,
        "tokens": list(window.ids),
        "nll": {str(offset): value for offset, value in nll.items()},
    }


def _stated(model: str | None, loaded: LoadedModel) -> int | None:
    """What the checkpoint's config.json says about the offset; None: nothing."""
    folder = find_folder(model, download=False)
    if not folder.exists():  # a preset's
        return None
    says = KEY in read_json(folder / "config.json", "config")
    return loaded.config.decay_layer_offset if says else None


def _difference(which: str, found: Mapping[str, Any]) -> str:
    return f"offset {which}: {found['difference']:+.6f} nats a token, 95 % interval " + _shown(
        found["difference_ci95"], "+.6f"
    )


def _shown(interval: Sequence[float] | None, form: str = ".5f") -> str:
    if interval is None:
        return "none (one window)"
    return f"{interval[0]:{form}} to {interval[1]:{form}}"
