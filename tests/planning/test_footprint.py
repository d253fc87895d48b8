"""Bytes a device: devices together hold the whole, formulas agree with arrays and with hand."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import pytest

from bailing_jax.engine.limits import EngineLimits
from bailing_jax.errors import UserError
from bailing_jax.layers import expert_exchange, parallel
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.mesh import MeshShape, meshes
from bailing_jax.model import param_dtype
from bailing_jax.params import describe
from bailing_jax.planning import footprint, model
from bailing_jax.planning.chips import CHIPS, Chip
from bailing_jax.planning.workload import FP8, PAGE_SIZE, Workload, workload
from bailing_jax.presets import PRESETS
from bailing_jax.sharding import global_shape, splits
from bailing_jax.state import PAGE_SIZE as ENGINE_PAGE_SIZE
from bailing_jax.state import state_bytes

GIB = 2**30
ONE = MeshShape()
TPU, GPU = CHIPS["v6e"], CHIPS["h200"]
NAMES = ("ling-mini-2.0", "ring-mini-linear-2.0", "ling-2.6-flash")
MESHES = (ONE, MeshShape(tensor=8), MeshShape(expert=4, tensor=4), MeshShape(2, 8, 2))


def load_of(planned: model.PlannedModel, **options) -> Workload:
    return workload(planned.config, **options)


@pytest.fixture(scope="module")
def models() -> dict[str, model.PlannedModel]:
    return {name: model.read(name) for name in (*NAMES, "ling-2.6-1t")}


def test_kinds_count_every_parameter(models: dict[str, model.PlannedModel]) -> None:
    for name in NAMES:
        params = describe(models[name].config)
        assert models[name].num_parameters == sum(param.size for param in params)
        assert sum(kind.count for kind in models[name].kinds) == len(params)
        assert models[name].num_parameters / 1e9 == pytest.approx(
            PRESETS[name].total_parameters, rel=1e-3
        )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_devices_hold_the_whole(
    models: dict[str, model.PlannedModel], name: str, mesh: MeshShape
) -> None:
    """Bytes of all devices = each parameter times the devices that hold the same part of it."""
    planned, load = models[name], load_of(models[name])
    config, options = planned.config, RuntimeOptions(load.dtype)
    total = 0
    for param in describe(config):
        divided = math.prod(split.count for split in splits(config, param, mesh))
        held = math.prod(global_shape(config, param, mesh))
        total += held * param_dtype(param, options).itemsize * mesh.num_devices // divided
    assert footprint.weight_bytes(planned, mesh, load) * mesh.num_devices == total


@pytest.mark.parametrize("chip", [TPU, GPU], ids=lambda chip: chip.name)
@pytest.mark.parametrize("name", NAMES)
def test_state_and_pages_of_one_device_are_the_engines(
    models: dict[str, model.PlannedModel], name: str, chip: Chip
) -> None:
    planned = models[name]
    load = load_of(planned, max_num_seqs=5, max_model_len=130)
    found = footprint.footprint(planned, chip, ONE, load)
    platform = "tpu" if chip is TPU else "gpu"
    limits = EngineLimits(5, 130, load.prefill_chunk, PAGE_SIZE)
    spec = limits.state_spec("bfloat16", "float32", platform)
    assert found.needs["recurrent_state"] + found.needs["pages"] == state_bytes(
        planned.config, spec
    )
    assert PAGE_SIZE == ENGINE_PAGE_SIZE


@pytest.mark.parametrize("mesh", [MeshShape(2, 8, 4), MeshShape(expert=16, tensor=2)], ids=str)
def test_sequences_divide_over_shards(
    models: dict[str, model.PlannedModel], mesh: MeshShape
) -> None:
    planned = models["ling-2.6-flash"]
    load = load_of(planned, max_num_seqs=33, max_model_len=4096)
    found = footprint.footprint(planned, TPU, mesh, load)
    assert found.slots == math.ceil(33 / mesh.num_shards)
    assert found.pages == found.slots * 64
    # Heads are divided, latents are not.
    whole = footprint.slot_bytes(planned.config, TPU, ONE, load)
    assert footprint.slot_bytes(planned.config, TPU, mesh, load) * mesh.tensor == whole
    assert footprint.page_bytes(planned.config, TPU, mesh, load) == footprint.page_bytes(
        planned.config, TPU, ONE, load
    )


def test_key_value_heads_are_copied_where_devices_are_more(
    models: dict[str, model.PlannedModel],
) -> None:
    planned = models["ring-mini-linear-2.0"]  # four key-value heads
    load = load_of(planned)
    by_tensor = {
        tensor: footprint.token_bytes(planned.config, TPU, MeshShape(tensor=tensor), load)
        for tensor in (1, 2, 4, 8, 16)
    }
    # Four layers, keys and values of 128 channels of bfloat16.
    assert by_tensor == {1: 8192, 2: 4096, 4: 2048, 8: 2048, 16: 2048}


def test_ling_2_6_1t_by_hand(models: dict[str, model.PlannedModel]) -> None:
    """Experts 7.5 GiB a device of 256: 76 layers x 3 x 8192 x 2048 x 2 bytes."""
    planned = models["ling-2.6-1t"]
    load = load_of(planned)
    mesh = MeshShape(expert=16, tensor=16)
    experts = sum(
        kind.count * footprint.param_bytes(planned.config, kind.param, mesh, load)
        for kind in planned.kinds
        if kind.role == "expert"
    )
    assert experts == 76 * 3 * 8192 * 2048 * 2
    # Order of magnitude of the whole: 7.1 GiB of experts, a sixteenth of the rest.
    assert 10 * GIB < footprint.weight_bytes(planned, mesh, load) < 14 * GIB
    # 280 MiB of state a request on one device; latents of 512 + 64 channels take 640 on a TPU.
    assert footprint.slot_bytes(planned.config, TPU, ONE, load) == 280 * 2**20
    assert footprint.token_bytes(planned.config, TPU, ONE, load) == 10 * 640 * 2
    assert footprint.token_bytes(planned.config, GPU, ONE, load) == 10 * 576 * 2


def test_fp8_halves_the_matrices_and_adds_scales(models: dict[str, model.PlannedModel]) -> None:
    planned = models["ling-2.6-flash"]
    wide, narrow = load_of(planned), load_of(planned, weight_dtype=FP8)
    for param in describe(planned.config):
        before = footprint.param_bytes(planned.config, param, ONE, wide)
        after = footprint.param_bytes(planned.config, param, ONE, narrow)
        name = param.path.removesuffix(".weight").rpartition(".")[2]
        if name in ("word_embeddings", "lm_head", "gate") or len(param.shape) == 1:
            assert after == before
        else:
            # A scale for each row of the checkpoint's matrices.
            sums_over = param.shape[footprint.input_axis(param)]
            assert after == param.size + 4 * param.size // sums_over, param.path
            assert before == 2 * param.size


def test_input_axes(models: dict[str, model.PlannedModel]) -> None:
    axes = {
        kind.param.path.rpartition("layers.")[2].partition(".")[2]: kind.param.axes[
            footprint.input_axis(kind.param)
        ]
        for kind in models["ling-2.6-flash"].kinds
        if footprint.is_matrix(kind.param)
    }
    assert axes["attention.query_key_value.weight"] == "embed"
    assert axes["attention.dense.weight"] == "heads"
    assert axes["attention.kv_b_proj.key_weight"] == "kv_rank"
    assert axes["attention.kv_b_proj.value_weight"] == "kv_rank"
    assert axes["mlp.experts.gate_proj.weight"] == "embed"
    assert axes["mlp.experts.down_proj.weight"] == "expert_ffn"


def test_exchange_is_cut_as_the_layers_cut_it() -> None:
    assert footprint.GATHERED_BYTES == expert_exchange._GATHERED_BYTES
    assert footprint.RESULT_BYTES == expert_exchange._RESULT_BYTES
    config = model.read("ling-2.6-1t").config
    for expert in (1, 8, 16, 32):
        mesh = MeshShape(expert=expert, tensor=8)
        assert footprint.sends(config, mesh) == expert_exchange.sends(
            parallel.Parallel.of(config, mesh), config.moe.num_experts_per_token
        )
    for rows, row_bytes, allowed in ((528, 10**6, 2**28), (7, 2**28, 2**28), (12, 1, 100)):
        assert footprint.num_blocks(rows, row_bytes, allowed) == parallel.num_blocks(
            rows, row_bytes, allowed
        )


def test_more_sequences_or_length_never_take_less(models: dict[str, model.PlannedModel]) -> None:
    planned = models["ring-mini-linear-2.0"]
    for mesh in meshes(planned.config, 8):
        sizes = [
            footprint.footprint(
                planned, TPU, mesh, load_of(planned, max_num_seqs=n, max_model_len=length)
            ).total_bytes
            for n, length in ((1, 64), (8, 64), (8, 4096), (64, 4096), (64, 65536))
        ]
        assert sizes == sorted(sizes)


def test_state_dtype_halves_the_state(models: dict[str, model.PlannedModel]) -> None:
    planned = models["ring-mini-linear-2.0"]
    load = load_of(planned)
    assert footprint.slot_bytes(planned.config, TPU, ONE, load) == 2**24  # 16 MiB a request
    narrow = dataclasses.replace(load, state_dtype="bfloat16")
    assert footprint.slot_bytes(planned.config, TPU, ONE, narrow) == 2**23
    assert jnp.dtype("bfloat16").itemsize == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs = 0; allowed: an integer >= 1"),
        ({"max_model_len": 0}, "max_model_len = 0; allowed: "),
        ({"max_model_len": 10**6}, "max_model_len = 1000000; allowed: up to 131072"),
        ({"prefill_chunk": -1}, "prefill_chunk = -1; allowed: "),
        ({"prompt_tokens": 0}, "prompt_tokens = 0; allowed: an integer from 1 to 8192"),
        ({"prompt_tokens": 9000}, "prompt_tokens = 9000; allowed: "),
        ({"weight_dtype": "int4"}, "weight_dtype = 'int4'; allowed: float32, bfloat16, float8"),
        ({"state_dtype": FP8}, "state_dtype = 'float8_e4m3fn'; allowed: "),
        ({"memory_fraction": 0.0}, "memory_fraction = 0.0; allowed: "),
        ({"memory_fraction": float("nan")}, "memory_fraction = nan; allowed: "),
    ],
)
def test_a_load_that_cannot_be(
    models: dict[str, model.PlannedModel], options: dict, says: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_of(models["ring-mini-linear-2.0"], **options)
    assert says in refused.value.message
