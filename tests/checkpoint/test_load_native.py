"""A native folder loads as the checkpoint it was made from does: same bits, no copies."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from goldens import GOLDEN
from hf_configs import LINEAR_V2, V2, V2_5, changed
from random_checkpoints import random_tensors, write_checkpoint

from bailing_jax import LLM
from bailing_jax.checkpoint.load import Weights, load_model, match_native, match_released
from bailing_jax.errors import UserError
from bailing_jax.layers.options import RuntimeOptions
from bailing_jax.params import describe
from convert.__main__ import main
from convert.native import open_native
from convert.source import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore::bailing_jax.config.ConfigWarning"),
    pytest.mark.unoptimised,
]

ARCHITECTURES = (V2, LINEAR_V2, V2_5)


def made(folder: Path, architecture: str = V2_5, dtype: str = "bfloat16", **flags: Any) -> Path:
    """A released checkpoint in `folder`/hf and its native form, which is returned."""
    hf_config = changed(architecture)
    write_checkpoint(folder / "hf", hf_config, random_tensors(hf_config, 11), dtype=dtype)  # pyright: ignore
    return converted(folder / "hf", folder / "native", **flags)


def converted(source: Path, native: Path, **flags: Any) -> Path:
    extra = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert main(["hf-to-native", str(source), str(native), "--quiet", *extra]) == 0
    return native


def arrays(model: nnx.Module) -> dict[str, jax.Array]:
    leaves = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf[...] for path, leaf in leaves}


def loaded(weights: Weights, config: Any, dtype: str) -> dict[str, jax.Array]:
    return arrays(load_model(config, RuntimeOptions(dtype), weights, lambda *_: None))


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_and_released_parameters_are_the_same_bits(
    tmp_path: Path, architecture: str, held: str
) -> None:
    native_path = made(tmp_path, architecture)
    with open_source(tmp_path / "hf") as source, open_native(native_path) as native:
        config = native.model_config()
        released = loaded(match_released(config, source), config, held)
        ours = loaded(match_native(config, native), config, held)
    assert ours.keys() == released.keys()
    for path, array in ours.items():
        assert array.dtype == released[path].dtype, path
        assert np.asarray(array).tobytes() == np.asarray(released[path]).tobytes(), path


def test_weights_are_used_where_they_are_mapped(tmp_path: Path) -> None:
    """On a CPU nothing is copied: the model's buffers are the pages of the files."""
    golden = GOLDEN / "v2_5-mla"
    with open_native(converted(golden, tmp_path / "native")) as native:
        config = native.model_config()
        model = loaded(match_native(config, native), config, "float32")
        shared = {
            path: array.unsafe_buffer_pointer() == native.map(path).ctypes.data
            for path, array in model.items()
        }
        aligned = {path: native.map(path).ctypes.data % 64 == 0 for path in model}
    # Only tensors of odd sizes lie off the cache line that XLA asks for.
    assert {path for path in shared if aligned[path]} == {path for path in shared if shared[path]}
    bytes_shared = sum(model[path].nbytes for path in shared if shared[path])
    assert bytes_shared > 0.98 * sum(array.nbytes for array in model.values())


def test_arrays_outlive_the_folder(tmp_path: Path) -> None:
    native = made(tmp_path, dtype="float32")
    with open_native(native) as folder:
        config = folder.model_config()
        model = loaded(match_native(config, folder), config, "float32")
        before = {path: np.array(folder.map(path), np.float32) for path in model}
    shutil.rmtree(native)
    for path, array in model.items():
        np.testing.assert_array_equal(np.asarray(array), before[path])


def test_progress_counts_what_the_folder_holds(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with open_native(made(tmp_path)) as native:
        config = native.model_config()
        weights = match_native(config, native)
        load_model(config, RuntimeOptions("float32"), weights, lambda *call: calls.append(call))
        stored = sum(tensor.info.nbytes for tensor in native.params.values())
    assert len(calls) == len(describe(config))
    assert calls[-1] == (stored, stored)


def test_a_native_golden_gives_the_same_logits(tmp_path: Path) -> None:
    golden = GOLDEN / "v2_5-mla"
    native = converted(golden, tmp_path / "native")
    tokens = [5, 17, 301, 88, 4, 4, 250]
    expected = LLM(str(golden), max_model_len=64).logits(tokens)
    np.testing.assert_array_equal(LLM(str(native), max_model_len=64).logits(tokens), expected)


def test_the_decay_offset_converted_with_is_in_force(tmp_path: Path) -> None:
    said: list[str] = []
    native = made(tmp_path, LINEAR_V2, **{"decay-layer-offset": 1})
    options: dict[str, Any] = {"max_model_len": 64}
    tokens = [3, 1, 4, 1, 5]
    ours = LLM(str(native), report=said.append, **options).logits(tokens)
    assert any("decay layer offset 1" in line for line in said)
    hf = str(tmp_path / "hf")
    one = LLM(hf, hf_overrides={"decay_layer_offset": 1}, **options).logits(tokens)
    zero = LLM(hf, **options).logits(tokens)
    np.testing.assert_array_equal(ours, one)
    assert not np.array_equal(one, zero)
    # Overridden only explicitly.
    explicit = LLM(str(native), hf_overrides={"decay_layer_offset": 0}, **options).logits(tokens)
    np.testing.assert_array_equal(explicit, zero)


def test_s11_a_folder_without_its_manifest_is_refused(tmp_path: Path) -> None:
    native = made(tmp_path)
    (native / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"native folder, but has no manifest\.json") as caught:
        LLM(str(native))
    assert "convert" in caught.value.hint


def test_overrides_that_change_a_shape_are_refused(tmp_path: Path) -> None:
    native = made(tmp_path)
    with pytest.raises(UserError, match="do not fit the config"):
        LLM(str(native), hf_overrides={"moe_intermediate_size": 8})


def test_extra_tensors_are_listed_and_not_used(tmp_path: Path) -> None:
    hf_config = changed(V2_5, num_nextn_predict_layers=1)
    write_checkpoint(tmp_path / "hf", hf_config, random_tensors(hf_config, 11))
    native = converted(tmp_path / "hf", tmp_path / "native")
    said: list[str] = []
    logits = LLM(str(native), max_model_len=64, report=said.append).logits([1, 2, 3])
    assert any(re.match(r"not used: \d+ tensors, kept", line) for line in said)
    (native / "extra.safetensors").unlink()
    with pytest.raises(UserError, match=r"extra\.safetensors"):
        LLM(str(native))
    released = LLM(str(tmp_path / "hf"), max_model_len=64).logits([1, 2, 3])
    np.testing.assert_array_equal(logits, released)
