"""The compiled programs: everything the engine runs on a device.

The model is split once into a flat tuple of arrays and merged inside each trace, so a call walks
no module tree. The state is donated: a step updates it in place. A step picks its tokens itself;
one that only decodes is a loop whose bound is an argument, so that one program runs one step or
several, with the same bits. On a mesh of several shards, layouts, knobs, ends and what comes of
them have a leading axis [shards, ...]; `spread` sees to the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bailing_jax.batch import BatchLayout
from bailing_jax.engine import sampler
from bailing_jax.engine.limits import DECODE_STEPS
from bailing_jax.engine.sampler import Edits, Knobs, Refined
from bailing_jax.engine.spread import Kind, Spread
from bailing_jax.model import BailingForCausalLM
from bailing_jax.placement import Placement
from bailing_jax.state import DecodeState, StateSpec

# Stop ids the device looks at. Of a request with more, the host drops what came after its stop.
STOP_IDS = 8
# In the tokens of a decode call: this row had ended before.
NOTHING = -1


class Ends(NamedTuple):
    """When the D rows of a decode call are over.

    Attributes:
        room: int32 [D], tokens that may still come; 0 for padding.
        stop_ids: int32 [D, STOP_IDS], padded with -1.
    """

    room: np.ndarray | jax.Array
    stop_ids: np.ndarray


class Behind(NamedTuple):
    """Where the D rows of a decode call stand behind it: all that the next call of them needs.

    Attributes:
        tokens: int32 [D], the next token of each.
        contexts: int32 [D], its position.
        room: int32 [D], tokens that may still come.
    """

    tokens: jax.Array
    contexts: jax.Array
    room: jax.Array


class StepResult(NamedTuple):
    """What a step leaves; of several shards with an axis [shards, ...] in front, but for the state.

    Attributes:
        tokens: int32 [steps, B], B = D + P the sequences of the layout: what each picked in each
            step; NOTHING for decode rows that had ended (their count is `steps` at most);
            `sampler.NOT_FINITE` where there was nothing to pick, which ends a decode row.
        logits: float32 [B, vocab] of the last step that ran.
        state: the new state.
        behind: of a call that only decodes.
    """

    tokens: jax.Array
    logits: jax.Array
    state: DecodeState
    behind: Behind | None = None


class Programs:
    """Jitted functions over one model's parameters; each compiles once for a layout's sizes.

    Args:
        model: its parameters lie where `placement` says.
        placement: None on one device.
    """

    def __init__(self, model: BailingForCausalLM, placement: Placement | None = None) -> None:
        graphdef, params = nnx.split(model)
        leaves, treedef = jax.tree.flatten(params)
        self._leaves: tuple[Any, ...] = tuple(leaves)
        self._spread = spread = Spread(model, self._leaves, placement)

        def merged(leaves: tuple[jax.Array, ...]) -> BailingForCausalLM:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

        def all_logits(leaves, state, layout):
            model = merged(leaves)
            x, state, _ = model(state, layout)
            return model.logits(layout.prefill_rows(x)), state

        def fold(leaves, state, layout):
            return (merged(leaves)(state, layout)[1],)

        def hidden_states(leaves, state, layout):
            _, state, stream = merged(leaves)(state, layout)
            rows = [layout.prefill_rows(x).astype(jnp.float32) for x in stream]
            return jnp.stack(rows), state

        def token_logprobs(leaves, state, layout, targets):
            logits, state = all_logits(leaves, state, layout)
            chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            return chosen - jax.nn.logsumexp(logits, axis=1), state

        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}
        self._refiners: dict[int, jax.stages.Compiled] = {}
        self._refine = spread.replicated(sampler.refine)
        step = (Kind.LEAVES, Kind.STATE, Kind.ROWS, Kind.ROWS)
        picked = (Kind.GATHERED, Kind.ROWS, Kind.STATE)
        self._mixed = spread.jit(_mixed(merged), step, picked)
        self._decode = spread.jit(
            _decode(merged), (*step, Kind.ROWS, Kind.SAME), (*picked, Kind.ROWS)
        )
        read = (Kind.LEAVES, Kind.STATE, Kind.ROWS)
        self._fold = spread.jit(fold, read, (Kind.STATE,))
        scores = (Kind.FIRST, Kind.STATE)
        self._all_logits = spread.jit(all_logits, read, scores)
        self._hidden_states = spread.jit(hidden_states, read, scores)
        self._token_logprobs = spread.jit(token_logprobs, (*read, Kind.ROWS), scores)

    @property
    def leaves(self) -> tuple[Any, ...]:
        """The model's parameters, in the order the programs take them."""
        return self._leaves

    def new_state(self, spec: StateSpec) -> DecodeState:
        """A state of zeros, where the programs want it; `spec` is one shard's."""
        return self._spread.new_state(spec)

    def step(
        self,
        state: DecodeState,
        layout: BatchLayout,
        knobs: Knobs,
        ends: Ends | None = None,
        num_steps: int = 1,
    ) -> StepResult:
        """Run one step, or up to num_steps of a layout that only decodes.

        The first step of each size compiles.

        Args:
            state: donated.
            layout: the first step.
            knobs: of D + P rows.
            ends: of D rows; needed without prefill rows, and only there.
            num_steps: up to DECODE_STEPS; pages for that many tokens must be in the layout.
        """
        self.compile_step(state, layout)
        compiled = self._compiled[_size(layout)]
        rows = self._spread.put((layout, knobs, ends))
        more = rows[:2] if layout.num_prefill else (*rows, np.int32(num_steps))
        return StepResult(*self._spread.settled(compiled(self._leaves, state, *more)))

    def compile_step(self, state: DecodeState, layout: BatchLayout) -> None:
        """Compile the step of this layout's size without running it."""
        if self.has_step(layout):
            return
        lowered = self.trace_step(self._leaves, state, layout).lower()
        self._compiled[_size(layout)] = lowered.compile(self.compiler_options(layout))

    def compiler_options(self, layout: BatchLayout) -> dict[str, str | bool] | None:
        """What XLA is told for the step of this layout's size."""
        return self._spread.compiler_options(layout.tokens.size)

    def trace_step(
        self, leaves: tuple[Any, ...], state: DecodeState, layout: BatchLayout
    ) -> jax.stages.Traced:
        """The program of this layout's size, traced.

        Args:
            leaves: the parameters as in `leaves`, or shapes in their place.
            state: arrays or shapes.
            layout: of several shards with their axis in front.
        """
        knobs = self._spread.for_all(sampler.knobs(layout.logit_rows.shape[-1], (), ()))
        ends = self._spread.for_all(no_ends(layout.num_decode))
        layout, knobs, ends = self._spread.put((layout, knobs, ends))
        if layout.num_prefill:
            return self._mixed.trace(leaves, state, layout, knobs)
        return self._decode.trace(leaves, state, layout, knobs, ends, np.int32(1))

    def has_step(self, layout: BatchLayout) -> bool:
        """Whether the step of this layout's size is compiled."""
        return _size(layout) in self._compiled

    def refine(
        self,
        logits: jax.Array,
        tokens: np.ndarray,
        edits: Edits,
        knobs: Knobs,
        positions: np.ndarray | jax.Array,
    ) -> Refined:
        """See `sampler.refine`; of one shard's rows."""
        self.compile_refine(*logits.shape)
        logits = self._spread.whole(logits)
        return Refined(*self._refiners[logits.shape[0]](logits, tokens, edits, knobs, positions))

    def has_refine(self, rows: int) -> bool:
        """Whether `refine` is compiled for steps of so many sequences."""
        return rows in self._refiners

    def compile_refine(self, rows: int, vocab: int) -> None:
        """Compile `refine` for steps of so many sequences."""
        if rows not in self._refiners:
            logits = np.zeros((rows, vocab), np.float32)
            none = np.zeros(rows, np.int32)
            lowered = self._refine.lower(
                logits,
                none,
                sampler.edits(logits.shape, (), ()),
                sampler.knobs(rows, (), ()),
                none,
            )
            self._refiners[rows] = lowered.compile()

    def fold(self, state: DecodeState, layout: BatchLayout) -> DecodeState:
        """Only the new state."""
        return self._read(self._fold, state, layout)[0]

    def all_logits(self, state: DecodeState, layout: BatchLayout) -> tuple[jax.Array, DecodeState]:
        """Logits float32 [T, vocab] of prefill rows; of several shards the first's, [1, ...]."""
        return self._read(self._all_logits, state, layout)

    def hidden_states(
        self, state: DecodeState, layout: BatchLayout
    ) -> tuple[jax.Array, DecodeState]:
        """The residual stream float32 [layers + 1, T, d] of every prefill row; see `all_logits`."""
        return self._read(self._hidden_states, state, layout)

    def token_logprobs(
        self, state: DecodeState, layout: BatchLayout, targets: np.ndarray | jax.Array
    ) -> tuple[jax.Array, DecodeState]:
        """Log probability float32 [T] of targets int32 [T] after every prefill row.

        Of several shards: targets [shards, T] and the first's result, [1, T].
        """
        return self._read(self._token_logprobs, state, layout, targets)

    def slot_states(self, leaf: jax.Array, slot: int) -> np.ndarray:
        """What the first shard keeps in a slot of a leaf of the state."""
        return np.asarray(self._spread.whole(leaf[slot]))

    def _read(self, program: Any, state: DecodeState, *rows: Any) -> Any:
        """Run a program that takes nothing but rows."""
        return self._spread.settled(program(self._leaves, state, *self._spread.put(rows)))


def go_on(layout: BatchLayout, ends: Ends, behind: Behind) -> tuple[BatchLayout, Ends]:
    """Layout and ends of the next call of the same rows, whose tokens only the device knows yet.

    Positions are not among what it needs: a decode call makes them from the contexts.
    """
    layout = replace(layout, tokens=behind.tokens, decode_contexts=behind.contexts)
    return layout, ends._replace(room=behind.room)


def no_ends(rows: int) -> Ends:
    """The ends of rows that nobody decodes in."""
    return Ends(np.zeros(rows, np.int32), np.full((rows, STOP_IDS), NOTHING, np.int32))


def _run(merged, leaves, state, layout, knobs):
    """One step: logits of every sequence's last row, the tokens picked from them, the state."""
    model = merged(leaves)
    x, state, _ = model(state, layout)
    logits = model.logits(x[layout.logit_rows])
    # A token's position is one behind the row it follows.
    tokens = sampler.pick(logits, knobs, layout.positions[layout.logit_rows] + 1)
    return logits, tokens, state


def _mixed(merged):
    """A step with prefill rows."""

    def mixed(leaves, state, layout, knobs):
        logits, tokens, state = _run(merged, leaves, state, layout, knobs)
        return tokens[None], logits, state

    return mixed


def _decode(merged):
    """Decode steps until num_steps ran or every row has ended.

    A row that has ended names NULL from then on: it reads and writes no slot and no page.
    """

    def decode(leaves, state, layout, knobs, ends, num_steps):
        rows = layout.num_decode

        def one_step(carry):
            i, _, tokens, contexts, room, found, _, state = carry
            alive = room > 0
            here = replace(
                layout,
                tokens=tokens,
                positions=jnp.where(alive, contexts, 0),
                decode_slots=jnp.where(alive, layout.decode_slots, 0),
                decode_pages=jnp.where(alive[:, None], layout.decode_pages, 0),
                decode_contexts=jnp.where(alive, contexts, 0),
            )
            logits, tokens, state = _run(merged, leaves, state, here, knobs)
            found = found.at[i].set(jnp.where(alive, tokens, NOTHING))
            stops = (tokens[:, None] == ends.stop_ids).any(axis=1) | (tokens < 0)
            room = jnp.where(alive & ~stops, room - 1, 0)
            tokens = jnp.where(room > 0, tokens, 0)
            return i + 1, is_busy(room), tokens, contexts + 1, room, found, logits, state

        def is_busy(room):
            # Devices share each step, so all of them go on until nobody has anything to do.
            return model.parallel.any_shard((room > 0).any())

        def goes_on(carry):
            i, busy = carry[:2]
            return (i < num_steps) & busy

        model = merged(leaves)
        start = (
            jnp.int32(0),
            is_busy(jnp.asarray(ends.room)),
            jnp.asarray(layout.tokens),
            jnp.asarray(layout.decode_contexts),
            jnp.asarray(ends.room),
            jnp.full((DECODE_STEPS, rows), NOTHING, jnp.int32),
            jnp.zeros((rows, model.config.vocab_size), jnp.float32),
            state,
        )
        _, _, *behind, found, logits, state = jax.lax.while_loop(goes_on, one_step, start)
        return found, logits, state, Behind(*behind)

    return decode


def _size(layout: BatchLayout) -> tuple[int, ...]:
    """What tells one step program from another; the engine's state never changes shape."""
    segments = layout.segment_slots.shape[-1]
    return layout.num_decode, layout.num_prefill, segments, layout.decode_pages.shape[-1]
