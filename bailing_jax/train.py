"""python -m bailing_jax.train: train a model from scratch or from a checkpoint.

The run's folder holds checkpoints, a JSONL log, the loss curve and, at the end, the model as a
checkpoint folder. The same command goes on where an interrupted run stopped. jax is imported only
once the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bailing_jax.errors import EXIT_OK, EXIT_USAGE, UserError, bad_value, run_command

if TYPE_CHECKING:
    from bailing_jax.training.options import DataShare, TrainOptions
    from bailing_jax.training.run import Origin


def main(argv: list[str] | None = None) -> int:
    """Parse and train; returns the exit code."""
    args = parser().parse_args(argv)
    flags = {name: "--" + name.replace("_", "-") for name in vars(args)}
    return run_command(lambda: _run(args), flags)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bailing_jax.train",
        usage="%(prog)s --model DIR --output DIR --data NAME[=SHARE] --steps N [options]",
        description="Train a Ling or Ring model on one device.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    run = p.add_argument_group("run")
    run.add_argument(
        "--model", metavar="DIR", required=True,
        help="config.json, tokenizer and chat template; training starts from its weights, if any",
    )  # fmt: skip
    run.add_argument("--output", metavar="DIR", required=True, help="the run; goes on if begun")
    run.add_argument(
        "--data", metavar="NAME[=SHARE]", required=True, action="append",
        help="word-problems, problem-runs, recall, or a JSONL file (repeatable)",
    )  # fmt: skip
    run.add_argument("--from-scratch", action="store_true", help="random weights in any case")
    run.add_argument(
        "--hf-overrides", metavar="JSON", help="config.json keys to replace, decay_layer_offset"
    )
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data")
    size = p.add_argument_group("size of a step")
    size.add_argument("--steps", type=int, required=True, metavar="N")
    size.add_argument("--rows", type=int, metavar="N", help="tokens a step (default: 16384)")
    size.add_argument("--accumulate", type=int, metavar="N", help="parts a step (default: 1)")
    size.add_argument("--max-length", type=int, metavar="N", help="of a sample (default: 2048)")
    size.add_argument("--dtype", help="of the computation: float32 (default) or bfloat16")
    size.add_argument("--remat", action="store_true", help="less memory, a third more time")
    optimizer = p.add_argument_group("optimizer")
    for flag, kind, text in (
        ("--learning-rate", float, "after the warm-up (default: 2e-3)"),
        ("--final-learning-rate", float, "at the end, as a fraction (default: 0.02)"),
        ("--warmup-steps", int, "(default: 200, at most --steps)"),
        ("--weight-decay", float, "of matrices (default: 0.1)"),
        ("--beta2", float, "of Adam's second moment (default: 0.95)"),
        ("--clip-norm", float, "largest gradient norm (default: 1)"),
        ("--prompt-loss", float, "weight of a prompt token (default: 0.01)"),
        ("--bias-rate", float, "of the routers' load balancing (default: 1e-3)"),
        ("--balance-loss", float, "weight of the balance loss (default: 0)"),
    ):
        optimizer.add_argument(flag, type=kind, metavar="X" if kind is float else "N", help=text)
    pace = p.add_argument_group("pace")
    pace.add_argument("--checkpoint-every", type=int, default=1000, metavar="N", help="steps")
    pace.add_argument("--log-every", type=int, default=10, metavar="N", help="steps")
    pace.add_argument("--minutes", type=float, default=0, metavar="X", help="stop after so long")
    pace.add_argument(
        "--workers", type=int, metavar="N", help="processes for data (default: CPUs less 2)"
    )
    pace.add_argument("--quiet", action="store_true", help="nothing but errors on stderr")
    return p


def _run(args: argparse.Namespace) -> int:
    options = _options(args)
    for name in ("checkpoint_every", "log_every"):
        if getattr(args, name) < 1:
            raise bad_value(name, getattr(args, name), "1 or more")
    if args.minutes < 0:
        raise bad_value("minutes", args.minutes, "0 (no limit) or more")
    workers = max(0, (os.cpu_count() or 1) - 2) if args.workers is None else args.workers
    if not 0 <= workers <= 256:
        raise bad_value("workers", workers, "0 to 256")
    origin = _origin(args)
    from bailing_jax.training.run import Pace, train

    pace = Pace(args.checkpoint_every, args.log_every, args.minutes, workers)
    say = (lambda _line: None) if args.quiet else _say
    train(origin, options, pace, Path(args.output), say)
    return EXIT_OK


def _options(args: argparse.Namespace) -> TrainOptions:
    import dataclasses

    from bailing_jax.training.options import TrainOptions

    fields = {field.name for field in dataclasses.fields(TrainOptions)} - {"data"}
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.warmup_steps is None:
        given["warmup_steps"] = max(0, min(TrainOptions.warmup_steps, args.steps))
    return TrainOptions(data=tuple(_share(text) for text in args.data), **given)


def _share(text: str) -> DataShare:
    from bailing_jax.training.options import DataShare

    name, equals, share = text.rpartition("=")
    if not equals:
        name, share = text, "1"
    try:
        return DataShare(name, float(share))
    except ValueError as error:
        raise bad_value("data", text, "NAME or NAME=SHARE with a number") from error


def _origin(args: argparse.Namespace) -> Origin:
    import json

    from bailing_jax.cli.flags import json_object
    from bailing_jax.config import ModelConfig

    folder = Path(args.model)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no config.json",
            "Give a folder with config.json, tokenizer.json and a chat template.",
            EXIT_USAGE,
        )
    overrides = json_object("--hf-overrides", args.hf_overrides)
    config = ModelConfig.from_hf(path, overrides)
    hf_config = {**json.loads(path.read_text(encoding="utf-8")), **overrides}
    from bailing_jax.training.run import Origin

    weights = None
    if not args.from_scratch and any(folder.glob("*.safetensors")):
        from bailing_jax.training.start import read_weights

        weights = read_weights(folder, config)
    return Origin(folder, hf_config, config, weights)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
