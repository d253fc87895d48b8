"""The compiled programs: everything the engine runs on a device.

The model is split once into a flat tuple of arrays and merged inside each trace, so a call walks
no module tree. The state is donated: a step updates it in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.batch import BatchLayout
from bailing_jax.model import BailingForCausalLM
from bailing_jax.state import DecodeState


class Programs:
    """Jitted functions over one model's parameters; each compiles once for a layout's sizes."""

    def __init__(self, model: BailingForCausalLM) -> None:
        graphdef, params = nnx.split(model)
        self._leaves, treedef = jax.tree.flatten(params)
        self._leaves = tuple(self._leaves)

        def merged(leaves: tuple[jax.Array, ...]) -> BailingForCausalLM:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

        def step(leaves, state, layout):
            model = merged(leaves)
            x, state, _ = model(state, layout)
            return model.logits(x[layout.logit_rows]), state

        def all_logits(leaves, state, layout):
            model = merged(leaves)
            x, state, _ = model(state, layout)
            return model.logits(layout.prefill_rows(x)), state

        def fold(leaves, state, layout):
            return merged(leaves)(state, layout)[1]

        def hidden_states(leaves, state, layout):
            _, state, stream = merged(leaves)(state, layout)
            rows = [layout.prefill_rows(x).astype(jnp.float32) for x in stream]
            return jnp.stack(rows), state

        def token_logprobs(leaves, state, layout, targets):
            logits, state = all_logits(leaves, state, layout)
            chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            return chosen - jax.nn.logsumexp(logits, axis=1), state

        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}
        self._step = jax.jit(step, donate_argnums=1)
        self._all_logits = jax.jit(all_logits, donate_argnums=1)
        self._fold = jax.jit(fold, donate_argnums=1)
        self._hidden_states = jax.jit(hidden_states, donate_argnums=1)
        self._token_logprobs = jax.jit(token_logprobs, donate_argnums=1)

    def step(self, state: DecodeState, layout: BatchLayout) -> tuple[jax.Array, DecodeState]:
        """Logits float32 [D + P, vocab] of every sequence's last row, and the new state.

        The first step of each size compiles.
        """
        self.compile_step(state, layout)
        return self._compiled[_size(layout)](self._leaves, state, layout)

    def compile_step(self, state: DecodeState, layout: BatchLayout) -> None:
        """Compile the step of this layout's size without running it."""
        if not self.has_step(layout):
            compiled = self._step.lower(self._leaves, state, layout).compile()
            self._compiled[_size(layout)] = compiled

    def has_step(self, layout: BatchLayout) -> bool:
        """Whether the step of this layout's size is compiled."""
        return _size(layout) in self._compiled

    def fold(self, state: DecodeState, layout: BatchLayout) -> DecodeState:
        """Only the new state."""
        return self._fold(self._leaves, state, layout)

    def all_logits(self, state: DecodeState, layout: BatchLayout) -> tuple[jax.Array, DecodeState]:
        """Logits float32 [T, vocab] of every prefill row."""
        return self._all_logits(self._leaves, state, layout)

    def hidden_states(
        self, state: DecodeState, layout: BatchLayout
    ) -> tuple[jax.Array, DecodeState]:
        """The residual stream float32 [layers + 1, T, d] of every prefill row."""
        return self._hidden_states(self._leaves, state, layout)

    def token_logprobs(
        self, state: DecodeState, layout: BatchLayout, targets: jax.Array
    ) -> tuple[jax.Array, DecodeState]:
        """Log probability float32 [T] of targets int32 [T] after every prefill row."""
        return self._token_logprobs(self._leaves, state, layout, targets)


def _size(layout: BatchLayout) -> tuple[int, ...]:
    """What tells one step program from another; the engine's state never changes shape."""
    segments = layout.segment_slots.shape[0]
    return layout.num_decode, layout.num_prefill, segments, layout.decode_pages.shape[1]
