"""Fresh checkpoints with all a release may hold, and what their native folders must hold.

`draw_checkpoint` is a hypothesis strategy; `native_arrays` makes the parameters of a checkpoint
from its names alone, in plain numpy, and shares no code with the converter.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_configs import LINEAR_V2, changed
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from random_checkpoints import draw_config, random_tensors
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.native import open_native

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), BFLOAT16, np.dtype(np.float16))
ALIGNMENT, PAGE = 64, 4096
EXTRA = "extra.safetensors"
SIDE_FILES = {
    "LICENSE": b"Licence\n\xff no UTF-8, and none of our business",
    "README.md": "# 百灵\r\nno newline at the end".encode(),
    "chat_template.jinja": b"{{ messages }}\n\n",
    "generation_config.json": b'{"eos_token_id":   [1, 2] }\n',
}
EXAMPLES = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A checkpoint as it is stored: `tensors` by the names and with the dtypes of its files."""

    config: dict[str, Any]
    tensors: Arrays
    shards: int = 1

    def __repr__(self) -> str:
        return f"Checkpoint({self.config}, {len(self.tensors)} tensors, {self.shards} shards)"

    def write(self, folder: Path) -> Path:
        """Write config.json, spaced as no converter would, weights, side files and code."""
        folder.mkdir(parents=True)
        text = json.dumps(self.config, indent=3).replace("\n", "\r\n")
        (folder / "config.json").write_bytes(text.encode() + b"  \n\n")
        for name, content in SIDE_FILES.items():
            (folder / name).write_bytes(content)
        (folder / "modeling_bailing_moe.py").write_text("raise SystemExit('never run')\n")
        if self.shards == 1:
            save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map: dict[str, str] = {}
        for number, names in enumerate(np.array_split(sorted(self.tensors), self.shards), 1):
            file = f"model-{number:05d}-of-{self.shards:05d}.safetensors"
            save_file({str(name): self.tensors[str(name)] for name in names}, folder / file)
            weight_map |= {str(name): file for name in names}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
        return folder

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, np.ndarray]) -> Checkpoint:
        """The same with tensors added or replaced."""
        return replace(self, tensors={**self.tensors, **tensors})


def checkpoint(architecture: str, seed: str, shards: int = 1, **changes: object) -> Checkpoint:
    """A checkpoint in bfloat16 of a small config written by hand, with an MTP layer."""
    mtp = 0 if architecture == LINEAR_V2 else 1
    small = {"num_hidden_layers": 3, "num_experts": 4, "n_group": 2, "topk_group": 1}
    small |= {"num_experts_per_tok": 2, "num_nextn_predict_layers": mtp}
    config = changed(architecture, **(small | changes))
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    tensors = random_tensors(config, zlib.crc32(seed.encode()))
    return Checkpoint(config, {n: stored_as(t, BFLOAT16, rng) for n, t in tensors.items()}, shards)


@st.composite
def draw_checkpoint(draw: st.DrawFn, dtypes: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint with aliases, left-out and extra tensors; one of `dtypes`, or a mixture too."""
    config = draw(draw_config())
    rng = np.random.default_rng(zlib.crc32(json.dumps(config).encode()))
    biased = "kv_lora_rank" in config and config["use_qkv_bias"]
    kv_a_bias = biased and draw(st.booleans())
    tensors = random_tensors(config, int(rng.integers(2**32)), kv_a_bias=kv_a_bias)
    tensors = {_renamed(name, set(tensors), rng): value for name, value in tensors.items()}
    if config["tie_word_embeddings"] and draw(st.booleans()):
        tensors["lm_head.weight"] = rng.standard_normal(
            tensors["model.word_embeddings.weight"].shape
        )
    kind = draw(st.sampled_from(dtypes or ("float32", "bfloat16", "float16", "mixed", "mixed")))
    kinds = FLOATS if kind == "mixed" else (np.dtype(kind),)
    stored = {n: stored_as(t, kinds[rng.integers(len(kinds))], rng) for n, t in tensors.items()}
    if draw(st.booleans()):
        stored |= _extras(rng)
    return Checkpoint(config, stored, draw(st.sampled_from([1, 1, 2, 5])))


def _renamed(name: str, names: set[str], rng: np.random.Generator) -> str:
    """The name, or another that exporters give the same tensor."""
    prefix = name.removesuffix("gate.expert_bias")
    if prefix != name:
        ends = ("gate.expert_bias", "gate.e_score_correction_bias", "experts.expert_bias")
        return prefix + ends[rng.integers(3)]
    latent = name.partition(".dense.")[0] + ".kv_b_proj.weight"
    return name.replace(".dense.", ".o_proj.") if latent in names and rng.integers(2) else name


def stored_as(values: np.ndarray, dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Rounded, with some values that careless copies lose: -0, subnormals, the largest allowed."""
    values = values.astype(dtype)
    limits = ml_dtypes.finfo(dtype)
    large = limits.max if dtype == np.float16 else 1e30
    odd = np.array([-0.0, limits.smallest_subnormal, -limits.smallest_normal, large], dtype)
    places = rng.choice(values.size, min(4, values.size // 3), replace=False)
    values.reshape(-1)[places] = odd[: len(places)]
    return values


def _extras(rng: np.random.Generator) -> Arrays:
    """Recognised tensors that no model uses, of dtypes and shapes that no weight has."""
    return {
        "model.layers.0.attention.rotary_emb.inv_freq": rng.standard_normal(5),
        "model.layers.0.attention.slope": rng.standard_normal((3, 1, 1)).astype(np.float16),
        "model.rotary_emb.inv_freq": rng.standard_normal(7).astype(BFLOAT16),
        "model.mtp.position_ids": rng.integers(-(2**62), 2**62, (1, 3)),
        "model.mtp.mask": rng.integers(0, 2, 9).astype(bool),
        "model.mtp.empty": np.zeros((0, 3), np.float32),
        "model.mtp.scale": np.array(rng.standard_normal(), np.float32),
    }


# ---- what the native folder must hold


def native_arrays(source: Checkpoint, dtype: str = "keep") -> dict[str, Arrays]:
    """File -> name -> array: what hf-to-native must make of a checkpoint."""
    files: dict[str, Arrays] = {}
    used: Arrays = {}
    for name, tensor in source.tensors.items():
        if is_extra(source, name):
            files.setdefault(EXTRA, {})[name] = tensor
        else:
            used[_plain_name(name)] = tensor
    for path, array in _parameters(source.config, used):
        if ".mlp.gate." in path:
            array = array.astype(np.float32)
        elif dtype != "keep":
            array = array.astype(np.dtype(dtype))
        files.setdefault(native_file(path), {})[path] = np.ascontiguousarray(array)
    return files


def is_extra(source: Checkpoint, name: str) -> bool:
    """Whether a tensor is one the model does not use."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return (
        name.startswith("model.mtp")
        or name.endswith((".inv_freq", ".slope"))
        or (layer is not None and int(layer[1]) >= source.config["num_hidden_layers"])
        or (name == "lm_head.weight" and source.config["tie_word_embeddings"])
    )


def native_file(path: str) -> str:
    """The file a parameter belongs in."""
    parts = path.split(".")
    if parts[1] == "layers":
        return f"layer-{int(parts[2]):03d}.safetensors"
    return "embed.safetensors" if parts[1] == "word_embeddings" else "head.safetensors"


def _plain_name(name: str) -> str:
    name = name.replace(".gate.e_score_correction_bias", ".gate.expert_bias")
    name = name.replace(".experts.expert_bias", ".gate.expert_bias")
    return name.replace(".attention.o_proj.", ".attention.dense.")


def _parameters(config: Mapping[str, Any], used: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Linear weights as [in, out], experts stacked, kv_b cut in two, everything else as it is."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in used.items():
        expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(.*)", name)
        if expert:
            stack = stacks.setdefault(f"{expert[1]}.{expert[3]}", [tensor] * config["num_experts"])
            stack[int(expert[2])] = tensor
        elif name.endswith(".kv_b_proj.weight"):
            heads = tensor.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            nope = config["qk_nope_head_dim"]
            path = name.removesuffix("weight")
            yield f"{path}key_weight", heads[:, :nope]
            yield f"{path}value_weight", heads[:, nope:].swapaxes(1, 2)
        else:
            embedding = name == "model.word_embeddings.weight"
            yield name, tensor if tensor.ndim == 1 or embedding else tensor.T
        bias = name.replace("kv_a_layernorm.weight", "kv_a_proj_with_mqa.bias")
        if bias != name and config["use_qkv_bias"] and bias not in used:
            yield bias, np.zeros(config["kv_lora_rank"] + config["qk_rope_head_dim"], np.float32)
    for path, stack in stacks.items():
        kinds = {expert.dtype for expert in stack}
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        yield path, np.stack([expert.T.astype(kind) for expert in stack])


# ---- folders


def convert(command: str, *args: str | Path) -> None:
    """Run a command of the converter, which must succeed."""
    assert main([command, *map(str, args)]) == 0


def converted(source: Checkpoint, place: Path, *flags: str) -> tuple[Path, Path]:
    """Write a checkpoint and convert it: both folders."""
    folder = source.write(place / "hf")
    convert("hf-to-native", folder, place / "native", *flags)
    return folder, place / "native"


def restored(native: Path) -> Path:
    """Convert a native folder back: the folder made beside it."""
    folder = native.parent / "restored"
    convert("native-to-hf", native, folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def loaded(folder: Path) -> Arrays:
    """All tensors of all files of a folder, as the safetensors package reads them."""
    tensors: Arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def assert_same_arrays(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(wanted)
    for name, want in wanted.items():
        got = found[name]
        assert (name, got.dtype, got.shape) == (name, want.dtype, want.shape)
        assert got.tobytes() == want.tobytes(), name


def sha256(content: bytes | np.ndarray) -> str:
    """The digest of bytes, or of an array's."""
    data = content if isinstance(content, bytes) else content.tobytes()
    return hashlib.sha256(data).hexdigest()


# ---- faults and what is said of them


class Said:
    """What a command printed, and its exit code; `problems` are its errors, a line each."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: str | Path) -> None:
        capsys.readouterr()
        self.code = main([*map(str, args)])
        self.out, self.err = capsys.readouterr()
        self.problems = [line.removeprefix("error: ") for line in self.err.splitlines()]


def alter(
    native: Path, name: str, change: Callable[[np.ndarray], object], hashed: bool = True
) -> None:
    """Change a tensor of a native folder in place; the manifest's hash follows if `hashed`."""
    with open_native(native) as opened:
        info = {**opened.params, **opened.extra}[name].info
    raw = bytearray(info.file.read_bytes())
    array = np.frombuffer(memoryview(raw)[info.start : info.end], info.dtype).reshape(info.shape)
    change(array)
    info.file.write_bytes(raw)
    if hashed:
        path = native / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert manifest["tensors"][name]["sha256"] != sha256(array)
        manifest["tensors"][name]["sha256"] = sha256(array)
        path.write_text(json.dumps(manifest), encoding="utf-8")


def flip(array: np.ndarray) -> None:
    """The lowest bit of the middle element."""
    data = array.reshape(-1).view(np.uint8)
    data[data.size // 2 // array.itemsize * array.itemsize] ^= 1


def with_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def put(*keys: str, value: object) -> Callable[[Any], object]:
    """Sets an entry of the manifest; the entries above it must exist."""

    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[Any], object]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change
