"""python -m bailing_jax.generate: one prompt, a chat, or a job.

stdout carries generated text or JSON and nothing else; what is loaded, awaited and measured goes
to stderr. jax is imported only once the arguments are known to be good, so that --help and
mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bailing_jax import small_model
from bailing_jax.cli import flags, profile
from bailing_jax.errors import EXIT_OK, EXIT_USAGE, UserError, run_command
from bailing_jax.terminal import tell

if TYPE_CHECKING:
    from bailing_jax.cli.prompts import PromptMaker
    from bailing_jax.engine.limits import EngineLimits
    from bailing_jax.group import Group
    from bailing_jax.llm import LLM

Say = Callable[[str], None]


def main(argv: list[str] | None = None) -> int:
    """Parse, load, generate; returns the exit code."""
    args = flags.parser().parse_args(argv)
    return run_command(lambda: _run(args), flags.names(args))


def _run(args: argparse.Namespace) -> int:
    say: Say = (lambda _line: None) if args.quiet else tell
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    if sys.stdout is None and args.input is None:  # as after `>&-`
        raise UserError("stdout is closed", "Let it lead somewhere; answers go there.", EXIT_USAGE)
    if args.env:
        from bailing_jax.cli import environment

        return environment.run(compile_cache=args.compile_cache, as_json=args.json)
    flags.check(args)
    overrides = flags.json_object("--hf-overrides", args.hf_overrides)
    flags.json_object("--chat-template-args", args.chat_template_args)
    if args.model is None:
        small_model.folder()  # if it is missing, that is said at once
    if args.dry_run:
        return _dry_run(args, overrides)
    profile.check(args.profile)
    if args.input is not None:
        return _job(args, say)
    return _chat(args, say) if args.chat else _one_shot(args, say)


def _dry_run(args: argparse.Namespace, overrides: dict[str, object]) -> int:
    from bailing_jax.cli import dry_run, prompts
    from bailing_jax.loading import find_folder

    ids = prompts.parse_ids(args.prompt_ids)
    return dry_run.run(
        find_folder(args.model, download=False),
        flags.engine_options(args),
        overrides,
        prompt_tokens=None if ids is None else len(ids),
        as_json=args.json,
    )


def _one_shot(args: argparse.Namespace, say: Say) -> int:
    from bailing_jax.cli import one_shot, prompts
    from bailing_jax.sampling_params import from_mapping

    params = from_mapping(flags.sampling_fields(args), "--sampling")
    ids, text = prompts.parse_ids(args.prompt_ids), prompts.read_text(args)
    problem = prompts.example(args.seed) if ids is None and text is None else None
    engine = _Engine(args, say)
    if ids is None:
        ids = engine.prompts.from_text(problem.question if problem else text or "")
    request = engine.llm.prepare(ids, params)
    engine.compile(len(ids))
    if problem:
        say("no prompt was given (-p TEXT, or -p - for stdin); a problem it was not trained on:")
        say(problem.question)
    with profile.profiling(args.profile, say):
        one_shot.answer(
            engine.llm,
            request,
            as_json=args.json,
            hide_thinking=args.hide_thinking,
            inside_thinking=engine.prompts.opens_thinking(ids),
            say=say,
        )
    if problem:
        say(f"the right result is {problem.result}")
    engine.close()
    return EXIT_OK


def _chat(args: argparse.Namespace, say: Say) -> int:
    from bailing_jax.cli.chat_loop import run_chat
    from bailing_jax.sampling_params import from_mapping

    params = from_mapping(flags.sampling_fields(args), "--sampling")
    engine = _Engine(args, say)
    if args.warmup:
        engine.compile(None)
    else:
        say("the first answers wait while programs are compiled; --warmup compiles them before")
    with profile.profiling(args.profile, say):
        code = run_chat(
            engine.llm,
            params,
            system=args.system,
            template_args=flags.json_object("--chat-template-args", args.chat_template_args),
            hide_thinking=args.hide_thinking,
            say=say,
        )
    engine.close()
    return code


def _job(args: argparse.Namespace, say: Say) -> int:
    from bailing_jax import distributed
    from bailing_jax.cli.job import check_paths, run_job

    cluster = distributed.find(args.coordinator_address, args.num_processes, args.process_id, say)
    if cluster is not None and (group := distributed.join(cluster, say)) is not None:
        return _job_of_many(args, group, say)
    source, output = _job_paths(args)
    check_paths(source, output)
    with contextlib.ExitStack() as stack:

        def load() -> tuple[LLM, PromptMaker]:
            engine = _job_engine(args, say, stack)
            return engine.llm, engine.prompts

        return run_job(load, source, output, flags.sampling_fields(args), say)


def _job_of_many(args: argparse.Namespace, group: Group, say: Say) -> int:
    """This process' part of a job that runs in several."""
    from bailing_jax import agreement
    from bailing_jax.cli import job_hosts
    from bailing_jax.cli.job import run_job
    from bailing_jax.loading import find_folder

    if not group.leads:
        say = lambda _line: None  # noqa: E731  (one process talks, unless it fails)
        warnings.showwarning = lambda *_args, **_kwargs: None

    def work() -> int:
        folder = find_folder(args.model, download=args.download)
        options = {
            **flags.engine_options(args), "hf_overrides": args.hf_overrides, "seed": args.seed,
        }  # fmt: skip
        agreement.agree(group, agreement.facts_of_engine(options, folder), "facts")
        with contextlib.ExitStack() as stack:

            def load() -> _Engine:
                agree_on_sizes = functools.partial(job_hosts.agree_on_sizes, group)
                return _job_engine(args, say, stack, agree_on_sizes)

            if not group.leads:
                return job_hosts.follow(group, lambda: load().llm)

            def load_all() -> tuple[job_hosts.Leader, PromptMaker]:
                group.order("load")
                engine = load()
                return job_hosts.Leader(engine.llm, group), engine.prompts

            return run_job(
                load_all, *_job_paths(args), flags.sampling_fields(args), say,
                is_stopping=lambda: group.stop != 0,
            )  # fmt: skip

    return job_hosts.end(
        group, run_command(lambda: job_hosts.take_part(group, work), flags.names(args))
    )


def _job_paths(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    source = None if args.input == "-" else Path(args.input)
    return source, None if args.output == "-" else Path(args.output)


def _job_engine(
    args: argparse.Namespace,
    say: Say,
    stack: contextlib.ExitStack,
    check_limits: Callable[[EngineLimits], object] | None = None,
) -> _Engine:
    """The one place where a job's engine is made, on every process of it alike."""
    engine = _Engine(args, say, check_limits)
    stack.callback(engine.close)
    if args.warmup:
        engine.compile(None)
    stack.enter_context(profile.profiling(args.profile, say))
    return engine


class _Engine:
    """The loaded model and what makes its prompts; `check_limits` as `LLM` takes it."""

    def __init__(
        self,
        args: argparse.Namespace,
        say: Say,
        check_limits: Callable[[EngineLimits], object] | None = None,
    ) -> None:
        from bailing_jax import compile_cache

        self._args, self._say = args, say
        self._cache = compile_cache.enable(args.compile_cache, say)
        from bailing_jax.cli.prompts import PromptMaker
        from bailing_jax.llm import LLM

        start = time.perf_counter()
        self.llm = LLM(
            args.model,
            **flags.engine_options(args),
            hf_overrides=flags.json_object("--hf-overrides", args.hf_overrides),
            seed=args.seed,
            report=say,
            download=args.download,
            check_limits=check_limits,
        )
        say(f"loaded in {time.perf_counter() - start:.1f} s")
        self.prompts = PromptMaker(
            self.llm,
            raw=args.raw,
            system=args.system,
            template_args=flags.json_object("--chat-template-args", args.chat_template_args),
        )

    def compile(self, prompt_tokens: int | None) -> None:
        """Compile what one prompt of that length runs; with --warmup, or None, everything."""
        from bailing_jax.sampling_params import from_mapping

        self._say("compiling")
        start = time.perf_counter()
        params = from_mapping(flags.sampling_fields(self._args), "--sampling")
        if prompt_tokens is None or self._args.warmup:
            self.llm.warm_up_all(self._say)
        else:
            self.llm.warm_up(prompt_tokens, params)
        self._say(f"compiled in {time.perf_counter() - start:.1f} s ({self._cache.summary()})")

    def close(self) -> None:
        """Put the compile cache in order."""
        self._cache.close()


if __name__ == "__main__":
    sys.exit(main())
