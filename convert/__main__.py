"""python -m convert (bailing-convert): convert, inspect and verify checkpoints.

stdout carries the result (a few lines, or one JSON object); progress and remarks go to stderr.
Nothing but argparse is imported until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import sys
import warnings

from bailing_jax.errors import run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="bailing-convert",
        description="Hugging Face checkpoints of Ling and Ring to the native format and back.",
        epilog="A conversion that was interrupted goes on when the same command is run again.",
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = _command(commands, "hf-to-native", "convert a released checkpoint to the native format")
    c.add_argument("source", metavar="SRC", help="folder with config.json and safetensors files")
    c.add_argument("output", metavar="DST", help="folder to be made")
    c.add_argument(
        "--dtype", default="keep", help="of the weights: keep (default), bfloat16 or float32"
    )
    c.add_argument(
        "--decay-layer-offset",
        type=int,
        metavar="N",
        help="0 (vLLM, SGLang) or 1 (the Hugging Face file); written to config.json",
    )
    c.add_argument("--format", default="native", help="native (default), or orbax for Orbax users")
    _add_writing(c)

    c = _command(commands, "native-to-hf", "restore the Hugging Face checkpoint")
    c.add_argument("source", metavar="SRC", help="native folder")
    c.add_argument("output", metavar="DST", help="folder to be made")
    _add_writing(c)

    c = _command(commands, "inspect", "say what a checkpoint is, without loading it")
    c.add_argument("source", metavar="DIR", help="native or Hugging Face folder")
    _add_json(c)

    c = _command(commands, "verify", "read everything and say whether it is sound")
    c.add_argument("source", metavar="DIR", help="native or Hugging Face folder")
    c.add_argument(
        "original", metavar="SRC", nargs="?", help="what it was converted from (for --full)"
    )
    depth = c.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick", action="store_true", help="shapes, dtypes, hashes, values (default)"
    )
    depth.add_argument(
        "--full", action="store_true", help="and compare with the source bit for bit"
    )
    _add_workers(c)
    return p


def _command(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def _add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_workers(p: argparse.ArgumentParser) -> None:
    p.add_argument("--workers", type=int, metavar="N", help="threads (default: cores, at most 8)")
    _add_json(p)
    p.add_argument("--quiet", action="store_true", help="nothing but errors on stderr")


def _add_writing(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    _add_workers(p)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from convert import commands

    quiet = getattr(args, "quiet", False)

    def warn(message: Warning | str, *_args: object, **_kwargs: object) -> None:
        if not quiet:
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = warn
        return commands.run(args)


if __name__ == "__main__":
    sys.exit(main())
