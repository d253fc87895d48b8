"""A training run: open, go on where it was, step, log, keep, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.text.chat import load_chat_template
from bailing_jax.text.tokenizer import load_tokenizer
from bailing_jax.training import log
from bailing_jax.training.checkpoints import Checkpoints
from bailing_jax.training.export import export
from bailing_jax.training.loss import Batch, to_batch
from bailing_jax.training.options import TrainOptions
from bailing_jax.training.packs import Pack, PackSize, PackStream, measure
from bailing_jax.training.samples import SourceSpec, find_turns, open_source
from bailing_jax.training.step import Metrics, TrainState, initial_state, make_step, stack_parts

MODEL_FOLDER = "model"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Origin:
    """Where a run starts: a folder with config.json and a tokenizer, perhaps with weights.

    Attributes:
        folder: of config.json, tokenizer and template.
        hf_config: its config.json, overrides applied.
        config: the same, read.
        weights: float32 by path to start from, or None for random ones.
    """

    folder: Path
    hf_config: Mapping[str, Any]
    config: ModelConfig
    weights: Mapping[str, np.ndarray] | None


@dataclass(frozen=True)
class Pace:
    """What does not change a run's losses.

    Attributes:
        checkpoint_every: steps.
        log_every: steps.
        minutes: stop after so long, with a checkpoint; 0 for no limit.
        workers: processes that make data.
    """

    checkpoint_every: int = 1000
    log_every: int = 10
    minutes: float = 0
    workers: int = 0


def train(origin: Origin, options: TrainOptions, pace: Pace, output: Path, say: Say) -> bool:
    """Run to the end or to the time limit; returns whether the last step is done.

    Raises:
        UserError: data, tokenizer or template can't be used, or `output` holds another run.
    """
    start = time.perf_counter()
    specs = source_specs(origin, options)
    sizes = [
        measure(
            open_source(spec),
            spec.name,
            int(source.share * options.rows) // options.accumulate,
            options.max_length,
        )
        for spec, source in zip(specs, options.shares(), strict=True)
    ]
    record = {**options.to_json(), "config": dict(origin.hf_config)}
    checkpoints = Checkpoints(output, record)
    try:
        state = initial_state(options, origin.config, origin.weights)
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
        first = int(state.step)
        say(_opening(origin, options, specs, sizes, first))
        with PackStream(specs, sizes, options.accumulate, pace.workers) as stream:
            runner = _Runner(origin, options, pace, output, say, checkpoints, start)
            state = runner.run(state, stream, sizes)
        done = int(state.step) == options.steps
        curve = log.draw_curve(output, f"training loss, seed {options.seed}")
        say(f"loss curve: {curve}" if curve else "no loss curve: install bailing-jax[train]")
        if done:
            weights = {path: np.asarray(array) for path, array in state.weights.items()}
            folder = output / MODEL_FOLDER
            export(folder, origin.config, origin.hf_config, weights, origin.folder)
            say(f"model: {folder}")
        else:
            say(f"stopped at step {int(state.step)}; the same command goes on")
        return done
    finally:
        checkpoints.close()


def source_specs(origin: Origin, options: TrainOptions) -> list[SourceSpec]:
    """What workers need to make each source."""
    template = load_chat_template(origin.folder)
    tokenizer = load_tokenizer(origin.folder, origin.config.vocab_size)
    if tokenizer is None:
        raise UserError(
            f"{origin.folder}: no tokenizer.json", "Training needs a tokenizer.", EXIT_USAGE
        )
    turns = None if template is None else find_turns(template, tokenizer)
    return [
        SourceSpec(
            name=source.name,
            tokenizer=origin.folder,
            vocab_size=origin.config.vocab_size,
            turns=turns,
            prompt_loss=options.prompt_loss,
            max_length=options.max_length,
            seed=options.seed,
        )
        for source in options.data
    ]


class _Runner:
    """The loop, and when it logs and keeps."""

    def __init__(
        self,
        origin: Origin,
        options: TrainOptions,
        pace: Pace,
        output: Path,
        say: Say,
        checkpoints: Checkpoints,
        start: float,
    ) -> None:
        self._origin, self._options, self._pace = origin, options, pace
        self._output, self._say, self._checkpoints, self._start = output, say, checkpoints, start

    def run(self, state: TrainState, stream: PackStream, sizes: Sequence[PackSize]) -> TrainState:
        """Step until the end or the time limit; the returned state is kept."""
        options, pace = self._options, self._pace
        first = int(state.step)
        lines = log.Log(self._output, first)
        step_function = make_step(options, self._origin.config)
        waiting: list[tuple[int, Metrics, int]] = []
        since = time.perf_counter()
        number = first
        for packs in stream.steps(first, options.steps):
            state, metrics = step_function(state, _batches(packs, sizes))
            number += 1
            tokens = sum(sum(pack.lengths) for parts in packs for pack in parts)
            waiting.append((number, metrics, tokens))
            at_end = number == options.steps
            if at_end or number % pace.log_every == 0 or number == first + 1:
                jax.block_until_ready(metrics)
                entry = _entry(waiting, options, time.perf_counter() - since)
                since = time.perf_counter()
                waiting.clear()
                _refuse_nonfinite(entry)
                lines.add(entry)
                left = (options.steps - number) * entry["seconds"] / entry["steps"]
                self._say(log.progress_line(entry, options.steps, left))
            out_of_time = pace.minutes and time.perf_counter() - self._start > 60 * pace.minutes
            if at_end or out_of_time or number % pace.checkpoint_every == 0:
                self._checkpoints.save(state)
            if out_of_time:
                break
        return state


def _batches(packs: Sequence[Sequence[Pack]], sizes: Sequence[PackSize]) -> list[Batch]:
    return [
        stack_parts([to_batch(part, size) for part in parts])
        for parts, size in zip(packs, sizes, strict=True)
    ]


def _entry(
    waiting: Sequence[tuple[int, Metrics, int]], options: TrainOptions, seconds: float
) -> dict[str, Any]:
    """A log entry: means over the steps since the last one."""
    steps = [jax.tree.map(np.asarray, metrics) for _, metrics, _ in waiting]

    def mean(values: Sequence[Any]) -> Any:
        return np.mean(np.asarray(values, np.float64), axis=0)

    loss, accuracy = mean([m.source_loss for m in steps]), mean([m.source_accuracy for m in steps])
    names = [source.name for source in options.data]
    return {
        "step": waiting[-1][0],
        "loss": float(mean([m.loss for m in steps])),
        "sources": {
            name: {"loss": float(loss[i]), "accuracy": float(accuracy[i])}
            for i, name in enumerate(names)
        },
        "grad_norm": float(mean([m.grad_norm for m in steps])),
        "worst_load": float(max(m.worst_load for m in steps)),
        "steps": len(waiting),
        "tokens_per_s": sum(tokens for _, _, tokens in waiting) / seconds,
        "seconds": seconds,
    }


def _refuse_nonfinite(entry: Mapping[str, Any]) -> None:
    if not np.isfinite(entry["loss"]) or not np.isfinite(entry["grad_norm"]):
        raise UserError(
            f"step {entry['step']}: loss {entry['loss']}, gradient norm {entry['grad_norm']}",
            "Lower --learning-rate or raise --warmup-steps; the last checkpoint is from before.",
        )


def _opening(
    origin: Origin,
    options: TrainOptions,
    specs: Sequence[SourceSpec],
    sizes: Sequence[PackSize],
    first: int,
) -> str:
    from bailing_jax.params import describe

    parameters = sum(param.size for param in describe(origin.config)) / 1e6
    sources = "\n".join(
        f"  {spec.name}: {size.rows} tokens a part, up to {size.segments} samples of up to "
        f"{size.window} tokens"
        for spec, size in zip(specs, sizes, strict=True)
    )
    begin = "from the start" if first == 0 else f"on from step {first}"
    return (
        f"{origin.config.architecture}: {parameters:.2f} M parameters, {options.dtype}, "
        f"{options.steps} steps {begin}, {options.accumulate} "
        f"part{'s' if options.accumulate > 1 else ''} a step, on {jax.default_backend()}\n{sources}"
    )
