"""One engine, one round of the CPU comparison: load, warm up, time, print one JSON line.

`bench_cpu.py` starts this file in a fresh process for every round, so no engine inherits another's
threads, caches or memory, and the peer may live in another virtual environment. Both engines get
the same prompts as token ids, decode greedily at batch 1, and are timed the same way: the first
token ends the prefill, the tokens after it are the decode. It imports one engine, and numpy.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Sources disagree on the decay of lightning layer l; both engines run this form, f(l) =
# 1 - (l - 1) / (L - 1) + 1e-5, so that their tokens can be compared. It changes no speed.
DECAY_LAYER_OFFSET = 1

# Chunk of the prompt a step prefills on our side; the peer keeps its default (2048).
PREFILL_CHUNK = 512

# The last lines of a round's standard output start so; libraries may print before.
RESULT_MARK = "bench-result: "

# Prompts that share no prefix, so that a prefix cache cannot answer for the measured one.
WARMUP_SEED, MEASURED_SEED, AGREEMENT_SEED = 11, 12, 13


class Engine(Protocol):
    """What a round needs of an engine."""

    def stream(self, ids: list[int], max_tokens: int) -> Iterable[object]:
        """Decode greedily, one item a token, as soon as the token is known."""
        ...

    def greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        """Return the greedy continuation."""
        ...


class OurEngine:
    """This project's engine on the CPU backend of JAX."""

    packages = ("jax", "jaxlib", "numpy")

    def __init__(self, folder: Path, max_model_len: int) -> None:
        from bailing_jax import LLM

        self._llm = LLM(
            str(folder),
            dtype="float32",
            max_num_seqs=1,
            max_model_len=max_model_len,
            prefill_chunk=PREFILL_CHUNK,
            hf_overrides={"decay_layer_offset": DECAY_LAYER_OFFSET},
        )

    def stream(self, ids: list[int], max_tokens: int) -> Iterable[object]:
        """Decode greedily, one item a token."""
        return self._llm.stream(ids, self._sampling(max_tokens))

    def greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        """Return the greedy continuation."""
        (output,) = self._llm.generate(prompts=[ids], sampling_params=self._sampling(max_tokens))
        return list(output.outputs[0].token_ids)

    @staticmethod
    def _sampling(max_tokens: int) -> Any:
        from bailing_jax import SamplingParams

        return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


class MlxEngine:
    """mlx-lm's own loader, model and generation loop on the CPU device of mlx.

    `generate_step` overlaps building the next step with computing this one; a plain loop with an
    `eval` a token was measured no faster.
    """

    packages = ("mlx", "mlx-cpu", "mlx-lm", "numpy")

    def __init__(self, folder: Path, max_model_len: int) -> None:
        del max_model_len  # its cache grows as it goes
        self._mx: Any = importlib.import_module("mlx.core")
        # First: importing mlx_lm.generate makes a stream on the default device of that moment.
        self._mx.set_default_device(self._mx.cpu)
        self._generate_step: Any = importlib.import_module("mlx_lm.generate").generate_step
        load_model: Any = importlib.import_module("mlx_lm.utils").load_model
        self._model, config = load_model(folder)
        self._set_decay(config["num_hidden_layers"])

    def _set_decay(self, num_layers: int) -> None:
        # mlx-lm clamps l - 1 at 0; undo that in layer 0, its only layer the clamp changes.
        attention = self._model.layers[0].attention
        if not hasattr(attention, "_slope") or num_layers < 2:
            return
        clamped = 1 + 1e-5
        attention._slope = attention._slope * ((clamped + 1 / (num_layers - 1)) / clamped)

    def stream(self, ids: list[int], max_tokens: int) -> Iterator[int]:
        """Decode greedily, one item a token; mlx-lm does not stop at end of sequence by itself."""
        for token, _ in self._generate_step(
            self._mx.array(ids), self._model, max_tokens=max_tokens
        ):
            yield token

    def greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        """Return the greedy continuation."""
        return list(self.stream(ids, max_tokens))


ENGINES: dict[str, type[OurEngine] | type[MlxEngine]] = {"ours": OurEngine, "mlx": MlxEngine}


def random_prompt(seed: int, length: int, vocab_size: int) -> list[int]:
    """Draw a prompt of token ids below `vocab_size`."""
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab_size, length)]


def token_times(engine: Engine, ids: list[int], max_tokens: int) -> list[float]:
    """Return when each token came, in seconds since the prompt was handed over."""
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in engine.stream(ids, max_tokens)]
    if len(times) != max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, the stream had {len(times)} items")
    return times


def loaded_blas() -> list[str]:
    """Name the BLAS libraries in this process: which one decides the peer's prefill speed."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    # An anonymous mapping has five columns, a file's has its path in a sixth.
    paths = {Path(line.split()[5]) for line in maps.read_text().splitlines() if ".so" in line}
    # numpy brings a private copy that no engine calls.
    return sorted(
        path.name
        for path in paths
        if ("blas" in path.name or "mkl" in path.name) and "numpy.libs" not in path.parts
    )


def run_round(args: argparse.Namespace) -> dict[str, Any]:
    """Load the checkpoint, warm up with the measured shapes, measure; return the figures."""
    engine_class = ENGINES[args.worker]
    config = json.loads((args.checkpoint / "config.json").read_text())
    p, n, v = args.prompt_tokens, args.decode_tokens, config["vocab_size"]
    longest = max(p + n, args.agreement_prompt + args.agreement_tokens)
    start = time.perf_counter()
    engine: Engine = engine_class(args.checkpoint, max(2048, longest + 1))
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    tokens = engine.greedy(
        random_prompt(AGREEMENT_SEED, args.agreement_prompt, v), args.agreement_tokens
    )
    token_times(engine, random_prompt(WARMUP_SEED, p, v), n)
    warmup_s = time.perf_counter() - start
    times = token_times(engine, random_prompt(MEASURED_SEED, p, v), n)
    steps_ms = [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    return {
        "load_s": load_s,
        "warmup_s": warmup_s,
        "prefill_s": times[0],
        "prefill_tokens_per_s": p / times[0],
        "decode_tokens_per_s": (n - 1) / (times[-1] - times[0]),
        "decode_step_ms_median": statistics.median(steps_ms),
        "decode_step_ms_p90": sorted(steps_ms)[math.ceil(0.9 * len(steps_ms)) - 1],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_A_MIB,
        "load_average_1min": os.getloadavg()[0],
        "tokens": tokens,
        "versions": {name: _version(name) for name in engine_class.packages},
        "blas": loaded_blas(),
    }


# ru_maxrss is in KiB on Linux and in bytes on macOS.
_RSS_UNITS_A_MIB = 2**20 if sys.platform == "darwin" else 2**10


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="one engine's round of bench_cpu.py")
    parser.add_argument("--worker", choices=sorted(ENGINES), required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--decode-tokens", type=int, required=True)
    parser.add_argument("--agreement-prompt", type=int, required=True)
    parser.add_argument("--agreement-tokens", type=int, required=True)
    result = run_round(parser.parse_args())
    print(RESULT_MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
