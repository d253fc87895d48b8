"""Programs of several shards, made of those of one device: they run one after the other.

Takes and gives what sharded programs do: arrays with the shard in front, and a state whose leaves
are the shards' laid side by side along the first axis. What an engine does with several shards can
be tested so without any mesh, and each shard's numbers are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bailing_jax.batch import BatchLayout
from bailing_jax.config import ModelConfig
from bailing_jax.engine.engine import Engine
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.programs import Behind, Ends, StepResult
from bailing_jax.engine.sampler import Knobs
from bailing_jax.engine.scoring import Scorer
from bailing_jax.state import DecodeState, StateSpec, allocate


class LoopedPrograms:
    """Stands where `Programs` of several shards stand.

    Args:
        each: the programs of each shard; the same ones, where they hold no state.
    """

    def __init__(self, each: Sequence[Any]) -> None:
        self.each = each

    def step(
        self,
        state: DecodeState,
        layout: BatchLayout,
        knobs: Knobs,
        ends: Ends | None = None,
        num_steps: int = 1,
    ) -> StepResult:
        parts = self._parts(state)
        results = [
            programs.step(part, *self._of(shard, (layout, knobs, ends)), num_steps)
            for shard, (programs, part) in enumerate(zip(self.each, parts, strict=True))
        ]
        behind = None
        if results[0].behind is not None:
            arrays = zip(*(r.behind for r in results), strict=True)
            behind = Behind(*(np.stack(array) for array in arrays))  # pyright: ignore
        return StepResult(
            np.stack([r.tokens for r in results]),  # pyright: ignore
            np.stack([r.logits for r in results]),  # pyright: ignore
            self._joined([r.state for r in results]),
            behind,
        )

    def compile_step(self, state: DecodeState, layout: BatchLayout) -> None:
        self.each[0].compile_step(self._parts(state)[0], *self._of(0, (layout,)))

    def has_step(self, layout: BatchLayout) -> bool:
        return self.each[0].has_step(*self._of(0, (layout,)))

    def refine(self, *args: Any) -> Any:
        return self.each[0].refine(*args)

    def has_refine(self, rows: int) -> bool:
        return self.each[0].has_refine(rows)

    def compile_refine(self, rows: int, vocab: int) -> None:
        self.each[0].compile_refine(rows, vocab)

    def fold(self, state: DecodeState, layout: BatchLayout) -> DecodeState:
        parts = enumerate(self._parts(state))
        return self._joined([self.each[i].fold(p, *self._of(i, (layout,))) for i, p in parts])

    def all_logits(self, state: DecodeState, layout: BatchLayout) -> Any:
        return self._scored("all_logits", state, layout)

    def hidden_states(self, state: DecodeState, layout: BatchLayout) -> Any:
        return self._scored("hidden_states", state, layout)

    def token_logprobs(self, state: DecodeState, layout: BatchLayout, targets: Any) -> Any:
        return self._scored("token_logprobs", state, layout, targets)

    def slot_states(self, leaf: Any, slot: int) -> np.ndarray:
        return np.asarray(leaf[slot])

    def _scored(self, name: str, state: DecodeState, *args: Any) -> Any:
        results = [
            getattr(self.each[shard], name)(part, *self._of(shard, args))
            for shard, part in enumerate(self._parts(state))
        ]
        return np.stack([r[0] for r in results]), self._joined([r[1] for r in results])

    def _of(self, shard: int, trees: Any) -> Any:
        """A shard's part of arrays that all have the shards in front."""
        for leaf in jax.tree.leaves(trees):
            assert leaf.shape[0] == len(self.each), leaf.shape
        return jax.tree.map(lambda leaf: leaf[shard], trees)

    def _parts(self, state: DecodeState) -> list[DecodeState]:
        count = len(self.each)
        split = [leaf.reshape(count, -1, *leaf.shape[1:]) for leaf in map(np.asarray, state.layers)]
        # Copies, which a program may take for its own.
        return [DecodeState(tuple(jnp.array(leaf[i]) for leaf in split)) for i in range(count)]

    def _joined(self, states: Sequence[DecodeState]) -> DecodeState:
        leaves = zip(*(state.layers for state in states), strict=True)
        return DecodeState(tuple(np.concatenate(leaf) for leaf in leaves))  # pyright: ignore


def new_state(config: ModelConfig, num_shards: int) -> Callable[[StateSpec], DecodeState]:
    """Makes the zero states of all shards, side by side."""

    def make(spec: StateSpec) -> DecodeState:
        leaves = allocate(config, spec).layers
        return DecodeState(tuple(jnp.concatenate([leaf] * num_shards) for leaf in leaves))

    return make


def looped_engine(programs: Any, config: ModelConfig, limits: EngineLimits) -> Engine:
    """An engine of `limits.num_shards` shards, in float32, over the programs of one device."""
    made: Any = LoopedPrograms([programs] * limits.num_shards)
    spec = limits.state_spec("float32", "float32")
    return Engine(made, config, limits, spec, new_state(config, limits.num_shards))


def looped_scorer(
    programs: Any, config: ModelConfig, spec: StateSpec, chunk: int, num_shards: int
) -> Scorer:
    """The same of a scorer."""
    made: Any = LoopedPrograms([programs] * num_shards)
    return Scorer(made, config, spec, chunk, num_shards, new_state(config, num_shards))
