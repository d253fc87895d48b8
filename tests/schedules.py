"""Random schedules of an engine with a tiny model, each request compared with itself alone.

A schedule is a list of operations that anything may follow on anything: requests come, go, give
way and end in the middle of steps with any budget, cuts and order. Requests come from a fixed pool
whose runs alone are made once, by one device; the schedule may run on several shards. After every
step the state of every running request, and at its end its tokens and log probabilities, are those
it had alone: bit for bit in exact mode, within the bounds of `tolerances` otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from looped import looped_engine
from random_checkpoints import V2
from tiny_models import LATENT, LINEAR, tiny_llm
from tolerances import TOLERANCES

from bailing_jax.engine.calls import Call
from bailing_jax.engine.engine import Engine
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.scheduler import Scheduler, Sequence, StepPlan
from bailing_jax.engine.shards import CallPlan, call_of_nobody
from bailing_jax.engine.sizes import decode_size
from bailing_jax.layer_plan import layer_plan
from bailing_jax.sampling_params import SamplingParams, resolve

CONFIGS: dict[str, dict[str, Any]] = {
    "v2": {**LINEAR, "architectures": [V2], "model_type": "bailing_moe"},
    "linear_v2": LINEAR,
    "v2_5": LATENT,
}
KINDS = (
    "submit", "step", "budget", "cut", "permute", "preempt", "cancel", "finish", "dummy", "empty",
)  # fmt: skip
# Around every grid there is: one token, the exact prefill chunk, the buckets, a page.
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70)
MAX_STEPS_LEFT = 2_000
# The last of a pool: short prompts with long answers. A few of them need more pages than there are.
NUM_GROWING = 4

Op = tuple[str, int, int]


class Wrong(AssertionError):
    """A request was not what it is alone, or the engine lost something."""


@dataclass(frozen=True)
class Wanted:
    """A request of the pool."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int


@dataclass
class Trace:
    """What came of a request: tokens, their log probabilities, its state by tokens computed."""

    tokens: list[int] = field(default_factory=list)
    entries: list[dict[int, float] | None] = field(default_factory=list)
    states: dict[int, list[np.ndarray]] = field(default_factory=dict)


@dataclass
class _Live:
    """A request under way, and how many tokens it may still have."""

    index: int
    number: int
    trace: Trace
    room: int | None = None


def make_pool(rng: random.Random, size: int) -> list[Wanted]:
    """Prompts of every awkward length, greedy and sampled, with and without log probabilities."""
    pool = []
    for index in range(size):
        length = LENGTHS[index % len(LENGTHS)]
        fields: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 5, 12, 26)), "ignore_eos": True}
        if index >= size - NUM_GROWING:
            length, fields["max_tokens"] = rng.randint(1, 12), 40
        fields["temperature"] = (0.0, 0.0, 1.0)[index % 3]
        if index % 4 == 1:
            fields["logprobs"] = 2
        if index % 8 == 5:
            fields["repetition_penalty"] = 1.2
        prompt = tuple(rng.randrange(300) for _ in range(length))
        params = resolve(SamplingParams(**fields), {}, "")
        pool.append(Wanted(prompt, params, rng.getrandbits(40)))
    return pool


def make_schedule(rng: random.Random, pool: int, length: int) -> list[Op]:
    """Operations with two numbers each; what they mean depends on what is under way.

    In one schedule of four all requests are those that grow, and most operations are steps, so that
    pages run out.
    """
    grow = rng.random() < 0.25
    weights = {"submit": 5, "step": 24 if grow else 6}
    kinds = rng.choices(KINDS, [weights.get(kind, 2) for kind in KINDS], k=length)
    first = pool - NUM_GROWING if grow else 0
    return [
        (
            kind,
            rng.randrange(first, pool) if kind == "submit" else rng.randrange(1 << 16),
            rng.randrange(1 << 16),
        )
        for kind in kinds
    ]


class Bench:
    """An engine of one architecture whose requests are known."""

    def __init__(self, name: str, *, exact: bool, pool: int = 24, seed: int = 0) -> None:
        chunk = 32 if exact else 80
        llm = tiny_llm(
            CONFIGS[name],
            tokenizer=False,
            max_num_seqs=4,
            prefill_chunk=chunk,
            batch_invariant=exact,
        )
        # Pages for one request of full length: somebody often has to give way.
        # Prefill calls of three sizes; a product of one row adds in another order than one of more.
        small = {"small_prefills": (1, 16)} if exact else {}
        limits = EngineLimits(4, 96, chunk, 16, max_num_pages=6, exact=exact, **small)
        spec = limits.state_spec("float32", "float32")
        self.name, self.exact, self.shards = name, exact, 1
        self.config, self.limits = llm.config, limits
        self.engine = Engine(llm._engine._programs, llm.config, limits, spec)
        self.pool = make_pool(random.Random(f"pool {seed}"), pool)
        self._alone: dict[int, Trace] = {}
        self._one_device: Bench | None = None
        self._start()

    def _start(self) -> None:
        self._recurrent = [layer.attention == "lightning" for layer in layer_plan(self.config)]
        self._page_size = self.limits.page_size
        self.done = 0
        self.counts: Counter[str] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()

    def on_shards(self, shards: int) -> Bench:
        """The same programs, requests and sizes, in each of several shards."""
        made = copy.copy(self)
        made.shards, made._one_device = shards, self
        made.limits = replace(self.limits, num_shards=shards)
        made.engine = looped_engine(self.engine._programs, self.config, made.limits)
        made._start()
        made._count_calls()
        return made

    def _count_calls(self) -> None:
        """How often shards share a call, and how often one has nothing in it."""
        engine = self.engine

        def call(plan: CallPlan) -> Call:
            busy = [bool(part.decodes or part.segments) for part in plan.shards]
            prefills = [bool(part.segments) for part in plan.shards]
            self.counts["calls of several shards"] += sum(busy) > 1
            self.counts["calls with an idle shard"] += any(busy) and not all(busy)
            self.counts["one prefills, one does not"] += any(prefills) and not all(prefills)
            return type(engine)._call(engine, plan)

        engine._call = call  # type: ignore[method-assign]

    @property
    def schedulers(self) -> list[Scheduler]:
        """Of all shards."""
        return [shard.scheduler for shard in self.engine._shards.all]

    @property
    def waiting(self) -> list[Sequence]:
        """Whoever has no slot."""
        waiting = [s for scheduler in self.schedulers for s in scheduler.waiting]
        return [*waiting, *self.engine._shards.waiting]

    @property
    def running(self) -> list[Sequence]:
        """Whoever has one."""
        return [s for scheduler in self.schedulers for s in scheduler.running]

    def run(self, schedule: list[Op]) -> None:
        """Run a schedule to the end of its requests.

        Raises:
            Wrong: what differs.
        """
        for kind, index, _ in schedule:
            if kind == "submit":
                self.alone(index)
        run = _Run(self)
        try:
            for op in schedule:
                run.do(op)
            run.finish()
            self.done += 1
        except Exception:
            self.engine._start_afresh()
            raise

    def alone(self, index: int) -> Trace:
        """What a request of the pool gives with nobody beside it, one token a call."""
        if self._one_device is not None:
            return self._one_device.alone(index)
        if index not in self._alone:
            wanted, trace = self.pool[index], Trace()
            # Log probabilities show by how much a token won, where two are nearly equal.
            params = replace(wanted.params, logprobs=wanted.params.logprobs or 2)
            engine = self.engine
            number = engine.submit(
                list(wanted.prompt), params, wanted.seed, _listener(trace, lambda: None)
            )
            sequence = engine._requests[number].sequence
            while engine.has_work:
                engine.step(max_steps=1, ahead=False)
                if sequence.slot is not None:
                    trace.states[sequence.num_computed] = self.state(sequence)
            self._alone[index] = trace
        return self._alone[index]

    def state(self, sequence: Sequence) -> list[np.ndarray]:
        """Copies of what a sequence owns: its slot of every layer, or its tokens' pages."""
        if sequence.slot is None or sequence.pages is None:
            raise ValueError("it owns nothing")
        owned = []
        for is_recurrent, leaf in zip(self._recurrent, self.engine._state.layers, strict=True):
            array = np.asarray(leaf)
            array = array.reshape(self.shards, -1, *array.shape[1:])[sequence.shard]
            if is_recurrent:
                owned.append(array[sequence.slot.slot].copy())
                continue
            used = -(-sequence.num_computed // self._page_size)
            tokens = array[list(sequence.pages.pages[:used])]
            owned.append(tokens.reshape(-1, *tokens.shape[2:])[: sequence.num_computed])
        return owned


@contextlib.contextmanager
def _in_order(schedulers: list[Scheduler], key: int | None) -> Iterator[None]:
    """Within it a step's plans have their rows shuffled; None leaves them alone."""
    if key is None:
        yield
        return
    rng = random.Random(key)

    def shuffling(plan: Callable[..., StepPlan]) -> Callable[..., StepPlan]:
        def shuffled(**wishes: Any) -> StepPlan:
            made = plan(**wishes)
            decodes = rng.sample(made.decodes, len(made.decodes))
            segments = rng.sample(made.segments, len(made.segments))
            return replace(made, decodes=tuple(decodes), segments=tuple(segments))

        return shuffled

    for scheduler in schedulers:
        scheduler.plan = shuffling(scheduler.plan)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for scheduler in schedulers:
            del scheduler.plan


def _listener(
    trace: Trace, room: Callable[[], int | None]
) -> Callable[[int, dict[int, float] | None], bool]:
    def on_token(token: int, entry: dict[int, float] | None) -> bool:
        trace.tokens.append(token)
        trace.entries.append(entry)
        limit = room()
        return limit is not None and len(trace.tokens) >= limit

    return on_token


class _Run:
    """One schedule under way."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.engine = bench, bench.engine
        self.live: list[_Live] = []
        self._order: int | None = None
        self._last: str | None = None

    def do(self, op: Op) -> None:
        """One operation; those that find nothing to act on do nothing."""
        kind, a, b = op
        if getattr(self, f"_{kind}")(a, b):
            self.bench.counts[kind] += 1
            if self._last is not None:
                self.bench.pairs[self._last, kind] += 1
            self._last = kind

    def finish(self) -> None:
        """Step until nobody is left, and see that nothing else is."""
        for _ in range(MAX_STEPS_LEFT):
            if not self.engine.has_work:
                break
            self._step(8, 0)
        else:
            raise Wrong(f"somebody starves: {[r.number for r in self.live]}")
        for ledger in [x for s in self.bench.schedulers for x in (s.slots, s.pages)]:
            if ledger.num_free != ledger.capacity:
                raise Wrong(f"{type(ledger).__name__}: {ledger.num_free} of {ledger.capacity} free")

    # The operations: each returns whether it had anything to do.

    def _submit(self, index: int, _b: int) -> bool:
        if self.bench.waiting:
            self.bench.counts["submitted while others wait"] += 1
        live = _Live(index, self.engine.new_number(), Trace())
        wanted = self.bench.pool[index]
        self.engine.submit(
            list(wanted.prompt), wanted.params, wanted.seed,
            _listener(live.trace, lambda: live.room), live.number,
        )  # fmt: skip
        self.live.append(live)
        return True

    def _empty(self, _a: int, _b: int) -> bool:
        params = self.bench.pool[0].params
        number = self.engine.new_number()
        try:
            self.engine.submit([], params, 0, lambda _token, _entry: True, number)
        except ValueError:
            if self.engine.is_unfinished(number):
                raise Wrong("a refused request stays") from None
            return True
        raise Wrong("a prompt without tokens was accepted")

    def _step(self, a: int, b: int, **wishes: Any) -> bool:
        if not self.engine.has_work:
            return False
        bench = self.bench
        before = {s.number: s.num_preempted for s in [*bench.running, *bench.waiting]}
        with _in_order(bench.schedulers, self._order):
            self.engine.step(max_steps=1 + a % 8, ahead=b % 3 > 0, **wishes)
        self._order = None
        chosen = wishes.get("preempt", ())
        for sequence in [*bench.running, *bench.waiting]:
            if sequence.num_preempted > before.get(sequence.number, 0):
                forced = sequence.number in chosen
                bench.counts["preempted" if forced else "gave way for pages"] += 1
        bench.counts["calls started ahead"] += self.engine._ahead is not None
        self._check()
        return True

    def _budget(self, a: int, b: int) -> bool:
        return self._step(b, a, budget=a % (self.engine._limits.prefill_chunk + 1))

    def _cut(self, a: int, b: int) -> bool:
        cuts = {live.number: (a * (i + 1)) % 41 for i, live in enumerate(self.live)}
        return bool(cuts) and self._step(b, a, cuts=cuts)

    def _permute(self, a: int, _b: int) -> bool:
        """The rows of the next step come in another order."""
        self._order = a
        return True

    def _preempt(self, a: int, b: int) -> bool:
        running = [sequence.number for sequence in self.bench.running]
        if not running:
            return False
        return self._step(b, a, preempt={running[a % len(running)]})

    def _cancel(self, a: int, _b: int) -> bool:
        if not self.live:
            return False
        live = self.live.pop(a % len(self.live))
        self.engine.cancel(live.number)
        return True

    def _finish(self, a: int, b: int) -> bool:
        """It says at its next token that it is done, or at one of the next."""
        if not self.live:
            return False
        live = self.live[a % len(self.live)]
        live.room = len(live.trace.tokens) + 1 + b % 3
        return True

    def _dummy(self, _a: int, _b: int) -> bool:
        """A step of nobody changes no byte, once debug mode has poisoned what is free."""
        nobody = call_of_nobody(decode_size(self.bench.limits, 0), self.bench.shards)
        self.engine._call(nobody)
        before = [np.asarray(leaf).tobytes() for leaf in self.engine._state.layers]
        self.engine._call(nobody)
        after = [np.asarray(leaf).tobytes() for leaf in self.engine._state.layers]
        if before != after:
            raise Wrong("a step of nobody changed the state")
        return True

    # The comparisons.

    def _check(self) -> None:
        still = []
        for live in self.live:
            if self.engine.is_unfinished(live.number):
                still.append(live)
                sequence = self.engine._requests[live.number].sequence
                # While a call is on its way the state is further than what is known of it.
                known = sequence.num_computed and self.engine._ahead is None
                if sequence.slot is not None and known:
                    self._compare_state(live, sequence)
            else:
                self._compare_answer(live)
        self.live = still

    def _diverged(self, live: _Live) -> bool:
        """Whether a near tie has led a request elsewhere; never in exact mode."""
        want = self.bench.alone(live.index).tokens
        return live.trace.tokens != want[: len(live.trace.tokens)]

    def _compare_state(self, live: _Live, sequence: Sequence) -> None:
        want = self.bench.alone(live.index).states.get(sequence.num_computed)
        if want is None:
            if self.bench.exact:
                raise Wrong(f"{self._who(live)}: a cut at {sequence.num_computed} off the grid")
            return
        if self._diverged(live):
            return self._compare_answer(live)
        self.bench.counts["states compared"] += 1
        for layer, (got, wanted) in enumerate(
            zip(self.bench.state(sequence), want, strict=True)
        ):
            if self.bench.exact:
                same = got.tobytes() == wanted.tobytes()
            else:
                bound = TOLERANCES["schedule_state"] * max(np.abs(wanted).max(), 1e-3)
                same = bool(np.abs(got - wanted).max() <= bound)
            if not same:
                raise Wrong(
                    f"{self._who(live)}: layer {layer}'s state after {sequence.num_computed} "
                    f"tokens differs by up to {np.abs(got - wanted).max():.3g}"
                )
        return None

    def _compare_answer(self, live: _Live) -> None:
        got, want = live.trace, self.bench.alone(live.index)
        self.bench.counts["answers compared"] += 1
        expected = len(want.tokens) if live.room is None else min(live.room, len(want.tokens))
        if not self.engine.is_unfinished(live.number) and len(got.tokens) != expected:
            raise Wrong(f"{self._who(live)}: {len(got.tokens)} tokens, alone {expected}")
        params = self.bench.pool[live.index].params
        for place, token in enumerate(got.tokens):
            if token != want.tokens[place]:
                self._excuse(live, place, token)
                return
            if params.logprobs is not None:
                self._compare_logprobs(live, place)

    def _compare_logprobs(self, live: _Live, place: int) -> None:
        got = live.trace.entries[place] or {}
        want = self.bench.alone(live.index).entries[place] or {}
        if self.bench.exact:
            same = got == want
        else:
            bound = TOLERANCES["law_logits"]
            same = all(abs(got[t] - want[t]) <= bound for t in got.keys() & want.keys())
        if not same:
            raise Wrong(f"{self._who(live)}: log probabilities of token {place}: {got}, {want}")

    def _excuse(self, live: _Live, place: int, token: int) -> None:
        """In normal mode the two best of a greedy choice may change places; a draw may differ."""
        entry = self.bench.alone(live.index).entries[place] or {}
        best = sorted(entry.values(), reverse=True)
        is_greedy = self.bench.pool[live.index].params.temperature == 0
        close = len(best) > 1 and best[0] - best[1] < 2 * TOLERANCES["law_logits"]
        if self.bench.exact or (is_greedy and not close):
            want = self.bench.alone(live.index).tokens
            raise Wrong(f"{self._who(live)}: token {place} is {token}, alone {want[place]}")
        self.bench.counts["near ties" if is_greedy else "draws that differ"] += 1

    def _who(self, live: _Live) -> str:
        return f"{self.bench.name}: request {live.number} (of the pool: {live.index})"
