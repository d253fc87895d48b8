"""A checkpoint on a mesh: every device gets its part, whatever the folder, and LLM runs there."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from mesh_models import CONFIGS, config_of
from random_checkpoints import random_tensors, write_checkpoint
from slow import slow_but
from tolerances import TOLERANCES

from bailing_jax import LLM, SamplingParams, sharding
from bailing_jax.checkpoint import random_weights
from bailing_jax.checkpoint.load import load_model, match_native, match_released
from bailing_jax.checkpoint.random_weights import draw, draw_experts, random_model
from bailing_jax.engine_options import EngineOptions
from bailing_jax.errors import UserError
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.layers.parallel import Parallel
from bailing_jax.memory import plan_memory
from bailing_jax.mesh import MeshShape
from bailing_jax.params import Param, describe
from bailing_jax.placement import Placement
from convert.__main__ import main
from convert.native import open_native
from convert.source import open_source

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [3] * 20, [100, 101], [42]]


def written(folder: Path, name: str, dtype: Any = "float32") -> Path:
    tensors = random_tensors(CONFIGS[name], 3)
    write_checkpoint(folder / "hf", CONFIGS[name], tensors, shards=3, dtype=dtype)
    return folder / "hf"


def arrays(model: nnx.Module) -> dict[str, jax.Array]:
    leaves = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf[...] for path, leaf in leaves}


def check_parts(found: dict[str, jax.Array], whole: dict[str, np.ndarray], where: Placement):
    """Every device's bytes are those of its boxes, one behind the other."""
    for param in describe(where.config):
        want, split = whole[param.path], sharding.splits(where.config, param, where.shape)
        axis = next((i for i, s in enumerate(split) if len(s.parts) > 1), 0)
        shards = found[param.path].addressable_shards
        assert len(shards) == where.shape.num_devices
        for shard in shards:
            (place,) = np.argwhere(where.mesh.devices == shard.device)
            position = dict(zip(sharding.AXES, place.tolist(), strict=True))
            boxes = sharding.regions(where.config, param, where.shape, position)
            parts = [want[tuple(slice(*side) for side in box)] for box in boxes]
            np.testing.assert_array_equal(np.asarray(shard.data), np.concatenate(parts, axis))


HELD = [
    ("linear", MeshShape(1, 1, 8), "bfloat16"),
    ("latent", MeshShape(1, 2, 4), "float32"),
    ("softmax", MeshShape(1, 2, 4), "bfloat16"),
    ("softmax", MeshShape(1, 3, 2), "float32"),
    ("linear", MeshShape(2, 2, 2), "float32"),
]


@pytest.mark.parametrize(
    ("name", "mesh", "held"),
    slow_but(
        HELD, [(name, mesh, held) for name, mesh, _ in HELD for held in ("float32", "bfloat16")]
    ),
    ids=str,
)
def test_r093_each_device_gets_its_part(
    tmp_path: Path, name: str, mesh: MeshShape, held: str
) -> None:
    config = config_of(name)
    folder = written(tmp_path, name, "bfloat16")
    assert main(["hf-to-native", str(folder), str(tmp_path / "native"), "--quiet"]) == 0
    options = RuntimeOptions(held, parallel=Parallel.of(config, mesh))
    placement = Placement(config, mesh)
    calls: list[tuple[int, int]] = []
    with open_source(folder) as source, open_native(tmp_path / "native") as native:
        for weights in (match_released(config, source), match_native(config, native)):
            alone = load_model(config, RuntimeOptions(held), weights, lambda *_: None)
            whole = {path: np.asarray(array) for path, array in arrays(alone).items()}
            model = load_model(
                config, options, weights, lambda *call: calls.append(call), placement
            )
            check_parts(arrays(model), whole, placement)
            # This process has all devices, and reads what several of them hold once: all there
            # is, and of key and value heads that have copies those too. (A released kv_b_proj is
            # two parameters, each of which reads it whole on one device.)
            done, total = calls[-1]
            copies = config.gqa is not None and mesh.tensor > config.gqa.num_kv_heads
            assert 0.95 * total < done <= (1.2 if copies else 1) * total


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("linear", MeshShape(1, 2, 4)),
        ("linear", MeshShape(2, 2, 2)),
        ("latent", MeshShape(1, 8, 1)),
        ("softmax", MeshShape(1, 3, 2)),
    ],
    ids=str,
)
def test_random_weights_are_the_same_on_every_mesh(name: str, mesh: MeshShape, held: str) -> None:
    config = config_of(name)
    placement = Placement(config, mesh)
    options = RuntimeOptions(held, parallel=Parallel.of(config, mesh))
    alone = random_model(config, RuntimeOptions(held), 7)
    whole = {path: np.asarray(array) for path, array in arrays(alone).items()}
    check_parts(arrays(random_model(config, options, 7, placement)), whole, placement)


def test_a_part_of_the_experts_is_drawn_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("linear")
    param = next(p for p in describe(config) if p.path.endswith("mlp.experts.down_proj.weight"))
    want = draw(param, 7)[5:7, 3:, :2]
    drawn: list[Any] = []
    normal = random_weights._normal

    def counted(param: Param, shape: Any, key: Any) -> np.ndarray:
        drawn.append(key[-1])
        return normal(param, shape, key)

    monkeypatch.setattr(random_weights, "_normal", counted)
    _, width_in, _ = param.shape
    got = draw_experts(param, 7, ((5, 7), (3, width_in), (0, 2)))
    np.testing.assert_array_equal(got, want)
    assert drawn == [5, 6]
    # On a mesh every expert is drawn once, where all of its devices are of one process.
    drawn.clear()
    mesh = MeshShape(2, 2, 2)
    options = RuntimeOptions("float32", parallel=Parallel.of(config, mesh))
    random_model(config, options, 7, Placement(config, mesh))
    stacks = [p for p in describe(config) if p.axes[0] == "experts"]
    experts = [number for number in drawn if number < config.moe.num_experts]
    assert len(experts) == len(stacks) * config.moe.num_experts


def test_r111_values_no_weight_has_are_refused_by_name(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["linear"], 3)
    tensors["model.layers.1.mlp.experts.9.up_proj.weight"][3, 5] = np.nan
    write_checkpoint(tmp_path, CONFIGS["linear"], tensors)
    with pytest.raises(UserError, match=r"experts\.9\.up_proj.* 1 NaN .*\(3, 5\)"):
        LLM(tmp_path, mesh="expert=4", report=lambda _line: None)


SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 96, "prefill_chunk": 16}


def answers(llm: LLM, **fields: Any) -> list[Any]:
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, **fields)
    return [request.outputs[0] for request in llm.generate(PROMPTS, params)]


@functools.cache
def one_device() -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        return LLM(written(Path(folder), "linear"), report=lambda _line: None, **SIZES)


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "auto"])
def test_an_llm_on_a_mesh_answers_as_on_one_device(tmp_path: Path, mesh: str) -> None:
    lines: list[str] = []
    llm = LLM(written(tmp_path, "linear"), mesh=mesh, report=lines.append, **SIZES)
    shape = "data=1,expert=1,tensor=8" if mesh == "auto" else mesh
    assert any(line.startswith(f"mesh {shape}: 8 of 8 devices; ") for line in lines)
    for got, want in zip(answers(llm), answers(one_device()), strict=True):
        assert got.token_ids == want.token_ids


def test_what_an_llm_on_a_mesh_says_of_texts_and_tokens(tmp_path: Path) -> None:
    llm = LLM(
        written(tmp_path, "linear"), mesh={"data": 2, "tensor": 4}, report=lambda _: None, **SIZES
    )
    one = one_device()
    for got, want in zip(answers(llm, logprobs=2), answers(one, logprobs=2), strict=True):
        assert got.token_ids == want.token_ids
        for some, others in zip(got.logprobs, want.logprobs, strict=True):
            assert some == pytest.approx(others, abs=TOLERANCES["mesh_logits"])
    text = PROMPTS[2]
    for read in ("logits", "hidden_states", "token_logprobs"):
        got, want = getattr(llm, read)(text), getattr(one, read)(text)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCES["mesh_logits"])
    got, want = llm.recurrent_states(text), one.recurrent_states(text)
    for layer, state in want.items():
        bound = TOLERANCES["law_state"] * np.abs(state).max()
        np.testing.assert_allclose(got[layer], state, rtol=0, atol=bound)


def test_exact_mode_gives_a_request_the_same_bits_in_company(tmp_path: Path) -> None:
    llm = LLM(
        written(tmp_path, "linear"),
        mesh="expert=2,tensor=2",
        batch_invariant=True,
        report=lambda _line: None,
        **SIZES,
    )
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=1)
    together = [request.outputs[0] for request in llm.generate(PROMPTS, params)]
    for prompt, got in zip(PROMPTS, together, strict=True):
        alone = llm.generate(prompt, params)[0].outputs[0]
        assert (got.token_ids, got.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize("mesh", [MeshShape(1, 2, 4), MeshShape(2, 1, 4)], ids=str)
def test_what_a_device_is_said_to_need_is_what_it_gets(mesh: MeshShape) -> None:
    config, options = config_of("linear"), EngineOptions(mesh=str(mesh), max_model_len=128)
    running = options.runtime(config, "cpu")
    plan = plan_memory(config, running, options)
    placement = Placement(config, mesh)
    device = placement.mesh.devices.flat[0]

    def held(array: jax.Array) -> int:
        return sum(s.data.nbytes for s in array.addressable_shards if s.device == device)

    model = random_model(config, running, 0, placement)
    assert plan.needs["weights"] == sum(map(held, arrays(model).values()))
    state = placement.new_state(plan.spec)
    assert plan.needs["recurrent_state"] + plan.needs["pages"] == sum(map(held, state.layers))
    alone = EngineOptions(max_model_len=128)
    whole = plan_memory(config, alone.runtime(config, "cpu"), alone)
    assert 0 < plan.needs["temporaries"] < whole.needs["temporaries"]


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("data=3,tensor=4", "mesh: data=3,expert=1,tensor=4 is 12 devices; there are 8"),
        ("tensor=3", r"mesh: tensor=3 does not divide the heads of lightning attention .* \(8\)"),
        ("expert=5", r"mesh: expert=5 does not divide the routed experts \(num_experts\) \(16\)"),
        ("tensors=2", "mesh = 'tensors=2'; allowed: data=D,expert=E,tensor=T"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(tmp_path: Path, mesh: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        LLM(written(tmp_path, "linear"), mesh=mesh, report=lambda _line: None)
    assert caught.value.exit_code == 2
