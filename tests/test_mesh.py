"""Mesh shapes, and the table of which device holds what of each parameter. No device."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from bailing_jax import plugins
from bailing_jax.config import ModelConfig
from bailing_jax.errors import UserError
from bailing_jax.layers.lightning_attention import LightningAttention
from bailing_jax.mesh import (
    MeshShape,
    auto_mesh,
    check_devices,
    check_mesh,
    divides,
    meshes,
    tensor_axes,
)
from bailing_jax.params import Param, describe
from bailing_jax.presets import find_preset
from bailing_jax.sharding import (
    AXES,
    axis_sizes,
    global_shape,
    local_config,
    local_shape,
    regions,
    splits,
)
from bailing_jax.state import tensor_axes as state_axes
from pallas_kernels import compat


def config_of(preset: str, **changes: object) -> ModelConfig:
    found = find_preset(preset)
    assert found is not None
    return ModelConfig.from_hf(found.hf_config, changes)


def small(preset: str) -> ModelConfig:
    """Few layers and experts, so that every element can be counted."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 64, "num_experts": 24}
    if preset != "ling-mini-2.0":
        sizes["layer_group_size"] = 2  # one lightning layer, then one of softmax attention
    widths = {"intermediate_size": 32, "moe_intermediate_size": 8, "n_group": 4, "topk_group": 2}
    return config_of(preset, **sizes, **widths, moe_shared_expert_intermediate_size=16)


PRESETS = ("ring-mini-linear-2.0", "ling-mini-2.0", "ling-2.6-flash")


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (None, MeshShape()),
        ("tensor=4", MeshShape(1, 1, 4)),
        ("expert=2, data=3", MeshShape(3, 2, 1)),
        ({"data": 2, "tensor": 8}, MeshShape(2, 1, 8)),
        (str(MeshShape(4, 2, 8)), MeshShape(4, 2, 8)),
    ],
)
def test_a_mesh_is_read_as_it_is_written(value, shape) -> None:
    assert MeshShape.parse(value) == shape


@pytest.mark.parametrize(
    "value", ["", "tensor", "tensor=0", "tensor=-1", "tensor=x", "pipe=2", "data=2,data=2", "=2",
              {"tensor": 2.0}, {"tensor": True}, {"data": 0}],
)  # fmt: skip
def test_anything_else_is_refused(value) -> None:
    with pytest.raises(UserError, match=r"mesh = .*allowed: data=D,expert=E,tensor=T"):
        MeshShape.parse(value)


def test_what_does_not_divide_is_named_with_what_would() -> None:
    config = config_of("ring-mini-linear-2.0")
    with pytest.raises(UserError) as caught:
        check_mesh(config, MeshShape(1, 1, 3))
    assert "tensor=3 does not divide" in caught.value.message
    assert "tensor can be 1, 2, 4, 8, 16" in caught.value.hint
    with pytest.raises(UserError, match="expert=7 does not divide the routed experts"):
        check_mesh(config, MeshShape(1, 7, 1))


def test_too_few_devices_are_refused_with_both_numbers() -> None:
    check_devices(MeshShape(2, 2, 2), 8)
    with pytest.raises(UserError, match="is 8 devices; there are 7"):
        check_devices(MeshShape(2, 2, 2), 7)
    with pytest.raises(UserError, match="there is 1"):
        check_devices(MeshShape(2), 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_auto_uses_every_device(preset: str) -> None:
    config = config_of(preset)
    for devices in (1, 2, 3, 4, 6, 8, 12, 64):
        mesh = auto_mesh(config, devices)
        assert mesh.num_devices == devices
        assert mesh.expert == 1
        assert divides(config, mesh)
        larger = (t for t in range(mesh.tensor + 1, devices + 1) if devices % t == 0)
        assert not any(divides(config, MeshShape(devices // t, 1, t)) for t in larger)


def test_whole_experts_go_first() -> None:
    config = small("ring-mini-linear-2.0")  # 24 experts
    assert tensor_axes(config, MeshShape(1, 1, 8)) == (8, 1)
    assert tensor_axes(config, MeshShape(1, 8, 2)) == (1, 2)
    assert tensor_axes(config, MeshShape(1, 3, 16)) == (8, 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_devices_hold_every_element_once_or_the_same_number_of_times(preset: str) -> None:
    config = small(preset)
    checked = meshes(config, 8) + meshes(config, 6)
    assert len(checked) > 8
    # One of each kind; layers hold many alike.
    params = {(param.axes, param.shape): param for param in describe(config)}
    for mesh, param in itertools.product(checked, params.values()):
        sizes = axis_sizes(config, mesh)
        held = np.zeros(param.shape, int)
        for place in itertools.product(*map(range, sizes.values())):
            boxes = regions(config, param, mesh, dict(zip(AXES, place, strict=True)))
            assert sum(
                int(np.prod([stop - start for start, stop in box])) for box in boxes
            ) == np.prod(local_shape(config, param, mesh))
            for box in boxes:
                held[tuple(slice(*part) for part in box)] += 1
        # Of one axis that holds q, k and v, only k and v may be copied.
        parts = [1, *(c for split in splits(config, param, mesh) for c in split.copies)]
        least = held.min()
        assert set(np.unique(held)) <= {least * copies for copies in parts}, (mesh, param.path)
        whole = mesh.num_devices * np.prod(local_shape(config, param, mesh))
        assert held.sum() == whole
        assert np.prod(global_shape(config, param, mesh)) * least * max(parts) >= whole


def test_q_k_and_v_are_each_divided_by_heads() -> None:
    """Four query heads and two key-value heads of 8 channels: q 0-31, k 32-47, v 48-63."""
    config = config_of(
        "ring-mini-linear-2.0", num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        group_norm_size=2, layer_group_size=2, num_hidden_layers=2,
    )  # fmt: skip
    fused = {p.path: p for p in describe(config) if p.path.endswith("query_key_value.weight")}
    lightning, gqa = fused.values()

    def columns(param, tensor: int, index: int) -> list[tuple[int, int]]:
        mesh = MeshShape(1, 1, tensor)
        whole, width = tensor_axes(config, mesh)
        position = dict(zip(AXES, (0, 0, index // width, index % width), strict=True))
        assert whole * width == tensor
        return [box[1] for box in regions(config, param, mesh, position)]

    assert columns(gqa, 2, 1) == [(16, 32), (40, 48), (56, 64)]
    # With four devices, two neighbours hold the same key and value head.
    assert [columns(gqa, 4, i)[1:] for i in range(4)] == [
        [(32, 40), (48, 56)], [(32, 40), (48, 56)], [(40, 48), (56, 64)], [(40, 48), (56, 64)],
    ]  # fmt: skip
    assert columns(gqa, 4, 2)[0] == (16, 24)
    assert columns(lightning, 4, 3) == [(24, 32), (56, 64), (88, 96)]


def test_a_device_sees_its_share_of_heads_and_groups() -> None:
    config = small("ring-mini-linear-2.0")
    assert config.lightning is not None
    assert config.gqa is not None
    for tensor in (1, 2, 4, 8):
        local = local_config(config, tensor)
        assert local.lightning is not None
        assert local.gqa is not None
        assert local.lightning.num_heads * tensor == config.lightning.num_heads
        groups = max(1, config.lightning.num_norm_groups // tensor)
        assert local.lightning.num_norm_groups == groups
        assert local.gqa.num_kv_heads == max(1, config.gqa.num_kv_heads // tensor)
        assert (local.moe, local.vocab_size) == (config.moe, config.vocab_size)


class Foreign:
    """A layer that knows nothing of several devices."""

    @classmethod
    def parameters(cls, config, path):
        return (Param(f"{path}.mine", (4, 6), ("embed", "petals"), ()),)

    @classmethod
    def state_spec(cls, config, spec):
        return jax.ShapeDtypeStruct((spec.num_slots, 3), "float32")

    def __init__(self, scope, config, options):
        pass

    def __call__(self, x, state, layout, log_decay):
        return x, state


def test_layers_from_outside_say_how_they_divide_or_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small("ring-mini-linear-2.0")
    monkeypatch.setattr(plugins, "_REGISTRY", plugins._Registry())
    plugins.register_layer("lightning_attention", Foreign)
    (param, *_) = (p for p in describe(config) if p.path.endswith(".mine"))
    # Copies need no division.
    assert local_shape(config, param, MeshShape(4, 2, 1)) == (4, 6)
    assert state_axes(config, 1)[0] == 1
    with pytest.raises(UserError, match=r"mine has an axis 'petals' that nothing divides, so tens"):
        local_shape(config, param, MeshShape(1, 1, 2))
    with pytest.raises(UserError, match=r"Foreign does not run on tensor=2 .* no tensor_axis"):
        state_axes(config, 2)


def test_a_layer_that_inherits_a_built_in_one_divides_like_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small("ring-mini-linear-2.0")
    want = state_axes(config, 2)
    monkeypatch.setattr(plugins, "_REGISTRY", plugins._Registry())
    plugins.register_layer("lightning_attention", type("Mine", (LightningAttention,), {}))
    assert state_axes(config, 2) == want
    assert set(want) == {1, 2}  # heads of slots, and of pages


@pytest.mark.parametrize(
    ("version", "set_to"), [((0, 10, 2), []), ((0, 11, 2), [False]), ((0, 12, 0), [])]
)
def test_only_jax_0_11_gets_the_older_partitioner(
    version: tuple[int, int, int], set_to: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own dies where it compiles a decode step on a mesh."""
    seen = []
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(
        jax.config, "update", lambda name, value: seen.append((name, value)), raising=True
    )
    compat.prepare_for_mesh()
    assert seen == [("jax_use_shardy_partitioner", value) for value in set_to]
