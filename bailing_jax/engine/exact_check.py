"""Whether a model's step is exact on this device: one request alone and in company, bit for bit.

The calls of exact mode at their real sizes: a prefill call (D = 0) of each size and a decode call
(T = 0). For each size of prefill a request runs once by itself in the first rows, slot and pages of
a clean state, and once in the last rows, high slots and scattered pages among others that are
longer, with NaN in whatever nobody owns. A difference says that this device can't promise exact
mode; agreement is evidence, not proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from bailing_jax import runtime
from bailing_jax.batch import BatchLayout, pack
from bailing_jax.config import ModelConfig
from bailing_jax.engine.engine import EngineLimits
from bailing_jax.engine.sizes import max_segments, prefill_rows, prefill_size
from bailing_jax.engine.warming import compile_all
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.layer_plan import layer_plan
from bailing_jax.loading import LoadedModel
from bailing_jax.model import BailingForCausalLM
from bailing_jax.row import Row
from bailing_jax.state import DecodeState, StateSpec, leaf_shapes

RunStep = Callable[[DecodeState, BatchLayout], tuple[jax.Array, DecodeState]]
_DECODE_STEPS = 3
# The prompt of the longest neighbour, where the model takes it: it reaches into a second KV block.
_LONG = 300


@dataclass
class _Run:
    """A request on its way: its tokens and places, and the bits it has left so far."""

    tokens: list[int]
    num_prompt: int
    slot: int
    pages: list[int]
    done: int = 0
    bits: list[np.ndarray] = field(default_factory=list)

    def row(self, count: int) -> Row:
        return Row(self.tokens[self.done : self.done + count], self.slot, self.pages, self.done)


def require_exact(loaded: LoadedModel) -> None:
    """Refuse exact mode where a freshly loaded model fails the check; CPUs are known to be exact.

    Raises:
        UserError: what differed.
    """
    if not loaded.runtime.exact or runtime.platform() == "cpu":
        return
    if loaded.placement is not None:
        raise UserError(
            f"batch_invariant = True: not checked on several {runtime.platform()} devices",
            "Leave batch_invariant or mesh out.",
            EXIT_USAGE,
            options=("batch_invariant", "mesh"),
        )
    problem = find_difference(loaded.model, loaded.config, loaded.limits, loaded.state_spec)
    if problem is not None:
        raise UserError(
            f"batch_invariant = True: not exact on this {runtime.platform()}: {problem}",
            "Leave batch_invariant out, or run on a CPU.",
            EXIT_USAGE,
            options=("batch_invariant",),
        )


def find_difference(
    model: BailingForCausalLM,
    config: ModelConfig,
    limits: EngineLimits,
    spec: StateSpec,
    compiler_options: dict[str, str | bool] | None = None,
) -> str | None:
    """What of a request differs in company at the engine's sizes; None where nothing does.

    `compiler_options` are XLA's, for the programs compared; None is what the engine compiles with.
    """
    graphdef, params = nnx.split(model)

    def step(params, state, layout):
        merged = nnx.merge(graphdef, params)
        x, state, _ = merged(state, layout)
        return merged.logits(x[layout.logit_rows]), state

    jitted = jax.jit(step, donate_argnums=1)
    checks = [_Check(config, limits, spec, rows) for rows in prefill_rows(limits)]
    leaves: Any = leaf_shapes(config, checks[0].spec)
    shapes = DecodeState(leaves)
    programs: dict[int, jax.stages.Compiled] = {}

    def compile_size(rows: int) -> None:
        lowered = jitted.lower(params, shapes, _layout(limits, [], [], rows))
        programs[rows] = lowered.compile(compiler_options)

    sizes = (0, *prefill_rows(limits))
    compile_all({str(rows): partial(compile_size, rows) for rows in sizes}, lambda _line: None)

    def run(state: DecodeState, layout: BatchLayout) -> tuple[jax.Array, DecodeState]:
        return programs[layout.num_prefill](params, state, layout)

    for check in checks:
        problem = check.compare(run)
        if problem is not None:
            return problem
    return None


def _layout(
    limits: EngineLimits, decodes: Sequence[Row], segments: Sequence[Row], rows: int
) -> BatchLayout:
    """A prefill call of so many rows, or with 0 a decode call."""
    return pack(
        decodes,
        segments,
        num_decode=0 if rows else limits.max_num_seqs,
        num_prefill=rows,
        num_segments=max_segments(limits) if rows else 0,
        page_size=limits.page_size,
        pages_a_sequence=limits.pages_a_sequence,
    )


class _Check:
    """The two runs, over one pool that is just large enough for them.

    `rows` is the size of the prefill call that takes the request's prompt.
    """

    def __init__(
        self, config: ModelConfig, limits: EngineLimits, spec: StateSpec, rows: int
    ) -> None:
        self.limits, self.config = limits, config
        self.recurrent = [layer.attention == "lightning" for layer in layer_plan(config)]
        room = limits.max_model_len - _DECODE_STEPS
        self.rows = rows
        self.num_prompt = max(1, min(rows, room) * 2 // 3)
        # Each of the others prefills in calls of its own, so its prompt may be a whole chunk.
        self.other_prompt = max(1, min(limits.prefill_chunk, room))
        self.long_prompt = max(1, min(max(limits.prefill_chunk, _LONG), room))
        self.pages_each = -(-(self.long_prompt + _DECODE_STEPS) // limits.page_size)
        num_seqs = limits.max_num_seqs
        self.spec = replace(spec, num_slots=num_seqs + 1, num_pages=num_seqs * self.pages_each + 1)

    def compare(self, run: RunStep) -> str | None:
        """The first thing that differs, or None."""
        self.run = run
        tokens = self._tokens(0, self.num_prompt)
        alone = _Run(tokens, self.num_prompt, 1, list(range(1, 1 + self.pages_each)))
        self._play(alone, [])
        order = np.random.default_rng(1).permutation(np.arange(1, self.spec.num_pages)).tolist()
        places = [order[i :: self.limits.max_num_seqs] for i in range(self.limits.max_num_seqs)]
        others = []
        for slot in range(1, self.limits.max_num_seqs):
            length = self.long_prompt if slot == 1 else self.other_prompt
            others.append(_Run(self._tokens(slot, length), length, slot, places[slot - 1]))
        company = _Run(tokens, self.num_prompt, self.limits.max_num_seqs, places[-1])
        self._play(company, others)
        names = ["the logits after its prompt"]
        names += [f"the logits of decode step {i + 1}" for i in range(_DECODE_STEPS)]
        names += [f"the state of layer {layer}" for layer in range(len(self.recurrent))]
        for name, a, b in zip(names, alone.bits, company.bits, strict=True):
            if not np.array_equal(a, b):
                return f"{name} changed in company"
        return None

    def _tokens(self, seed: int, num_prompt: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return rng.integers(0, self.config.vocab_size, num_prompt + _DECODE_STEPS).tolist()

    def _play(self, run: _Run, others: Sequence[_Run]) -> None:
        """Prefill the others, then `run` behind a short piece of company; decode all together."""
        self.state = self._spoiled()
        for other in others:
            while (left := other.num_prompt - other.done) > 0:
                count = min(left, self.limits.prefill_chunk)
                rows = prefill_size(self.limits, count).prefill_rows
                self._prefill([other], [count], rows)
        # Company in the very call: a new sequence in the slot and pages of one that is done.
        before = []
        room = self.rows - run.num_prompt
        if others and room and max_segments(self.limits) > 1:
            gone = others[-1]
            tokens = gone.tokens[: min(room, gone.num_prompt)]
            before = [_Run(tokens, len(tokens), gone.slot, gone.pages)]
            others = [*others[:-1], before[0]]
        pieces = [*before, run]
        logits = self._prefill(pieces, [piece.num_prompt for piece in pieces], self.rows)
        run.bits.append(_bits(logits[len(before)]))
        for _ in range(_DECODE_STEPS):
            rows = [other for other in others if other.done < len(other.tokens)] + [run]
            run.bits.append(_bits(self._step(rows, [], 0)[len(rows) - 1]))
        for is_slots, leaf in zip(self.recurrent, self.state.layers, strict=True):
            array = np.asarray(leaf)[run.slot if is_slots else np.array(run.pages)]
            if not is_slots:
                array = array.reshape(-1, *array.shape[2:])[: run.done]
            run.bits.append(_bits(array))

    def _spoiled(self) -> DecodeState:
        """A state with NaN in every slot and page, NULL excepted: everybody is still fresh."""
        # Made by numpy: each jax operation of its own would be one more program to compile.
        leaves = [
            np.full(leaf.shape, np.nan, leaf.dtype) for leaf in leaf_shapes(self.config, self.spec)
        ]
        for leaf in leaves:
            leaf[0] = 0
        return DecodeState(tuple(jax.device_put(leaf) for leaf in leaves))

    def _prefill(self, runs: Sequence[_Run], counts: Sequence[int], rows: int) -> np.ndarray:
        return self._step([], list(zip(runs, counts, strict=True)), rows)

    def _step(
        self, decodes: Sequence[_Run], segments: Sequence[tuple[_Run, int]], rows: int
    ) -> np.ndarray:
        layout = _layout(
            self.limits,
            [run.row(1) for run in decodes],
            [run.row(count) for run, count in segments],
            rows,
        )
        logits, self.state = self.run(self.state, layout)
        for run, count in [*((run, 1) for run in decodes), *segments]:
            run.done += count
        return np.asarray(logits)


def _bits(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)
