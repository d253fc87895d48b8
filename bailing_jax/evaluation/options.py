"""The evaluate command's flags, and the combinations that make no sense. No jax, no numpy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType

from bailing_jax.cli import flags
from bailing_jax.errors import EXIT_USAGE, UserError, bad_value

TASKS = ("word-problems", "recall", "gsm8k", "perplexity")
PROMPTS = ("8shot", "chat")
DEFAULT_CONCURRENCY = 16
# Room for the thinking of a model that thinks; short answers end by themselves.
MAX_TOKENS: Mapping[str, int] = MappingProxyType(
    {"word-problems": 512, "recall": 64, "gsm8k": 1024}
)
MAX_SEED = 2**32 - 1

_ANSWERING = ("word-problems", "recall", "gsm8k")
_USED_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "data": ("gsm8k", "perplexity"),
        "max_tokens": _ANSWERING,
        "concurrency": _ANSWERING,
        "chat_template_args": _ANSWERING,
        "distance": ("recall",),
        "prompt": ("gsm8k",),
        "shots": ("gsm8k",),
        "window": ("perplexity",),
        "decay_layer_offset": ("perplexity",),
    }
)


def parser() -> argparse.ArgumentParser:
    """The command line. A flag of one task is None where it is not given."""
    p = argparse.ArgumentParser(
        prog="python -m bailing_jax.evaluate",
        usage=f"%(prog)s {{{','.join(TASKS)}}} [options]",
        description="Measure how well a Ling or Ring model answers, or predicts a text.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    p.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    flags.add_model_flags(p)
    problems = p.add_argument_group("problems")
    problems.add_argument(
        "--data", action="append", metavar="FILE",
        help="gsm8k: its JSON lines; perplexity: text or JSON lines (repeatable)",
    )  # fmt: skip
    problems.add_argument("--num", type=int, metavar="N", help="most problems, or windows")
    problems.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the problems and random weights"
    )
    problems.add_argument(
        "--distance", type=int, metavar="N", help="recall: tokens back to the code word"
    )
    problems.add_argument("--prompt", metavar="|".join(PROMPTS), help="gsm8k (default: chat)")
    problems.add_argument("--shots", metavar="FILE", help="gsm8k: the 8 shots are its first lines")
    problems.add_argument(
        "-n", "--max-tokens", type=int, metavar="N",
        help="most tokens of an answer (default: "
        + ", ".join(f"{name} {most}" for name, most in MAX_TOKENS.items()) + ")",
    )  # fmt: skip
    problems.add_argument("--chat-template-args", metavar="JSON", help="variables of the template")
    likelihood = p.add_argument_group("perplexity")
    likelihood.add_argument(
        "--window", type=int, metavar="N",
        help="most tokens (default: --max-model-len, at most 2048)",
    )  # fmt: skip
    likelihood.add_argument(
        "--decay-layer-offset", metavar="0,1", help="compare: which was the model trained with?"
    )
    engine = p.add_argument_group("engine")
    engine.add_argument(
        "--concurrency", type=int, metavar="C",
        help=f"problems at once (default: {DEFAULT_CONCURRENCY})",
    )  # fmt: skip
    flags.add_engine_flags(engine)
    output = p.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON line on stdout")
    output.add_argument("--output", metavar="FILE", help="a JSON line a problem or window; new")
    output.add_argument("--quiet", action="store_true", help="nothing but errors on stderr")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; `max_num_seqs` and `input` are what `flags.engine_options` reads."""
    args = parser().parse_args(argv)
    args.input = None
    if args.task == "perplexity":
        args.max_num_seqs = 1
    else:
        args.max_num_seqs = DEFAULT_CONCURRENCY if args.concurrency is None else args.concurrency
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse flags of another task, values out of range and what is missing.

    Raises:
        UserError: which, and what to do.
    """
    for name, tasks in _USED_BY.items():
        if getattr(args, name) is not None and args.task not in tasks:
            raise UserError(
                f"{_flag(name)} is of {' and '.join(tasks)}, not of {args.task}",
                "Leave it out.",
                EXIT_USAGE,
            )
    for name, low in (("num", 1), ("max_tokens", 1), ("concurrency", 1),
                      ("window", 2)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < low:
            raise bad_value(name, value, f"an integer >= {low}")
    if not 0 <= args.seed <= MAX_SEED:
        raise bad_value("seed", args.seed, f"an integer from 0 to {MAX_SEED}")
    if args.prompt is not None and args.prompt not in PROMPTS:
        raise bad_value("prompt", args.prompt, ", ".join(PROMPTS))
    flags.json_object("--chat-template-args", args.chat_template_args)
    overrides = flags.json_object("--hf-overrides", args.hf_overrides)
    offsets(args.decay_layer_offset)
    _check_combinations(args, overrides)


def names(args: argparse.Namespace) -> dict[str, str]:
    """What messages call each option: its flag."""
    named = {name: _flag(name) for name in vars(args)}
    named["max_num_seqs"] = "--concurrency"
    if args.task == "perplexity":  # scores one window at a time
        del named["max_num_seqs"]
    return named


def offsets(text: str | None) -> tuple[int, ...] | None:
    """The values of --decay-layer-offset, ascending; None: what the checkpoint's config says.

    Raises:
        UserError: it is not 0, 1 or both.
    """
    if text is None:
        return None
    words = sorted(word.strip() for word in text.split(","))
    if words not in (["0"], ["1"], ["0", "1"]):
        raise bad_value("decay_layer_offset", text, "0, 1 or 0,1")
    return tuple(map(int, words))


def _check_combinations(args: argparse.Namespace, overrides: Mapping[str, object]) -> None:
    files = args.data or []
    rules = (
        (args.task == "gsm8k" and not files, "gsm8k: --data is missing",
         "Give the public file, test.jsonl of openai/grade-school-math."),
        (args.task == "gsm8k" and len(files) > 1, "gsm8k: --data is given twice", "Give one file."),
        (args.shots is not None and args.prompt != "8shot", "--shots is of --prompt 8shot",
         "Give --prompt 8shot too, or leave it out."),
        (args.chat_template_args is not None and args.prompt == "8shot",
         "--chat-template-args goes through the chat template, which --prompt 8shot leaves out",
         "Leave out one of them."),
        (args.decay_layer_offset is not None and "decay_layer_offset" in overrides,
         "--decay-layer-offset and --hf-overrides both name decay_layer_offset",
         "Leave it out of --hf-overrides."),
        (args.download and args.model is None, "--download: --model is missing",
         "Give --model org/name."),
        (args.output == "-", "--output: stdout carries the result", "Give a file."),
    )  # fmt: skip
    for wrong, message, hint in rules:
        if wrong:
            raise UserError(message, hint, EXIT_USAGE)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
