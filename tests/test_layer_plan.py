"""Which layer is what, and how fast each lightning head forgets.

Check values were computed by hand from the formula, not by this package.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hf_configs import LINEAR_V2, V2, V2_5, read
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES

from bailing_jax.config import SUPPORTED, ModelConfig
from bailing_jax.layer_plan import LayerSpec, decay_table, layer_plan, slopes
from bailing_jax.presets import PRESETS

# Softmax layers and dense layers of the released models, by their own description.
RELEASED = {
    "ling-mini-2.0": (range(20), 1),
    "ling-flash-2.0": (range(32), 1),
    "ling-1t": (range(80), 4),
    "ring-mini-linear-2.0": ((4, 9, 14, 19), 1),
    "ring-flash-linear-2.0": ((7, 15, 23, 31), 1),
    "ling-2.6-flash": ((7, 15, 23, 31), 1),
    "ling-2.6-1t": ((7, 15, 23, 31, 39, 47, 55, 63, 71, 79), 4),
}
SOFTMAX = {V2: "gqa", LINEAR_V2: "gqa", V2_5: "mla"}


def softmax_layers(plan: tuple[LayerSpec, ...]) -> list[int]:
    return [layer for layer, spec in enumerate(plan) if spec.attention != "lightning"]


def grouped(layers: int, group: int, architecture: str = LINEAR_V2) -> tuple[LayerSpec, ...]:
    changes = {"num_hidden_layers": layers, "layer_group_size": group, "first_k_dense_replace": 0}
    return layer_plan(read(architecture, **changes))


def lightning_config(layers: int, heads: int, offset: int = 0) -> ModelConfig:
    """A model of that depth, head count and offset."""
    return read(
        V2_5,
        num_hidden_layers=layers,
        first_k_dense_replace=0,
        num_attention_heads=heads,
        decay_layer_offset=offset,
    )


# ---- layer kinds


def test_every_supported_preset_has_its_layers_written_down() -> None:
    supported = {
        name
        for name, preset in PRESETS.items()
        if preset.hf_config["architectures"][0] in SUPPORTED  # type: ignore[index]
    }
    assert set(RELEASED) == supported


@pytest.mark.parametrize("name", RELEASED)
def test_r017_layer_kinds_of_the_releases(name: str) -> None:
    config = ModelConfig.from_hf(PRESETS[name].hf_config)
    plan = layer_plan(config)
    softmax, dense = RELEASED[name]
    assert softmax_layers(plan) == list(softmax)
    kinds = {spec.attention for spec in plan} - {"lightning"}
    assert kinds == {SOFTMAX[config.architecture]}
    assert [spec.mlp for spec in plan] == ["dense"] * dense + ["moe"] * (len(plan) - dense)


@pytest.mark.parametrize("architecture", [LINEAR_V2, V2_5])
@pytest.mark.parametrize(
    ("layers", "group", "softmax"),
    [
        (6, 3, [2, 5]),
        (7, 3, [2, 5, 6]),  # trap T13: an incomplete last group is softmax throughout
        (8, 3, [2, 5, 6, 7]),
        (7, 4, [3, 4, 5, 6]),
        (2, 3, [0, 1]),  # no whole group at all
        (3, 3, [2]),
        (1, 1, [0]),
        (4, 1, [0, 1, 2, 3]),
        (5, 2, [1, 3, 4]),
    ],
)
def test_r017_incomplete_last_group(
    architecture: str, layers: int, group: int, softmax: list[int]
) -> None:
    assert softmax_layers(grouped(layers, group, architecture)) == softmax


@given(layers=st.integers(1, 60), group=st.integers(1, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_r017_every_whole_group_ends_in_its_only_softmax_layer(layers: int, group: int) -> None:
    softmax = [spec.attention == "gqa" for spec in grouped(layers, group)]
    assert len(softmax) == layers
    whole = layers // group * group
    for start in range(0, whole, group):
        assert softmax[start : start + group] == [False] * (group - 1) + [True]
    assert all(softmax[whole:])


def test_without_groups_every_layer_is_softmax() -> None:
    assert softmax_layers(layer_plan(read(V2, layer_group_size=3))) == list(range(7))


def test_dense_layers_come_first_whatever_their_attention() -> None:
    plan = layer_plan(read(V2_5, first_k_dense_replace=4))
    kinds = [
        ("lightning", "dense"),
        ("lightning", "dense"),
        ("mla", "dense"),
        ("lightning", "dense"),
    ]
    kinds += [("lightning", "moe"), ("mla", "moe"), ("mla", "moe")]
    assert [(spec.attention, spec.mlp) for spec in plan] == kinds


# ---- slopes


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32, 64])
def test_slopes_of_a_power_of_two_are_one_geometric_series(heads: int) -> None:
    got = slopes(heads)
    assert got.shape == (heads,)
    np.testing.assert_allclose(np.log2(got), -8 * np.arange(1, heads + 1) / heads, rtol=1e-12)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (3, [-4, -8, -2]),
        (5, [-2, -4, -6, -8, -1]),
        (6, [-2, -4, -6, -8, -1, -3]),
        (7, [-2, -4, -6, -8, -1, -3, -5]),
        (12, [*range(-1, -9, -1), -0.5, -1.5, -2.5, -3.5]),
    ],
)
def test_slopes_of_other_counts_borrow_from_the_next_power(
    heads: int, exponents: list[float]
) -> None:
    np.testing.assert_allclose(np.log2(slopes(heads)), exponents, rtol=1e-12)


# ---- decays


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
def test_r001_decay_table_check_values(
    layers: int, heads: int, offset: int, first: float, last: float, late_factor: float
) -> None:
    table = decay_table(lightning_config(layers, heads, offset))
    rtol = TOLERANCES["decay_table"]
    np.testing.assert_allclose(table[0, [0, -1]], [first, last], rtol=rtol)
    # The last lightning layer is the one before the last softmax layer.
    np.testing.assert_allclose(table[layers - 2] / -slopes(heads), late_factor, rtol=rtol)


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    [
        ("ring-mini-linear-2.0", 20, 16),
        ("ring-flash-linear-2.0", 32, 32),
        ("ling-2.6-flash", 32, 32),
        ("ling-2.6-1t", 80, 64),
    ],
)
def test_r001_presets_decay_without_an_offset(name: str, layers: int, heads: int) -> None:
    config = ModelConfig.from_hf(PRESETS[name].hf_config)
    np.testing.assert_array_equal(decay_table(config), decay_table(lightning_config(layers, heads)))


def test_a_model_without_lightning_layers_has_no_decays() -> None:
    with pytest.raises(ValueError, match="no lightning attention"):
        decay_table(read(V2))


@given(layers=st.integers(2, 90), heads=st.integers(1, 70))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_r001_offsets_differ_by_slope_over_depth_in_every_layer(layers: int, heads: int) -> None:
    plain, shifted = (decay_table(lightning_config(layers, heads, offset)) for offset in (0, 1))
    # Never clamped: the first layer of offset 1 decays faster than slope * (1 + 1e-5).
    np.testing.assert_allclose(
        plain.astype(np.float64) - shifted,
        np.tile(slopes(heads) / (layers - 1), (layers, 1)),
        rtol=0,
        atol=2 * TOLERANCES["decay_table"],
    )
    assert (shifted[0] < -slopes(heads) * (1 + 0.5 / (layers - 1))).all()


@given(layers=st.integers(1, 90), heads=st.integers(1, 70), offset=st.integers(0, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_r001_decays_are_float32_negative_and_slow_down_with_depth(
    layers: int, heads: int, offset: int
) -> None:
    table = decay_table(lightning_config(layers, heads, offset))
    assert table.shape == (layers, heads)
    assert table.dtype == np.float32
    assert (table < 0).all()
    assert (np.diff(table, axis=0) > 0).all()
    # Nothing rounds to "no decay" (the last layer is never lightning: it ends a group or a tail).
    assert (np.exp(table[:-1]) < 1).all()


@pytest.mark.parametrize("offset", [0, 1])
def test_r001_one_layer_has_the_undivided_factor(offset: int) -> None:
    table = decay_table(lightning_config(1, 6, offset))
    np.testing.assert_allclose(table[0], -slopes(6) * (1 + 1e-5), rtol=TOLERANCES["decay_table"])


@pytest.mark.parametrize("heads", [3, 4, 12])
def test_r001_only_depth_heads_and_offset_matter(heads: int) -> None:
    """Layers of both kinds are counted; mtp layers, kv heads and widths are not."""
    base = lightning_config(7, heads)
    for changes in itertools.product((0, 1), (1, heads)):
        config = read(
            LINEAR_V2,
            num_attention_heads=heads,
            num_nextn_predict_layers=changes[0],
            num_key_value_heads=changes[1],
            layer_group_size=2 + changes[0],
            hidden_size=64,
        )
        np.testing.assert_array_equal(decay_table(config), decay_table(base))
    deeper = dataclasses.replace(base, num_layers=8)
    assert (decay_table(deeper)[1:7] != decay_table(base)[1:7]).all()
