"""The generate command's flags, and the combinations that make no sense."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from bailing_jax.errors import EXIT_USAGE, UserError

DEFAULT_JOB_SEQS = 8
# The fields of SamplingParams that have a flag; --sampling has room for all of them.
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
)
_HOSTS = ("coordinator_address", "num_processes", "process_id")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bailing_jax.generate",
        usage="%(prog)s [--model DIR|NAME] [-p TEXT | --chat | --input FILE] [options]",
        description="Generate text with a Ling or Ring model. Without model and prompt: a word "
        "problem for the small model that ships with this package.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    # argparse takes -1 for a value but -1e3 and -inf for flags, and then finds the value missing.
    p._negative_number_matcher = re.compile(r"-\.?\d|-inf$")
    add_model_flags(p)
    prompt = p.add_argument_group("prompt")
    one = prompt.add_mutually_exclusive_group()
    one.add_argument("-p", "--prompt", metavar="TEXT", help="text; - reads it from stdin")
    one.add_argument("-f", "--prompt-file", metavar="FILE", help="text; - reads it from stdin")
    one.add_argument("--prompt-ids", metavar="IDS", help="token ids: 1,2,3")
    one.add_argument("--chat", action="store_true", help="talk; /help lists what can be typed")
    one.add_argument("--input", metavar="FILE", help="a job: requests, one JSON object a line")
    prompt.add_argument(
        "--output", metavar="FILE", help="of a job: answers; what is in it is not done again"
    )
    prompt.add_argument("--raw", action="store_true", help="do not apply the chat template")
    prompt.add_argument("--system", metavar="TEXT", help="system message for the chat template")
    prompt.add_argument("--chat-template-args", metavar="JSON", help="variables of the template")
    sampling = p.add_argument_group("sampling (default: the model's generation_config.json)")
    sampling.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N")
    sampling.add_argument("--temperature", "--temp", type=number, metavar="X", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--top-p", type=number, metavar="X")
    sampling.add_argument("--min-p", type=number, metavar="X")
    sampling.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of sampling and random weights"
    )
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text (repeatable)"
    )
    sampling.add_argument("--sampling", metavar="JSON", help="any other SamplingParams field")
    engine = p.add_argument_group("engine")
    engine.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="sequences at once (default: 1; a job: 8)"
    )
    add_engine_flags(engine)
    hosts = p.add_argument_group(
        "a job on several hosts (Cloud TPU, Slurm and Kubernetes JobSet need none of these)"
    )
    hosts.add_argument(
        "--coordinator-address", metavar="HOST:PORT", help="of process 0, the same for all"
    )
    hosts.add_argument("--num-processes", type=int, metavar="N", help="1: this one alone")
    hosts.add_argument("--process-id", type=int, metavar="I", help="of this process, from 0")
    output = p.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    output.add_argument("--quiet", action="store_true", help="nothing but errors on stderr")
    output.add_argument("--hide-thinking", action="store_true", help="show the answer only")
    output.add_argument("--dry-run", action="store_true", help="what it would need; no weights")
    output.add_argument("--warmup", action="store_true", help="compile everything before starting")
    output.add_argument("--profile", metavar="DIR", help="write a profile for xprof")
    output.add_argument("--env", action="store_true", help="say what this machine has, and end")
    return p


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say which model is loaded, and how; those of every command."""
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR|NAME",
        help="checkpoint folder, org/name in the Hugging Face cache, or a preset (random weights); "
        "default: the small model that ships with this package",
    )
    model.add_argument("--download", action="store_true", help="fetch org/name if it is not here")
    model.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU)")
    model.add_argument("--state-dtype", default="float32", help="float32 or bfloat16")
    model.add_argument("--rope-dtype", help="float32 or bfloat16 (default: as --dtype)")
    model.add_argument(
        "--hf-overrides", metavar="JSON", help="config.json keys to replace, decay_layer_offset"
    )


def add_engine_flags(engine: argparse._ArgumentGroup) -> None:
    """The engine's flags but for how many sequences run at once; those of every command."""
    engine.add_argument(
        "--max-model-len", type=int, metavar="N", help="most tokens, prompt and answer"
    )
    engine.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="tokens a step")
    engine.add_argument(
        "--memory-fraction", type=number, default=0.9, metavar="X", help="share of memory to use"
    )
    engine.add_argument(
        "--mesh",
        metavar="AXES",
        help="data=D,expert=E,tensor=T devices, or auto (default: one; of several processes auto)",
    )
    engine.add_argument("--kernels", default="auto", metavar="NAME", help="auto, xla or reference")
    engine.add_argument("--batch-invariant", action="store_true", help="exact mode")
    engine.add_argument(
        "--compile-cache", metavar="DIR|off", help="compiled programs (default: the user's cache)"
    )


def number(text: str) -> int | float:
    """A number, whole ones as such, so that messages show them as they were typed."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or lack what they need.

    Raises:
        UserError: which, and what to do.
    """
    rules = (
        (args.output and not args.input, "--output is of a job", "Give --input FILE too."),
        (args.input and not args.output, "--input needs --output", "Give a file, or - for stdout."),
        (args.input and args.json, "--json is for one prompt", "A job writes JSON lines anyway."),
        (
            not args.input
            and (args.coordinator_address, args.num_processes, args.process_id) != (None,) * 3,
            "--coordinator-address, --num-processes and --process-id are of a job",
            "Give --input FILE and --output FILE too.",
        ),
        (args.chat and args.json, "--json is for one prompt", "Leave out --chat or --json."),
        (args.chat and args.raw, "--chat needs the chat template", "Leave out --chat or --raw."),
        (
            args.download and args.model is None,
            "--download: --model is missing",
            "Give --model org/name.",
        ),
    )
    for wrong, message, hint in rules:
        if wrong:
            raise UserError(message, hint, EXIT_USAGE)
    for flag, value in (
        ("--system", args.system),
        ("--chat-template-args", args.chat_template_args),
    ):
        if value is not None and (args.raw or args.prompt_ids is not None):
            raise UserError(
                f"{flag} goes through the chat template, which --raw and --prompt-ids leave out",
                "Leave out one of them.",
                EXIT_USAGE,
            )
    prompts = (args.prompt, args.prompt_file, args.prompt_ids, args.input)
    is_given = args.chat or args.dry_run or any(prompt is not None for prompt in prompts)
    if args.model is not None and not is_given:
        raise UserError(
            "no prompt", "Give -p TEXT, --prompt-file FILE, --chat or --input FILE.", EXIT_USAGE
        )


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """The JSON object a flag holds; empty when the flag is not given.

    Raises:
        UserError: it is not JSON, or no object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: not JSON: {error}", exit_code=EXIT_USAGE) from error
    if not isinstance(value, dict):
        raise UserError(f"{flag}: want a JSON object, got {text:.60}", exit_code=EXIT_USAGE)
    return value


def sampling_fields(args: argparse.Namespace) -> dict[str, object]:
    """The fields of SamplingParams the flags set; those of --sampling win."""
    flags = {name: getattr(args, name) for name in _SAMPLING}
    return {**flags, **json_object("--sampling", args.sampling)}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `EngineOptions`, as `LLM` takes them."""
    default = DEFAULT_JOB_SEQS if args.input else 1
    return {
        "dtype": args.dtype,
        "state_dtype": args.state_dtype,
        "rope_dtype": args.rope_dtype,
        "max_num_seqs": default if args.max_num_seqs is None else args.max_num_seqs,
        "max_model_len": args.max_model_len,
        "prefill_chunk": args.prefill_chunk,
        "memory_fraction": args.memory_fraction,
        "mesh": args.mesh,
        "kernels": args.kernels,
        "batch_invariant": args.batch_invariant,
    }


def names(args: argparse.Namespace) -> dict[str, str]:
    """What messages call each option: its flag, or where in --sampling it stands or belongs."""
    from bailing_jax.cli.job_input import SAMPLING

    with_flag = {*engine_options(args), "hf_overrides", "chat_template_args", *_SAMPLING, *_HOSTS}
    try:
        rare = {*json_object("--sampling", args.sampling)}
    except UserError:  # said when it is used
        rare = set()
    rare |= set(SAMPLING) - with_flag
    return {
        name: f"{name} (in --sampling)" if name in rare else "--" + name.replace("_", "-")
        for name in with_flag | set(SAMPLING)
    }
