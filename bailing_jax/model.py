"""The model: embedding, the only loop over layers, final norm, head.

`BailingForCausalLM` is a Flax module whose parameter paths are the checkpoint's names. The engine
splits it once and calls it inside its jitted step: state and layout go in, hidden rows and state
come out, and `logits` reads the rows that are wanted. `build` makes a model from arrays by path. On
several devices all this is one device's share, which runs inside `jax.shard_map`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from bailing_jax.batch import BatchLayout
from bailing_jax.config import ModelConfig
from bailing_jax.layer_plan import decay_table, layer_plan
from bailing_jax.layers.declare import MakeArray, Scope
from bailing_jax.layers.decoder_layer import DecoderLayer
from bailing_jax.layers.linear import Embedding, Linear
from bailing_jax.layers.norms import RMSNorm
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.params import Param, describe
from bailing_jax.sharding import local_config
from bailing_jax.state import DecodeState

# (graphdef, params, x, leaf, layout, log_decay) -> (x, leaf)
RunLayer = Callable[..., tuple[jax.Array, jax.Array]]


class BailingModel(nnx.Module):
    """Everything below the head."""

    def __init__(self, scope: Scope, config: ModelConfig, options: RuntimeOptions) -> None:
        self.word_embeddings = Embedding(scope / "word_embeddings", options.parallel)
        local = local_config(config, options.parallel.tensor)
        self.layers = nnx.List(
            DecoderLayer(scope / "layers" / layer, spec, local, options)
            for layer, spec in enumerate(layer_plan(config))
        )
        self.norm = RMSNorm(scope / "norm", config.norm_eps)


class BailingForCausalLM(nnx.Module):
    """tokens -> hidden rows -> logits."""

    def __init__(self, scope: Scope, config: ModelConfig, options: RuntimeOptions) -> None:
        self.model = BailingModel(scope / "model", config, options)
        self.lm_head = None if config.tie_embeddings else Linear(scope / "lm_head")
        self.config = config
        self.parallel = options.parallel

    def __call__(
        self, state: DecodeState, layout: BatchLayout, run_layer: RunLayer | None = None
    ) -> tuple[jax.Array, DecodeState, list[jax.Array]]:
        """Run every layer over one step.

        Args:
            state: what the layers remember; comes back changed.
            layout: the step.
            run_layer: runs one layer in place of the usual way (training watches the routers).

        Returns:
            The residual stream after the last layer [rows, d] (before the final norm), the new
            state, and the stream before each layer and after the last ([layers + 1] entries).
        """
        x = self.model.word_embeddings(layout.tokens)
        config = self.config
        decays = jnp.asarray(
            decay_table(config) if config.lightning else jnp.zeros((config.num_layers, 1))
        )
        decays = self.parallel.part_of_tensor(decays, axis=1)
        run = run_layer or _run_layer
        stream, leaves = [x], []
        for layer, leaf, log_decay in zip(self.model.layers, state.layers, decays, strict=True):
            x, leaf = run(*nnx.split(layer), x, leaf, layout, log_decay)
            stream.append(x)
            leaves.append(leaf)
        return x, DecodeState(tuple(leaves)), stream

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 logits [rows, vocab] of residual rows [rows, d]."""
        x = self.model.norm(x)
        if self.lm_head is None:
            logits = self.model.word_embeddings.attend(x)
        else:
            logits = self.lm_head(x).astype(jnp.float32)
        return self.parallel.gather_over_tensor(logits, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    x: jax.Array,
    leaf: jax.Array,
    layout: BatchLayout,
    log_decay: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One layer; layers of one kind have equal graphdefs, so each kind is traced once."""
    return nnx.merge(graphdef, params)(x, leaf, layout, log_decay)


def build(config: ModelConfig, options: RuntimeOptions, make: MakeArray) -> BailingForCausalLM:
    """A model whose parameters are `make(param)`."""
    table = {param.path: param for param in describe(config)}
    return BailingForCausalLM(Scope(table, make), config, options)


def abstract(config: ModelConfig, options: RuntimeOptions) -> BailingForCausalLM:
    """The model with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(
        lambda: build(config, options, lambda p: jnp.zeros(p.shape, param_dtype(p, options)))
    )


def param_dtype(param: Param, options: RuntimeOptions) -> jnp.dtype:
    """The dtype a parameter is held in."""
    return jnp.dtype("float32" if param.dtype == "float32" else options.dtype)
