"""The float64 reference against what it must not share a mistake with.

Hand-computed vectors for each primitive, the stored goldens of the publishers' own code for the
whole model, and laws (later tokens change nothing before them, aliases and extra layers change
nothing at all) on random checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_checkpoints import (
    ARCHITECTURES,
    V2_5,
    draw_config,
    random_tensors,
    tensor_shapes,
    write_checkpoint,
)
from reference_numpy import (
    greedy,
    group_rms_norm,
    layer_kinds,
    lightning,
    lightning_log_decay,
    lightning_slopes,
    mla_scale,
    reference_forward,
    rope_frequencies,
    rotate_half_split,
    rotate_interleaved,
    rotation,
    route,
)
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"

# The publishers' float64 runs leave only the order of summation. linear_v2's came from a framework
# whose float64 exp and RMSNorm are good to float32 only, so it shows float32 constants.
LOGITS_ATOL = {"v2-gqa": 1e-10, "v2_5-mla": 1e-10, "v2_5-mla-bf16": 1e-10, "linear_v2-gqa": 1e-5}

# The README's tolerances: the other arrays were stored by float32 runs.
FLOAT32_ATOL = {
    "v2-gqa": {"all": 1e-4, "greedy": 1e-4, "hidden": 3e-4, "norm": 1e-4, "router": 2e-5},
    "linear_v2-gqa": {"all": 2e-4, "greedy": 2e-4, "hidden": 4e-4, "norm": 2e-4, "router": 3e-5},
    "v2_5-mla": {"all": 2e-4, "greedy": 2e-4, "hidden": 5e-4, "norm": 1e-4, "router": 3e-5},
    "v2_5-mla-bf16": {"all": 1e-4, "greedy": 2e-4, "hidden": 4e-4, "norm": 2e-4, "router": 4e-5},
}
STATE_ATOL = {"v2-gqa": 0.0, "linear_v2-gqa": 8e-4, "v2_5-mla": 3e-3, "v2_5-mla-bf16": 3e-3}

Checkpoint = tuple[dict[str, Any], dict[str, np.ndarray]]


def _wave(shape: tuple[int, ...], phase: float) -> np.ndarray:
    """sin(0.7 i + phase) over the flat index i."""
    return np.sin(0.7 * np.arange(np.prod(shape)) + phase).reshape(shape)


def _load(folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return config, tensors


# ---- primitives


def test_group_rms_norm_counts_groups() -> None:
    got = group_rms_norm(_wave((1, 8), 1.1), np.linspace(1.0, 1.7, 8), 2, 1e-6)
    want = [1.22875189, 1.47696135, 0.99017195, -0.10462833]
    want += [-1.28923039, -1.99574162, -1.78297226, -0.63600585]
    np.testing.assert_allclose(got[0], want, atol=1e-8)


@pytest.mark.parametrize(
    ("offset", "decay", "head_0", "head_1", "total"),
    [
        (
            0,
            [0.95918886, 0.99739918],
            [-1.65334166, -2.7529755, -2.55784195, -1.15971536],
            [0.92503974, 2.52140628, 2.93191604, 1.96349988],
            42.3223474,
        ),
        (
            1,
            [0.93941248, 0.99610133],
            [-1.62453327, -2.66607252, -2.45371621, -1.08733882],
            [0.92516732, 2.51684049, 2.92480425, 1.95718687],
            41.5397730,
        ),
    ],
)
def test_lightning_recurrence(
    offset: int, decay: list[float], head_0: list[float], head_1: list[float], total: float
) -> None:
    q, k, v = (_wave((5, 2, 4), phase) for phase in (0.1, 0.2, 0.3))
    log_decay = lightning_log_decay({"num_hidden_layers": 4, "num_attention_heads": 2}, 1, offset)
    np.testing.assert_allclose(np.exp(log_decay), decay, atol=1e-8)
    o, state = lightning(q, k, v, log_decay, 0.5)
    np.testing.assert_allclose(o[4], [head_0, head_1], atol=1e-8)
    np.testing.assert_allclose(state.sum(), total, atol=1e-7)
    if offset == 0:
        row = [2.22323626, 1.68091619, 0.34803497, -1.14853254]
        np.testing.assert_allclose(state[0, 0], row, atol=1e-8)


@pytest.mark.parametrize(
    ("layers", "heads", "offset", "first", "last", "late_factor"),
    [
        (20, 16, 0, -0.707113852, -0.003906289, 0.052641579),
        (20, 16, 1, -0.744329999, -0.004111881, 0.105273158),
        (32, 32, 0, -0.840904824, -0.003906289, 0.032268065),
        (32, 32, 1, -0.868030515, -0.004032297, 0.064526129),
        (80, 64, 0, -0.917013213, -0.003906289, 0.012668228),
        (80, 64, 1, -0.928620859, -0.003955735, 0.025326456),
    ],
)
def test_decay_table(
    layers: int, heads: int, offset: int, first: float, last: float, late_factor: float
) -> None:
    config = {"num_hidden_layers": layers, "num_attention_heads": heads}
    got = lightning_log_decay(config, 0, offset)
    np.testing.assert_allclose(got[[0, -1]], [first, last], atol=1e-9)
    factor = -lightning_log_decay(config, layers - 2, offset) / lightning_slopes(heads)
    np.testing.assert_allclose(factor, late_factor, atol=1e-9)


def test_slopes_of_other_head_counts_borrow_from_the_next_power_of_two() -> None:
    np.testing.assert_allclose(lightning_slopes(3), [2**-4, 2**-8, 2**-2])
    np.testing.assert_allclose(lightning_slopes(6)[4:], [2**-1, 2**-3])
    np.testing.assert_allclose(lightning_slopes(1), [2**-8])


def test_router() -> None:
    config = {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    bias = np.array([0.05 * (7 * i % 5) - 0.1 for i in range(16)])
    got = route(2 * _wave((1, 16), 0.9), bias, config)
    assert got.ids.tolist() == [[1, 2, 9, 11]]
    want = [0.65919003, 0.61097486, 0.62141692, 0.60841819]
    np.testing.assert_allclose(got.weights[0], want, atol=1e-8)
    # The second kept and the first dropped group lie further apart than the experts do.
    assert 0 < got.margin < 1.69311497 - 0.86389503


def test_router_masks_dropped_groups_below_negative_scores() -> None:
    config = {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0}
    got = route(np.array([[0.0, 0.1, 2.0, -3.0]]), np.array([-2.0, -2.0, -2.9, -2.9]), config)
    assert got.ids.tolist() == [[0, 1]]
    # Group scores sigmoid(0) + sigmoid(0.1) - 4 and sigmoid(2) + sigmoid(-3) - 5.8.
    np.testing.assert_allclose(got.margin, -2.9750208 + 4.8717779, atol=1e-6)


def test_one_expert_keeps_its_score() -> None:
    config = {"num_experts_per_tok": 1, "n_group": 0, "routed_scaling_factor": 2.5}
    got = route(np.array([[0.0, -1.0, -2.0]]), np.zeros(3), config)
    np.testing.assert_allclose(got.weights, [[1.25]])


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("theta", "want"),
    [
        (6e5, [1, 3.59304112e-2, 6.81072400e-3, 8.60662966e-4, 8.15707046e-5, 6.31474743e-7]),
        (6e6, [1, 2.02051550e-2, 2.33354753e-3, 1.78608627e-4, 1.45075968e-5, 6.78587702e-8]),
    ],
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_yarn_frequencies(theta: float, want: list[float], place: str) -> None:
    config = {"max_position_embeddings": 131072, "rope_theta": theta, place: YARN}
    frequencies, attention_factor = rope_frequencies(config, 64)
    np.testing.assert_allclose(frequencies[[0, 8, 12, 16, 20, 31]], want, rtol=1e-8)
    np.testing.assert_allclose(attention_factor, 1.13862944, atol=1e-8)


@pytest.mark.parametrize(
    ("extra", "attention_factor", "scale"),
    [
        ({}, 1.13862944, 0.07216878),
        ({"mscale_all_dim": 1}, 1.13862944, 0.09356517),
        ({"mscale": 1, "mscale_all_dim": 1}, 1.0, 0.09356517),
        ({"mscale": 0.5, "mscale_all_dim": 0}, 1.13862944, 0.07216878),
        ({"mscale": 2, "mscale_all_dim": 1}, 1.27725887 / 1.13862944, 0.09356517),
        ({"attention_factor": 1.5, "mscale_all_dim": 1}, 1.5, 0.09356517),
    ],
)
def test_yarn_scales(extra: dict[str, float], attention_factor: float, scale: float) -> None:
    config = {"rope_theta": 6e5, "rope_scaling": YARN | extra}
    config |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    np.testing.assert_allclose(rope_frequencies(config, 64)[1], attention_factor, atol=1e-8)
    np.testing.assert_allclose(mla_scale(config), scale, atol=1e-8)


def test_both_rope_layouts_are_one_rotation_of_permuted_channels() -> None:
    x = _wave((5, 3, 8), 0.2)
    turn = rotation({"rope_theta": 100.0}, 8, 5)
    split = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    got = rotate_half_split(split, turn)
    interleaved = rotate_interleaved(x, turn)
    np.testing.assert_allclose(got[..., :4], interleaved[..., 0::2])
    np.testing.assert_allclose(got[..., 4:], interleaved[..., 1::2])
    # Channel 0 of pair (0, 1) at position 1, angle 1.
    want = x[1, :, 0] * np.cos(1.0) - x[1, :, 1] * np.sin(1.0)
    np.testing.assert_allclose(interleaved[1, :, 0], want)


def test_incomplete_last_group_is_softmax() -> None:
    config = {"architectures": [V2_5], "num_hidden_layers": 8, "layer_group_size": 3}
    assert layer_kinds(config) == ["lightning", "lightning", "mla"] * 2 + ["mla"] * 2
    config["num_hidden_layers"] = 2
    assert layer_kinds(config) == ["mla"] * 2


# ---- whole model


@pytest.mark.parametrize("name", LOGITS_ATOL)
def test_goldens(name: str) -> None:
    config, tensors = _load(GOLDEN / name)
    atol = FLOAT32_ATOL[name]
    with np.load(GOLDEN / name / "golden.npz") as stored:
        golden = dict(stored)
    for p in range(7):
        got = reference_forward(config, tensors, golden[f"prompt_{p}"], decay_layer_offset=1)
        want = golden["f64_last_logits"][p]
        np.testing.assert_allclose(got.logits[-1], want, rtol=0, atol=LOGITS_ATOL[name])
        np.testing.assert_allclose(got.router_margin, golden["router_margin"][p], atol=1e-5)
        if p in (1, 6):
            for layer, state in got.states.items():
                want = golden[f"state_{p}_layer{layer}"]
                np.testing.assert_allclose(state, want, rtol=0, atol=STATE_ATOL[name])
        if p == 1:
            np.testing.assert_allclose(got.logits, golden["all_logits_1"], rtol=0, atol=atol["all"])
        if p == 4:
            np.testing.assert_allclose(got.hidden, golden["hidden_4"], rtol=0, atol=atol["hidden"])
            want = golden["final_norm_4"]
            np.testing.assert_allclose(got.final_norm, want, rtol=0, atol=atol["norm"])
            assert len(got.router) == config["num_hidden_layers"] - config["first_k_dense_replace"]
            for layer, (ids, weights) in got.router.items():
                np.testing.assert_array_equal(ids, golden[f"router_ids_4_layer{layer}"])
                want = golden[f"router_weights_4_layer{layer}"]
                np.testing.assert_allclose(weights, want, rtol=0, atol=atol["router"])


@pytest.mark.parametrize("name", LOGITS_ATOL)
def test_golden_greedy(name: str) -> None:
    config, tensors = _load(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    config["decay_layer_offset"] = 1
    tokens, margin = greedy(config, tensors, golden["prompt_1"], 20)
    assert tokens == golden["greedy_tokens_1"].tolist()
    assert 0 < margin <= golden["greedy_margin_1"].min() + 1e-4
    # The longer prompt in one pass over its known continuation, where each argmax must be the next.
    prompt, following = golden["prompt_4"], golden["greedy_tokens_4"]
    got = reference_forward(config, tensors, [*prompt, *following[:-1]])
    np.testing.assert_array_equal(got.logits[len(prompt) - 1 :].argmax(axis=1), following)
    for layer, state in got.states.items():
        want = golden[f"greedy_state_4_layer{layer}"]
        np.testing.assert_allclose(state, want, rtol=0, atol=1e-3)


# ---- random checkpoints


_RANDOM = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@_RANDOM
@given(config=draw_config(), seed=st.integers(0, 99))
def test_random_checkpoints_run_and_are_causal(config: dict[str, Any], seed: int) -> None:
    tensors = random_tensors(config, seed)
    prompt = np.random.default_rng(seed).integers(0, config["vocab_size"], 17)
    whole = reference_forward(config, tensors, prompt)
    assert np.isfinite(whole.logits).all()
    assert 0.7 < whole.logits.std() < 1.4
    lightning_layers = [i for i, kind in enumerate(layer_kinds(config)) if kind == "lightning"]
    assert list(whole.states) == lightning_layers
    start = reference_forward(config, tensors, prompt[:6])
    np.testing.assert_allclose(start.logits, whole.logits[:6], atol=1e-10)


@_RANDOM
@given(config=draw_config(architectures=(V2_5,)), seed=st.integers(0, 99))
def test_names_and_mtp_change_nothing(config: dict[str, Any], seed: int) -> None:
    tensors = random_tensors(config, seed)
    layers = config["num_hidden_layers"]
    aliases = {
        "gate.expert_bias": ("gate.e_score_correction_bias", "experts.expert_bias")[seed % 2]
    }
    for i, kind in enumerate(layer_kinds(config)):
        if kind == "mla":
            aliases[f"layers.{i}.attention.dense."] = f"layers.{i}.attention.o_proj."
    renamed = {}
    for name, value in tensors.items():
        if name.startswith(f"model.layers.{layers}."):
            continue
        for ours, alias in aliases.items():
            name = name.replace(ours, alias)
        renamed[name] = value
    config["num_nextn_predict_layers"] = 0
    want = reference_forward(config, tensors, [1, 2, 3, 4, 5])
    got = reference_forward(config, renamed, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(got.logits, want.logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
@given(data=st.data())
@settings(max_examples=3, deadline=None, derandomize=True)
def test_written_checkpoint_reads_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: Any, shards: int
) -> None:
    config = data.draw(draw_config(architectures=ARCHITECTURES))
    tensors = random_tensors(config, 5)
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, config, tensors, shards=shards, dtype=dtype)
    read_config, read = _load(folder)
    assert read_config == config | {"torch_dtype": dtype}
    assert {name: value.shape for name, value in read.items()} == tensor_shapes(config)
    for name, value in read.items():
        kept = name.endswith("expert_bias")
        assert value.dtype.name == ("float32" if kept else dtype)
        want = tensors[name].astype(value.dtype)
        np.testing.assert_array_equal(value, want, err_msg=name)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards == 1:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert files[0] == "model-00001-of-00003.safetensors"
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in read.values())
