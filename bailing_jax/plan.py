"""python -m bailing_jax.plan: what a model would need of a slice or host, and how fast it could be.

Needs no weights and no accelerator. stdout carries the plan, one JSON object with --json; with
--compile the steps are compiled for the topology by libtpu. Exit code 3: it does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_OK, run_command
from bailing_jax.terminal import tell


def main(argv: list[str] | None = None) -> int:
    """Parse and plan; returns the exit code."""
    args = parser().parse_args(argv)
    flags = {name: "--" + name.replace("_", "-") for name in vars(args)}
    return run_command(lambda: _run(args), flags)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bailing_jax.plan",
        usage="%(prog)s --model DIR|NAME --topology CHIP:SHAPE [options]",
        description="What a Ling or Ring model would need of a TPU slice or GPU host: bytes, "
        "whether it fits, the best meshes, and bounds (not measurements) of its speed.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    p.add_argument(
        "--model", metavar="DIR|NAME", required=True,
        help="a folder with config.json, or a preset; weights are not read",
    )  # fmt: skip
    p.add_argument(
        "--topology", metavar="CHIP:SHAPE", required=True,
        help="chips: v5e:2x2, v6e:8x8, v5p:2x2x1, v7x:2x2x4 (tpu7x), h100:8, h200:8",
    )  # fmt: skip
    p.add_argument(
        "--mesh", default="auto", metavar="AXES",
        help="data=1,expert=8,tensor=8 of devices; auto (default): the best",
    )  # fmt: skip
    p.add_argument("--hf-overrides", metavar="JSON", help="config.json keys to replace")
    load = p.add_argument_group("load")
    load.add_argument("--max-num-seqs", type=int, default=32, metavar="N", help="(default: 32)")
    load.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens (default: the model's, at most 8192)"
    )
    load.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens a step and shard"
    )
    load.add_argument(
        "--prompt-tokens", type=int, metavar="N",
        help="of the prompt that is timed, and behind each decoding sequence (default: 1024)",
    )  # fmt: skip
    load.add_argument(
        "--weight-dtype", metavar="DTYPE", help="bfloat16, float32 or float8_e4m3fn (planning only)"
    )
    load.add_argument("--state-dtype", default="float32", help="float32 or bfloat16")
    load.add_argument(
        "--memory-fraction", type=float, default=0.9, metavar="X", help="share of memory to use"
    )
    output = p.add_argument_group("output")
    output.add_argument(
        "--compile", action="store_true", help="compile the steps for a TPU topology (extra: plan)"
    )
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return p


def _run(args: argparse.Namespace) -> int:
    from bailing_jax.cli.flags import json_object

    warnings.showwarning = lambda message, *_args, **_kwargs: tell(f"warning: {message}")
    overrides = json_object("--hf-overrides", args.hf_overrides)
    from bailing_jax.planning import model, ranking, report, topology, workload

    where = topology.parse(args.topology)
    planned = model.read(args.model, overrides)
    load = workload.workload(
        planned.config,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        prefill_chunk=args.prefill_chunk,
        prompt_tokens=args.prompt_tokens,
        weight_dtype=args.weight_dtype,
        state_dtype=args.state_dtype,
        memory_fraction=args.memory_fraction,
    )
    chosen, ranked = ranking.chosen(planned, where, args.mesh, load)
    steps = ()
    if args.compile:
        from bailing_jax.planning import compiled

        steps = compiled.steps(planned, where, chosen.mesh, load, tell)
    smallest = ranking.smallest_slice(planned, where, load)
    plan = report.Plan(planned, load, chosen, ranked, smallest, steps)
    print(json.dumps(report.as_object(plan)) if args.json else report.as_text(plan), flush=True)
    return EXIT_OK if chosen.fits else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
