"""The golden sets decide who is right: logits, hidden states, states, routers, greedy tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from goldens import GOLDEN, LINEAR, NAMES, OVERRIDES, close, golden, layers_of, tolerance

from bailing_jax import LLM, SamplingParams
from bailing_jax.batch import pack
from bailing_jax.engine_options import EngineOptions
from bailing_jax.layer_plan import decay_table, layer_plan
from bailing_jax.loading import load
from bailing_jax.row import Row
from bailing_jax.state import StateSpec, allocate

# `scripts/fuzz_reference.py --quick` holds what XLA optimises against the float64 model.
pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(name: str) -> LLM:
    # One size of prefill to compile, and prompts of one step, of a whole number of them and of a
    # rest.
    return LLM(
        GOLDEN / name, dtype="float32", max_num_seqs=2, prefill_chunk=64, hf_overrides=OVERRIDES
    )


def test_logits_of_every_prompt(llm: LLM, name: str) -> None:
    arrays = golden(name)
    for i, length in enumerate(arrays["prompt_lens"]):
        logits = llm.logits(arrays[f"prompt_{i}"])
        assert logits.shape == (length, llm.config.vocab_size)
        close(name, "last_logits", logits[-1], arrays["last_logits"][i])
        close(name, "last_logits", logits[-1], arrays["f64_last_logits"][i])
        if i == 1:
            close(name, "all_logits", logits, arrays["all_logits_1"])


def test_hidden_states_layer_by_layer(llm: LLM, name: str) -> None:
    arrays = golden(name)
    close(name, "hidden", llm.hidden_states(arrays["prompt_4"]), arrays["hidden_4"])


def test_greedy_tokens_of_incremental_decoding(llm: LLM, name: str) -> None:
    arrays = golden(name)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=1)
    prompts = [arrays["prompt_1"], arrays["prompt_4"]]
    first, second = llm.generate([p.tolist() for p in prompts], params)
    assert first.outputs[0].token_ids == arrays["greedy_tokens_1"].tolist()
    assert second.outputs[0].token_ids == arrays["greedy_tokens_4"].tolist()
    want = jax.nn.log_softmax(arrays["greedy_logits_1"])
    for step, (token, entry) in enumerate(
        zip(first.outputs[0].token_ids, first.outputs[0].logprobs or [], strict=True)
    ):
        # A log probability is a logit less a mean of logits: twice the error at most.
        assert abs(entry[token] - want[step, token]) <= 2 * tolerance(name, "greedy_logits")


def test_greedy_logits_by_prefill_of_the_answer(llm: LLM, name: str) -> None:
    arrays = golden(name)
    prompt, answer = arrays["prompt_1"], arrays["greedy_tokens_1"]
    logits = llm.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    close(name, "greedy_logits", logits, arrays["greedy_logits_1"])


def test_recurrent_states_after_prefill(llm: LLM, name: str) -> None:
    if name not in LINEAR:
        assert llm.recurrent_states([1]) == {}
        return
    arrays = golden(name)
    answer = arrays["greedy_tokens_4"][:19]
    for prefix, array, tokens in (
        ("state_1", "state", arrays["prompt_1"]),
        ("state_6", "state", arrays["prompt_6"]),
        ("greedy_state_4", "greedy_state", [*arrays["prompt_4"], *answer]),
    ):
        states = llm.recurrent_states(tokens)
        want = layers_of(name, prefix)
        assert states.keys() == want.keys()
        for layer, state in states.items():
            close(name, array, state, want[layer])


@pytest.mark.parametrize("name", LINEAR)
def test_r005_decoding_goes_on_from_the_prefilled_state(name: str) -> None:
    """Prefill's state read by decode, 19 steps long: layout, decay and position all show."""
    arrays = golden(name)
    loaded = load(GOLDEN / name, EngineOptions(dtype="float32"), OVERRIDES, 0, print)
    spec = StateSpec(num_slots=3, num_pages=4, page_dtype="float32")
    graphdef, params = nnx.split(loaded.model)
    step = jax.jit(lambda params, state, layout: nnx.merge(graphdef, params)(state, layout)[1])
    state = allocate(loaded.config, spec)
    tokens = [*arrays["prompt_4"].tolist(), *arrays["greedy_tokens_4"].tolist()]
    prompt = len(arrays["prompt_4"])
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + 19))]:
        row = Row(tokens[start:stop], 2, [3, 1], start)
        layout = pack(
            [row] if start else [],
            [] if start else [row],
            num_decode=1 if start else 0,
            num_prefill=0 if start else prompt,
            num_segments=0 if start else 1,
            page_size=64,
            pages_a_sequence=2,
        )
        state = step(params, state, layout)
    want = layers_of(name, "greedy_state_4")
    assert want
    for layer, array in want.items():
        close(name, "greedy_state", np.asarray(state.layers[layer][2]), array)


def test_router_choices_layer_by_layer(name: str) -> None:
    arrays = golden(name)
    loaded = load(GOLDEN / name, EngineOptions(dtype="float32"), OVERRIDES, 0, print)
    spec = StateSpec(num_slots=2, num_pages=3, page_dtype="float32")
    prompt = arrays["prompt_4"].tolist()
    layout = pack(
        [],
        [Row(prompt, 1, [1, 2], 0)],
        num_decode=0,
        num_prefill=len(prompt),
        num_segments=1,
        page_size=64,
        pages_a_sequence=2,
    )
    config = loaded.config
    decays = decay_table(config) if config.lightning else np.zeros((config.num_layers, 1))
    graphdef, params = nnx.split(loaded.model)

    @jax.jit
    def choices(params, state):
        model = nnx.merge(graphdef, params)
        _, _, stream = model(state, layout)
        found = {}
        for i, layer_spec in enumerate(layer_plan(config)):
            if layer_spec.mlp == "moe":
                layer = model.model.layers[i]
                h, _ = layer.attend(stream[i], state.layers[i], layout, decays[i])
                found[i] = layer.mlp.gate(layer.post_attention_layernorm(h))
        return found

    found = choices(params, allocate(config, spec))
    want = layers_of(name, "router_ids_4")
    assert found.keys() == want.keys()
    weights = layers_of(name, "router_weights_4")
    for layer, (ids, got) in found.items():
        order = np.argsort(ids, axis=1)
        np.testing.assert_array_equal(np.take_along_axis(np.asarray(ids), order, 1), want[layer])
        close(name, "router_weights", np.take_along_axis(np.asarray(got), order, 1), weights[layer])


@pytest.mark.parametrize("name", LINEAR)
def test_r001_decay_offset_changes_the_answer_as_published(name: str) -> None:
    """Offset 0 gives the other published answer, and the two are far apart."""
    arrays = golden(name)
    llm = LLM(GOLDEN / name, dtype="float32", max_num_seqs=1)
    assert llm.config.decay_layer_offset == 0
    for i in (4, 6):
        last = llm.logits(arrays[f"prompt_{i}"])[-1]
        close(name, "last_logits", last, arrays["alt_slope_idx_last_logits"][i])
        assert np.abs(last - arrays["last_logits"][i]).max() > 10 * tolerance(name, "last_logits")
