"""What an engine may be started with, and that the rest is refused with the values allowed."""

from __future__ import annotations

import math

import pytest
from hf_configs import V2, read

from bailing_jax.engine_options import EngineOptions
from bailing_jax.errors import EXIT_USAGE, UserError

SIZE = "an integer >= 1"
FRACTION = "a number > 0 and <= 1"

REFUSED: list[tuple[str, object, str]] = [
    *(
        (name, value, "float32, bfloat16")
        for name in ("dtype", "rope_dtype", "state_dtype")
        for value in ("float16", "float64", "fp8", "", 32, True, ["float32"])
    ),
    ("state_dtype", None, "float32, bfloat16"),
    *(
        (name, value, SIZE)
        for name in ("max_num_seqs", "max_model_len", "prefill_chunk")
        for value in (0, -1, 1.0, "8", True, math.nan, [8])
    ),
    ("max_num_seqs", None, SIZE),
    ("prefill_chunk", None, SIZE),
    *(
        ("memory_fraction", value, FRACTION)
        for value in (0, 0.0, -0.5, 1.01, math.nan, math.inf, "0.5", True, None, [0.5])
    ),
    *(
        ("mesh", value, "data=D,expert=E,tensor=T")
        for value in ({"data": 0}, {"pipe": 1}, "tensor=2.0", "data=1,data=8", 2, ["a"])
    ),
    ("batch_invariant", 1, "True, False"),
    ("batch_invariant", "false", "True, False"),
    ("batch_invariant", None, "True, False"),
    ("kernels", "mosaic", "auto, xla, reference"),
    ("kernels", "", "auto, xla, reference"),
    ("kernels", None, "auto, xla, reference"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_each_option_is_refused_with_what_is_allowed(
    name: str, value: object, allowed: str
) -> None:
    with pytest.raises(UserError) as caught:
        EngineOptions(**{name: value})  # type: ignore[arg-type]
    assert caught.value.exit_code == EXIT_USAGE
    found, _, choices = caught.value.message.partition("; allowed: ")
    assert found == f"{name} = {value!r}"
    assert choices.startswith(allowed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_fraction", 1),
        ("memory_fraction", 1e-6),
        ("mesh", None),
        ("mesh", "auto"),
        ("mesh", {}),
        ("mesh", {"data": 1, "expert": 1, "tensor": 1}),
        ("mesh", "data=1,expert=1,tensor=1"),
        ("mesh", {"expert": 2, "tensor": 4}),
        ("mesh", "tensor=8"),
        ("kernels", "reference"),
        ("kernels", "xla"),
        ("max_model_len", None),
        ("max_num_seqs", 1),
        ("batch_invariant", False),
    ],
)
def test_what_can_be_done_is_taken(name: str, value: object) -> None:
    assert getattr(EngineOptions(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "platform", "stored", "want"),
    [
        (None, "cpu", "bfloat16", "float32"),
        (None, "cpu", "float32", "float32"),
        (None, "gpu", "bfloat16", "bfloat16"),
        (None, "tpu", "bfloat16", "bfloat16"),
        (None, "tpu", "float32", "float32"),
        ("bfloat16", "cpu", "float32", "bfloat16"),
        ("float32", "gpu", "bfloat16", "float32"),
    ],
)
def test_dtype_is_the_checkpoints_but_on_a_cpu(
    asked: str | None, platform: str, stored: str, want: str
) -> None:
    options = EngineOptions(dtype=asked, kernels="xla")
    runtime = options.runtime(read(V2, torch_dtype=stored), platform)
    assert (runtime.dtype, runtime.rotated_dtype, runtime.kernels) == (want, want, "xla")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("exact", [False, True])
def test_exact_mode_reaches_the_layers(exact: bool, platform: str) -> None:
    assert EngineOptions(batch_invariant=exact).runtime(read(V2), platform).exact is exact


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("kernels", "reference", "auto, xla (with batch_invariant)"),
        ("kernels", "mosaic", "auto, xla (with batch_invariant)"),
        *(
            ("prefill_chunk", size, "a multiple of 64 or a divisor of it (with batch_invariant)")
            for size in (3, 48, 65, 100, 1000)
        ),
    ],
)
def test_r050_what_exact_mode_cannot_do_is_refused(name: str, value: object, allowed: str) -> None:
    """Chunks of the recurrence lie on one grid from token 0, and every operator has its form."""
    with pytest.raises(UserError) as caught:
        EngineOptions(batch_invariant=True, **{name: value})  # type: ignore[arg-type]
    assert caught.value.message == f"{name} = {value!r}; allowed: {allowed}"
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("size", [1, 16, 32, 64, 128, 512, 1024])
@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_what_exact_mode_takes(size: int, kernels: str) -> None:
    options = EngineOptions(batch_invariant=True, prefill_chunk=size, kernels=kernels)
    assert options.limits(read(V2)).prefill_chunk == size


@pytest.mark.parametrize(
    ("mesh", "processes", "want"),
    [(None, 1, 1), (None, 2, 4), ("auto", 1, 4), ("auto", 2, 4), ("data=1", 2, 1)],
)
def test_several_processes_share_all_devices_unless_told_otherwise(
    mesh: str | None, processes: int, want: int
) -> None:
    config = read(V2)
    options = EngineOptions(mesh=mesh).resolved(config, 4, processes)
    assert options.mesh_shape.num_devices == want


def test_rope_dtype_is_its_own() -> None:
    runtime = EngineOptions(dtype="bfloat16", rope_dtype="float32").runtime(read(V2), "cpu")
    assert (runtime.dtype, runtime.rotated_dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("asked", "positions", "want"),
    [(None, 131072, 4096), (None, 300, 300), (300, 300, 300), (5, 300, 5), (9000, 131072, 9000)],
)
def test_r112_the_length_in_force(asked: int | None, positions: int, want: int) -> None:
    config = read(V2, max_position_embeddings=positions)
    limits = EngineOptions(max_model_len=asked, max_num_seqs=3, prefill_chunk=70).limits(config)
    assert limits.max_model_len == want
    assert (limits.max_num_seqs, limits.prefill_chunk) == (3, 70)
    # Enough pages for that length, and not one page more than it needs.
    pages = limits.pages_a_sequence
    assert (pages - 1) * limits.page_size < want <= pages * limits.page_size


def test_r112_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_model_len = 301; allowed: up to 300") as caught:
        EngineOptions(max_model_len=301).limits(read(V2, max_position_embeddings=300))
    assert caught.value.exit_code == EXIT_USAGE
