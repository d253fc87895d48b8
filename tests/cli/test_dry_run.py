"""--dry-run: bytes and programs are those of a real run, and nothing is allocated to know them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import pallas_call
from slow import slow_but
from tiny_models import (
    CHUNK,
    LATENT,
    LINEAR,
    MODEL_LEN,
    NUM_SEQS,
    greedy,
    tiny_llm,
    write_tiny_model,
)

from bailing_jax import LLM, runtime
from bailing_jax.batch import pack
from bailing_jax.cli import dry_run
from bailing_jax.cli.dry_run import plan
from bailing_jax.config import ModelConfig
from bailing_jax.engine.programs import Programs
from bailing_jax.engine.sizes import ProgramSize, job_programs, prompt_programs
from bailing_jax.engine_options import EngineOptions
from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE, UserError
from bailing_jax.layer_plan import layer_plan
from bailing_jax.memory import temporary_bytes
from bailing_jax.mesh import MeshShape
from bailing_jax.model import abstract
from bailing_jax.planning.footprint import weight_bytes
from bailing_jax.planning.model import read
from bailing_jax.planning.workload import workload
from bailing_jax.presets import find_preset
from bailing_jax.state import DecodeState, allocate, leaf_shapes
from bailing_jax.temporaries import peak_bytes

pytestmark = pytest.mark.compiles

SMALL = {"max_num_seqs": NUM_SEQS, "max_model_len": MODEL_LEN, "prefill_chunk": CHUNK}
# One layer compiles fast, and programs are the same for any number of them.
SHALLOW = {**LINEAR, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_tiny_model(tmp_path_factory.mktemp(name), config)
        for name, config in (("linear", LINEAR), ("latent", LATENT))
    }


# The laws: what is said is what a run has.


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "state_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["linear", "latent"])
def test_weights_and_state_are_those_of_a_real_load(
    folders: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    llm = LLM(folders[name], report=lambda _line: None, **SMALL, **options)
    said = plan(folders[name], {**SMALL, **options}, {})
    leaves = llm._engine._programs._leaves
    assert said.bytes["weights"] == sum(leaf.nbytes for leaf in leaves)
    assert said.parameters["total"] == sum(leaf.size for leaf in leaves)
    kinds = [layer.attention for layer in layer_plan(llm.config)]
    state = allocate(llm.config, llm._engine._spec).layers
    for what, wanted in (("recurrent_state", ["lightning"]), ("pages", ["gqa", "mla"])):
        held = [leaf.nbytes for leaf, kind in zip(state, kinds, strict=True) if kind in wanted]
        assert said.bytes[what] == sum(held) > 0
    # 6 experts, of which a token meets 2; nothing else has that many rows.
    idle = sum(leaf.size for leaf in leaves if leaf.ndim == 3 and leaf.shape[0] == 6) * 4 // 6
    assert said.parameters["active"] == said.parameters["total"] - idle < said.parameters["total"]


def compiled(llm: LLM) -> set[ProgramSize]:
    keys = llm._engine._programs._compiled.keys()
    assert {width for *_, width in keys} == {llm.limits.pages_a_sequence}
    return {ProgramSize(*size) for *size, _ in keys}


def test_one_prompt_compiles_the_programs_listed() -> None:
    """Chunks of 80 and the last 10 tokens; then prompts that need fewer or no others."""
    llm = tiny_llm(SHALLOW, max_num_seqs=2, prefill_chunk=80, max_model_len=128)
    llm.generate(list(range(90)), greedy(3, ignore_eos=True))
    listed = prompt_programs(llm.limits, 90)
    assert sorted(listed) == sorted(compiled(llm))
    assert len(listed) == 3
    assert set(prompt_programs(llm.limits, 7)) < set(listed)
    assert set(prompt_programs(llm.limits, 80)) < set(listed)
    assert set(prompt_programs(llm.limits)) == set(listed)


def test_a_mixed_batch_compiles_the_programs_listed() -> None:
    """Answers end one after the other, so that 3, 2 and 1 sequences decode."""
    llm = tiny_llm(SHALLOW, max_num_seqs=3, prefill_chunk=80, max_model_len=256)
    prompts = [list(range(length)) for length in (5, 100, 7)]
    llm.generate(prompts, [greedy(count, ignore_eos=True) for count in (30, 5, 17)])
    listed = job_programs(llm.limits)
    assert sorted(listed) == sorted(compiled(llm))
    assert len(listed) == 5


def abstract_model(config: ModelConfig, dtype: str = "float32") -> Any:
    return abstract(config, EngineOptions(dtype=dtype).runtime(config, "cpu"))


MIDDLE = {
    **find_preset("ring-mini-linear-2.0").hf_config,  # type: ignore[union-attr]
    "num_hidden_layers": 3,
    "layer_group_size": 2,
    "num_experts": 16,
    "vocab_size": 2000,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.mark.parametrize(
    ("config", "dtype", "options"),
    [
        ({**LINEAR, "num_hidden_layers": 2}, "float32", SMALL),
        ({**LATENT, "num_hidden_layers": 2}, "bfloat16", SMALL),
        # The sampler's arrays are the largest.
        ({**LINEAR, "num_hidden_layers": 2, "vocab_size": 50_000}, "float32", SMALL),
        *slow_but(
            (),
            [
                (MIDDLE, "bfloat16", {"max_num_seqs": 4, "prefill_chunk": 256}),
                (
                    MIDDLE,
                    "float32",
                    {"max_num_seqs": 4, "prefill_chunk": 128, "max_model_len": 8192},
                ),
            ],
        ),
    ],
    ids=["linear", "latent", "vocabulary", "middle", "middle, long"],
)
def test_temporaries_bound_what_xla_allocates(
    config: dict[str, Any], dtype: str, options: dict[str, Any]
) -> None:
    """From above, and not by far; nothing is allocated here either."""
    read = ModelConfig.from_hf(config)
    chosen = EngineOptions(dtype=dtype, **options)
    limits = chosen.limits(read)
    spec = limits.state_spec(dtype, "float32")
    size = max(job_programs(limits), key=lambda size: size.prefill_rows)
    layout = pack(
        [], [], num_decode=size.decode_rows, num_prefill=size.prefill_rows,
        num_segments=size.segments, page_size=limits.page_size,
        pages_a_sequence=limits.pages_a_sequence,
    )  # fmt: skip
    programs = Programs(abstract_model(read, dtype))
    programs.compile_step(DecodeState(leaf_shapes(read, spec)), layout)  # type: ignore[arg-type]
    (program,) = programs._compiled.values()
    allocated = program.memory_analysis()
    assert allocated is not None
    runtime_options = chosen.runtime(read, "cpu")
    said = temporary_bytes(read, runtime_options, limits, spec, size)
    assert allocated.temp_size_in_bytes < said < 1.8 * allocated.temp_size_in_bytes


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (lambda x: jnp.sin(x) + 1, 1),
        (lambda x: jnp.sort(jnp.sort(x) * 2), 2),
        (lambda x: jnp.sort(x).sum(), 1),
        (lambda x: x.at[0].set(0), 0),
        (lambda x: (x.at[0].set(0), jnp.sort(x)), 2),  # who sorts still needs the old row
        (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sort(y), jnp.sort(x)), 2),
        (lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, jnp.sort(x)), 2),
        # Whichever branch needs more, first or second.
        (lambda x: jax.lax.cond(True, lambda x: jnp.sort(jnp.sort(x) * 2), jnp.cos, x), 2),
        (lambda x: jax.lax.cond(True, jnp.cos, lambda x: jnp.sort(jnp.sort(x) * 2), x), 2),
        (lambda x: jax.nn.relu(jnp.sort(x)), 2),  # a custom_jvp
        (lambda x: pallas_call(lambda a, b: None, out_shape=x)(jnp.sort(x)), 2),
    ],
)
def test_peaks_of_small_programs(program: Callable[..., Any], wanted: int) -> None:
    """In units of the argument; what stands for a few bytes more is let pass."""
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    peak = peak_bytes(jax.make_jaxpr(program)(x).jaxpr, "cpu")
    assert wanted * 4000 <= peak < wanted * 4000 + 100


# Nothing is read or allocated that need not be.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_preset_takes_little_memory_and_time() -> None:
    """4 TB of weights, within 4 GB of address space."""
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from bailing_jax.cli import dry_run
code = dry_run.run("ling-2.6-1t", {"dtype": "float32"}, {}, as_json=True)
used = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which begins with what the parent used.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, peak, used.ru_utime + used.ru_stime)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said, last = done.stdout.splitlines()
    needs = json.loads(said)
    assert needs["bytes"]["weights"] > 4e12
    assert needs["fits"] is False
    code, peak, seconds = last.split()
    assert int(code) == EXIT_DOES_NOT_FIT
    assert int(peak) < 600_000  # kilobytes; 250_000 seen, of which jax alone takes 150_000
    assert float(seconds) < 20  # 2.7 on an idle machine


def test_a_folder_with_only_a_config_is_planned_too(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(folders["latent"] / "config.json", tmp_path)
    bare, whole = plan(tmp_path, SMALL, {}), plan(folders["latent"], SMALL, {})
    assert "not there to look at" in bare.weights_seen
    assert "complete" in whole.weights_seen
    assert (bare.bytes, bare.programs) == (whole.bytes, whole.programs)


def test_weights_that_do_not_match_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="wrong shape") as caught:
        plan(folders["linear"], SMALL, {"intermediate_size": 44})
    assert caught.value.exit_code == EXIT_USAGE


def test_a_preset_says_that_its_weights_are_random() -> None:
    said = plan("Ling-2.6-1T", {"dtype": "bfloat16"}, {"rope_theta": 6e6})
    assert said.weights_seen.startswith("a preset, its weights are random; assumed, not published")
    assert "num_key_value_heads" in said.weights_seen
    assert "rope_theta" not in said.weights_seen
    assert said.parameters["total"] == pytest.approx(1012.2e9, rel=1e-3)


# What is printed.


def test_json_adds_up_and_the_table_says_the_same(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run.run(folders["linear"], SMALL, {}, as_json=True) == EXIT_OK
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    said = json.loads(out)
    assert list(said["bytes"]) == ["weights", "recurrent_state", "pages", "temporaries"]
    assert said["total_bytes"] == sum(said["bytes"].values())
    assert all(size > 0 for size in said["bytes"].values())
    assert said["allowed_bytes"] == int(said["memory_bytes"] * 0.9)
    assert said["fits"] is True
    assert said["in_force"]["dtype"] == "float32"
    assert {"decode_rows": 3, "prefill_rows": 16, "segments": 3} in said["programs"]["job"]
    assert {"decode_rows": 2, "prefill_rows": 0, "segments": 0} in said["programs"]["job"]
    assert dry_run.run(folders["linear"], SMALL, {}, prompt_tokens=4) == EXIT_OK
    text = capsys.readouterr().out
    for what, size in (*said["bytes"].items(), ("total", said["total_bytes"])):
        row = next(line for line in text.splitlines() if line.strip().startswith(what[:7]))
        assert f" {size / 2**30:.3f} GiB" in row
    assert "one prompt      (3, 16, 3)  (1, 0, 0)\n" in text
    assert "max_num_seqs 3, max_model_len 96, prefill_chunk 16" in text
    assert "\nfits\n" in text


# Of a preset, whose heads and widths divide.
PRESET = "ring-mini-linear-2.0"
DIVISIBLE = {"num_experts": 16, "vocab_size": 512, "num_hidden_layers": 5}


@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,expert=4", "expert=2,tensor=2"])
def test_a_mesh_is_planned_without_its_devices(
    capsys: pytest.CaptureFixture[str], mesh: str
) -> None:
    options = {**SMALL, "mesh": mesh}
    dry_run.run(PRESET, options, DIVISIBLE)
    text = capsys.readouterr().out
    needs, alone = plan(PRESET, options, DIVISIBLE), plan(PRESET, SMALL, DIVISIBLE)
    shape = MeshShape.parse(mesh)
    assert (needs.mesh, needs.devices) == (str(shape), shape.num_devices)
    assert f"mesh {shape}: {shape.num_devices} devices; all that follows is of one\n" in text
    assert f"only {jax.device_count()} of them here: memory is this machine's" in text
    model = read(PRESET, DIVISIBLE)
    load = workload(model.config, weight_dtype="float32", max_num_seqs=NUM_SEQS)
    assert needs.bytes["weights"] == weight_bytes(model, shape, load) < alone.bytes["weights"]
    assert needs.slots == -(-alone.slots // shape.num_shards)
    assert needs.memory_bytes == alone.memory_bytes


def test_a_mesh_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(UserError, match="mesh: tensor=7 does not divide"):
        plan(PRESET, {**SMALL, "mesh": "tensor=7"}, DIVISIBLE)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """A machine whose memory the test chooses."""
    chosen: list[int | None] = [None]
    monkeypatch.setattr(runtime, "memory_bytes", lambda *_: chosen[0])
    return chosen


def test_what_fits_to_the_byte_fits_and_one_less_does_not(
    folders: dict[str, Path], memory: list[int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SMALL, "memory_fraction": 0.5}
    memory[0] = 2
    least = plan(folders["linear"], options, {})
    assert (least.pages, least.pages_wanted) == (2, 6)  # one sequence at full length
    needed = least.total_bytes
    memory[0] = 2 * needed
    assert dry_run.run(folders["linear"], options, {}) == EXIT_OK
    capsys.readouterr()
    memory[0] = 2 * (needed - 1)
    assert dry_run.run(folders["linear"], options, {}) == EXIT_DOES_NOT_FIT
    out = capsys.readouterr().out
    assert "  temporaries " in out
    helps = next(line for line in out.splitlines() if line.startswith("does not fit. Smaller: "))
    for flag in ("--dtype bfloat16", "--max-num-seqs (now 3)", "--max-model-len (now 96)",
                 "--state-dtype bfloat16", "--prefill-chunk (now 16)",
                 "Larger: --memory-fraction (now 0.5)"):  # fmt: skip
        assert flag in helps


@pytest.mark.slow
def test_pages_shrink_to_what_fits_and_loading_agrees(
    folders: dict[str, Path], memory: list[int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """And requests that give way to each other answer what they answer with all pages."""
    options: dict[str, Any] = {**SMALL, "memory_fraction": 1.0}
    full = plan(folders["linear"], options, {})
    assert full.pages == full.pages_wanted == 6
    page = full.bytes["pages"] // 7
    requests = [[i, 2, 3] * 15 for i in range(3)]
    params = greedy(50, ignore_eos=True)
    want = LLM(folders["linear"], **options, report=lambda _line: None).generate(requests, params)
    for pages in (5, 3):
        memory[0] = full.total_bytes - (6 - pages) * page + page // 2
        needs, said = plan(folders["linear"], options, {}), list[str]()
        llm = LLM(folders["linear"], **options, report=said.append)
        assert needs.pages == llm.limits.num_pages == pages
        assert needs.fits
        assert any(f"{pages} pages of 6 " in line for line in said)
        got = llm.generate(requests, params)
        assert [r.outputs[0].token_ids for r in got] == [r.outputs[0].token_ids for r in want]
    dry_run.run(folders["linear"], options, {})
    assert "3 slots, 3 pages of 6: when they run out" in capsys.readouterr().out
    memory[0] = full.total_bytes - 4 * page - 1
    assert plan(folders["linear"], options, {}).fits is False
    with pytest.raises(UserError, match="does not fit"):
        LLM(folders["linear"], **options, report=lambda _line: None)


def test_only_flags_that_help_are_named(
    folders: dict[str, Path], memory: list[int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    used = {"dtype": "bfloat16", "state_dtype": "bfloat16", "max_num_seqs": 1,
            "memory_fraction": 1.0}  # fmt: skip
    memory[0] = 1
    memory[0] = plan(folders["linear"], used, {}).total_bytes - 1
    assert dry_run.run(folders["linear"], used, {}) == EXIT_DOES_NOT_FIT
    helps = "does not fit. Smaller: --max-model-len (now 512), --prefill-chunk (now 512).\n"
    assert helps in capsys.readouterr().out
    memory[0] = 1000
    assert dry_run.run(folders["linear"], {}, {}) == EXIT_DOES_NOT_FIT
    assert "No flag makes the weights small enough" in capsys.readouterr().out


def test_an_unknown_memory_is_said_and_no_failure(
    folders: dict[str, Path], memory: list[int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert memory == [None]
    assert dry_run.run(folders["linear"], SMALL, {}) == EXIT_OK
    assert "memory of this cpu can't be told" in capsys.readouterr().out
    assert dry_run.run(folders["linear"], SMALL, {}, as_json=True) == EXIT_OK
    said = json.loads(capsys.readouterr().out)
    assert (said["memory_bytes"], said["allowed_bytes"], said["fits"]) == (None, None, None)


# Mistakes.


def test_mistakes_are_refused_with_code_2(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for model, options, message in (
        (broken, {}, "config.json"),
        (tmp_path / "empty", {}, "has no config.json"),
        (tmp_path / "nowhere", {}, "no such folder, and no preset of that name"),
        ("ling-3.0-tiny", {}, "BailingMoeV3ForCausalLM"),
        (folders["linear"], {"max_model_len": 9999}, "max_model_len = 9999"),
        (folders["linear"], {"dtype": "int8"}, "dtype = 'int8'"),
    ):
        with pytest.raises(UserError) as caught:
            dry_run.run(model, options, {})
        assert message in caught.value.message
        assert caught.value.exit_code == EXIT_USAGE
