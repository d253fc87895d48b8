"""What the engine costs beside the bare decode step, and what its users wait for.

`python scripts/bench_engine.py` loads the model that ships with the package (or --model) and prints
one JSON object. For each concurrency: decode tokens/s of the engine, tokens/s of the compiled step
called by itself with its results waited for, in turns so that drift hits both alike, their ratio,
and the host's share of the engine's time (what passes outside of programs and of waiting for
them). Then a mixed workload of requests that arrive at random: time to first token and time
between tokens, as percentiles.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import bailing_jax  # isort: skip  before jax: it sets a flag of XLA's

import jax
import numpy as np

from bailing_jax import LLM, SamplingParams
from bailing_jax.batch import pack
from bailing_jax.engine import sampler
from bailing_jax.engine.programs import no_ends
from bailing_jax.engine.sizes import decode_size
from bailing_jax.row import Row
from bailing_jax.state import allocate

PROMPT_TOKENS = 32


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the engine beside the bare decode step")
    add = parser.add_argument
    add("--model", help="a checkpoint folder; default: the model that ships with the package")
    add("--kernels", default="auto", help="one implementation of all operators, or auto")
    add("--concurrency", default="1,32", help="how many requests decode at once")
    add("--tokens", type=int, help="tokens a request in a round (256; --quick: 33)")
    add("--rounds", type=int, help="rounds of each (7; --quick: 2)")
    add("--requests", type=int, help="requests of the mixed workload (200; --quick: 20)")
    add("--quick", action="store_true", help="small numbers: does it run?")
    args = parser.parse_args()
    defaults = (33, 2, 20) if args.quick else (256, 7, 200)
    for name, default in zip(("tokens", "rounds", "requests"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    found = np.percentile(values, [50, 90, 99]) * 1e3
    return {f"p{p}_ms": round(float(v), 3) for p, v in zip((50, 90, 99), found, strict=True)}


class Waiting:
    """Time spent in programs: from the call of a step to its results."""

    def __init__(self, llm: LLM) -> None:
        self.seconds = 0.0
        programs: Any = llm._engine._programs
        real = programs.step

        def step(*args: Any) -> Any:
            start = time.perf_counter()
            result = jax.block_until_ready(real(*args))
            self.seconds += time.perf_counter() - start
            return result

        self._undo = lambda: setattr(programs, "step", real)
        programs.step = step

    def stop(self) -> None:
        self._undo()


def engine_round(llm: LLM, count: int, tokens: int, *, watched: bool) -> tuple[float, float]:
    """Seconds a decode step of `count` requests takes in the engine, and the host's share."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    requests = [llm.prepare([5 + i] * PROMPT_TOKENS, params) for i in range(count)]
    for request in requests:
        llm.submit(request)
    while any(not answer._token_ids for request in requests for answer in request.answers):
        llm.step()
    done = min(len(request.answers[0]._token_ids) for request in requests)
    waiting = Waiting(llm) if watched else None
    start = time.perf_counter()
    while llm._engine.has_work:
        llm.step()
    seconds = time.perf_counter() - start
    share = 0.0
    if waiting is not None:
        waiting.stop()
        share = 1 - waiting.seconds / seconds
    return seconds / (tokens - done), share


def bare_round(llm: LLM, count: int, tokens: int) -> float:
    """Seconds a call of the compiled decode step takes, one step a call, over the same lengths."""
    engine = llm._engine
    limits, programs = engine._limits, engine._programs
    size = decode_size(limits, count)
    width = limits.pages_a_sequence
    knobs = sampler.knobs(size.decode_rows, (), ())
    ends = no_ends(size.decode_rows)
    ends.room[:count] = tokens
    layouts = [
        pack(
            [Row([5 + i], 1 + i, range(1 + i * width, 1 + (i + 1) * width), PROMPT_TOKENS + t)
             for i in range(count)],
            [], num_decode=size.decode_rows, num_prefill=0, num_segments=0,
            page_size=limits.page_size, pages_a_sequence=width,
        )
        for t in range(tokens)
    ]  # fmt: skip
    state = allocate(llm.config, engine._spec)
    state = jax.block_until_ready(programs.step(state, layouts[0], knobs, ends, 1).state)
    start = time.perf_counter()
    for layout in layouts:
        result = programs.step(state, layout, knobs, ends, 1)
        jax.block_until_ready(result.tokens)
        state = result.state
    return (time.perf_counter() - start) / tokens


def decoding(llm: LLM, count: int, tokens: int, rounds: int) -> dict[str, Any]:
    engine, bare, ratios, shares = [], [], [], []
    engine_round(llm, count, min(tokens, 20), watched=False)
    for _ in range(rounds):
        bare.append(count / bare_round(llm, count, tokens))
        engine.append(count / engine_round(llm, count, tokens, watched=False)[0])
        ratios.append(engine[-1] / bare[-1])
        shares.append(engine_round(llm, count, tokens, watched=True)[1])
    return {
        "concurrency": count,
        "engine_tokens_per_s": spread(engine),
        "bare_step_tokens_per_s": spread(bare),
        "ratio": spread(ratios),
        "host_share": spread(shares),
    }


def mixed(llm: LLM, count: int) -> dict[str, Any]:
    """Requests of mixed lengths arrive at about two thirds of what the machine can take."""
    rng = random.Random(0)
    vocab = llm.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(4, 200))] for _ in range(count)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(8, 120), temperature=rng.choice([0.0, 0.8]), top_p=0.95,
            seed=i, ignore_eos=True,
        )
        for i in range(count)
    ]  # fmt: skip
    start = time.perf_counter()
    llm.generate(prompts, params)
    busy = time.perf_counter() - start
    arrivals = sorted(rng.random() * 1.5 * busy for _ in range(count))
    times: list[list[float]] = [[] for _ in range(count)]
    start, sent = time.perf_counter(), 0
    while sent < count or llm._engine.has_work:
        while sent < count and time.perf_counter() - start >= arrivals[sent]:
            clock = times[sent]
            request = llm.prepare(prompts[sent], params[sent])
            llm.submit(request, lambda _piece, clock=clock: clock.append(time.perf_counter()))
            sent += 1
        if llm._engine.has_work:
            llm.step()
        else:
            time.sleep(max(0.0, arrivals[sent] - (time.perf_counter() - start)))
    first = [clock[0] - start - at for clock, at in zip(times, arrivals, strict=True)]
    between = [b - a for clock in times for a, b in itertools.pairwise(clock)]
    a_token = [(c[-1] - c[0]) / (len(c) - 1) for c in times]
    tokens = sum(map(len, times))
    return {
        "requests": count,
        "prompt_tokens": sum(map(len, prompts)),
        "tokens": tokens,
        "tokens_per_s_all_at_once": round(tokens / busy, 1),
        "tokens_per_s_as_they_arrive": round(tokens / (max(c[-1] for c in times) - start), 1),
        "time_to_first_token": percentiles(first),
        "between_tokens": percentiles(between),
        "mean_a_token_of_a_request": percentiles(a_token),
    }


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def main() -> None:
    args = parse_args()
    counts = [int(part) for part in args.concurrency.split(",")]
    llm = LLM(
        args.model, max_num_seqs=max(counts), max_model_len=512, prefill_chunk=256,
        kernels=args.kernels, report=lambda _line: None,
    )  # fmt: skip
    llm.warm_up_all(lambda _line: None)
    device = jax.devices()[0]
    record = {
        "bench": "engine",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": f"{device.platform} {device.device_kind}",
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "bailing_jax": bailing_jax.__version__,
        "model": llm.config.architecture,
        "kernels": args.kernels,
        "limits": {"max_num_seqs": llm.limits.max_num_seqs, "max_model_len": 512},
        "tokens_a_round": args.tokens,
        "rounds": args.rounds,
        "decode": [decoding(llm, count, args.tokens, args.rounds) for count in counts],
        "mixed": mixed(llm, args.requests),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
