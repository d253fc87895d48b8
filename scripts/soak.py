"""Minutes of random requests on two tiny models: nothing may pile up, and nobody may keep a place.

Requests of every kind are submitted, cancelled at random moments (also before their first step,
and in the middle of their prompt) or left to finish. In the end every slot and page is free, the
memory of the process has not grown, and a request asked before and after gets the same answer,
token for token.

    python scripts/soak.py --minutes 20
    python scripts/soak.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
# The root comes before it: tests/ has folders named like the packages they test.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bailing_jax import LLM, SamplingParams  # before numpy and jax: sets the CPU scheduler

# isort: split
import numpy as np
from tiny_models import LATENT, LINEAR, VOCAB_SIZE, is_idle, tiny_llm

from bailing_jax.request import Request

NUM_SEQS, MAX_PROMPT, MAX_ANSWER = 8, 60, 30
QUICK_S = 15.0
# Every program and every shape of the samplers has been met by then.
WARM_UP_TURNS = 1500
SAMPLES_A_MINUTE = 60
# What the allocator may keep for itself.
GROWTH_LIMIT_MB = 24.0
PROBE = [5, 17, 42, 8, 130, 77]


@dataclass
class Counts:
    """What has happened."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    tokens: int = 0
    turns: int = 0


@dataclass
class Live:
    """A request under way and the turns after which it is cancelled; None: it may finish."""

    request: Request
    turns_left: int | None


class Traffic:
    """Random requests to one engine, a step a turn.

    Args:
        llm: the engine.
        rng: decides everything.
        cancelled_share: of the requests, those that do not finish.
        is_plain: short greedy requests only, for speed.
    """

    def __init__(
        self,
        llm: LLM,
        rng: np.random.Generator,
        *,
        cancelled_share: float = 0.5,
        is_plain: bool = False,
    ) -> None:
        self.llm = llm
        self.counts = Counts()
        self._rng = rng
        self._share = cancelled_share
        self._is_plain = is_plain
        self._live: list[Live] = []

    def turn(self) -> None:
        """Submit some, cancel those whose moment has come, run a step, forget the finished."""
        while len(self._live) < 2 * self.llm.limits.total_num_seqs and self._rng.random() < 0.95:
            self._submit()
        self._leave()
        if any(self.llm.is_unfinished(live.request) for live in self._live):
            self.llm.step()
        self.counts.turns += 1
        for live in [one for one in self._live if not self.llm.is_unfinished(one.request)]:
            self._live.remove(live)
            self.counts.finished += 1

    def drain(self) -> None:
        """Cancel half of what is under way and let the rest finish."""
        for live in self._live:
            live.turns_left = 0 if self._rng.random() < 0.5 else None
        self._leave()
        while any(self.llm.is_unfinished(live.request) for live in self._live):
            self.llm.step()
        self.counts.finished += len(self._live)
        self._live.clear()

    def _submit(self) -> None:
        rng = self._rng
        longest = MAX_PROMPT // 3 if self._is_plain else MAX_PROMPT
        prompt = rng.integers(0, VOCAB_SIZE, rng.integers(1, longest)).tolist()
        request = self.llm.prepare(prompt, self._params())
        leaves = rng.random() < self._share
        # Early moments more often: before the first step, and in the middle of a prompt.
        moment = int(rng.integers(0, rng.choice([2, 5, 16])))
        self._live.append(Live(request, moment if leaves else None))
        self.llm.submit(request, lambda _piece: self._count())
        self.counts.submitted += 1

    def _count(self) -> None:
        self.counts.tokens += 1

    def _leave(self) -> None:
        for live in list(self._live):
            if live.turns_left is None:
                continue
            if live.turns_left == 0:
                self.llm.cancel(live.request)
                self._live.remove(live)
                self.counts.cancelled += 1
            live.turns_left -= 1

    def _params(self) -> SamplingParams:
        """Greedy or not, with and without each of the rarer wishes."""
        rng = self._rng
        most = int(rng.integers(1, MAX_ANSWER))
        if self._is_plain:
            return SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
        draws = rng.random() < 0.5
        return SamplingParams(
            max_tokens=most,
            temperature=0.8 if draws else 0.0,
            top_k=20 if draws else 0,
            seed=int(rng.integers(0, 2**63)) if draws else None,
            repetition_penalty=1.2 if rng.random() < 0.2 else 1.0,
            logprobs=2 if rng.random() < 0.2 else None,
            ignore_eos=True,
            n=2 if rng.random() < 0.1 else 1,
        )


def main() -> int:
    args = _arguments()
    rng = np.random.default_rng(args.seed)
    traffics = [
        Traffic(tiny_llm(config, tokenizer=config is LINEAR, max_num_seqs=NUM_SEQS), rng)
        for config in (LINEAR, LATENT)
    ]
    first = [_probe(traffic.llm) for traffic in traffics]
    start = time.perf_counter()
    _run(traffics, lambda turns: turns < (300 if args.quick else WARM_UP_TURNS))
    warm = time.perf_counter() - start
    _say(f"warm after {warm:.0f} s")
    seconds = QUICK_S if args.quick else 60 * args.minutes
    memory = _watch(traffics, seconds)
    for traffic in traffics:
        traffic.drain()
    same = first == [_probe(traffic.llm) for traffic in traffics]
    counts = {
        name: sum(getattr(traffic.counts, name) for traffic in traffics)
        for name in asdict(Counts())
    }
    report = {
        "seed": args.seed,
        "seconds": round(seconds, 1),
        **counts,
        "idle": all(is_idle(traffic.llm) for traffic in traffics),
        "same_answers": same,
        **_growth(memory, seconds),
    }
    print(json.dumps(report))
    sound = report["idle"] and same and report["growth_mb"] < GROWTH_LIMIT_MB
    return 0 if sound else 1


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=20, help="after warming up (default: 20)")
    p.add_argument("--seed", type=int, default=0, help="of the requests")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_S:.0f} seconds")
    args = p.parse_args()
    if args.minutes <= 0:
        p.error("--minutes: more than 0")
    return args


def _run(traffics: list[Traffic], goes_on: Callable[[int], bool]) -> None:
    turns = 0
    while goes_on(turns):
        for traffic in traffics:
            traffic.turn()
        turns += 1


def _watch(traffics: list[Traffic], seconds: float) -> list[float]:
    """Run for so long; the process's memory in MB, sampled evenly."""
    start, memory = time.perf_counter(), list[float]()

    def goes_on(_turns: int) -> bool:
        elapsed = time.perf_counter() - start
        if elapsed >= len(memory) * 60 / SAMPLES_A_MINUTE:
            memory.append(resident_mb())
        return elapsed < seconds

    _run(traffics, goes_on)
    return memory


def _growth(memory: list[float], seconds: float) -> dict[str, float]:
    """Growth from the first to the last quarter, and the slope of a straight line through all."""
    quarter = max(1, len(memory) // 4)
    growth = statistics.median(memory[-quarter:]) - statistics.median(memory[:quarter])
    hours = np.linspace(0, seconds / 3600, len(memory))
    slope = np.polyfit(hours, memory, 1)[0] if len(memory) > 1 else 0.0
    return {
        "resident_mb": round(memory[-1], 1),
        "growth_mb": round(growth, 2),
        "slope_mb_per_hour": round(float(slope), 1),
    }


def resident_mb() -> float:
    """Memory of this process; where /proc is missing, the most it ever had."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _probe(llm: LLM) -> list[int]:
    """The answer to a fixed request that runs alone."""
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    return llm.generate(PROBE, params)[0].outputs[0].token_ids


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
