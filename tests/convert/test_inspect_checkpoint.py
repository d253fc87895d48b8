"""What `convert inspect` says: laws over random configs, and figures worked out by hand.

The groups are checked against checkpoint names from random_checkpoints, memory against the state
the engine allocates; neither shares code with the report.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from goldens import GOLDEN
from hf_configs import LINEAR_V2, V2, V2_5, read
from hypothesis import HealthCheck, Phase, given, settings
from random_checkpoints import draw_config, tensor_shapes
from reference_numpy import layer_kinds

from bailing_jax.config import ModelConfig
from bailing_jax.params import Param, describe
from bailing_jax.presets import PRESETS
from bailing_jax.state import PAGE_SIZE, StateSpec, leaf_shapes, state_bytes
from convert.inspect_checkpoint import GROUPS, Stored, report, text

# A drawn YaRN factor may contradict the drawn length; that is test_config_rope's business.
pytestmark = pytest.mark.filterwarnings("ignore::bailing_jax.config.ConfigWarning")

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
UNUSED = {
    "MTP (next-token prediction layers are not run)": (1045, 34_567_890_123),
    "buffers (computed from the config)": (3, 12),
}
DTYPES = ("bfloat16", "float32", "mixed")


def stored(config: ModelConfig) -> list[Stored]:
    """Every parameter in its model dtype."""
    return [
        Stored(p, p.size * 4, "float32")
        if p.dtype == "float32"
        else Stored(p, p.size * 2, "bfloat16")
        for p in describe(config)
    ]


def odd(config: ModelConfig) -> list[Stored]:
    """Bytes and dtypes that follow from nothing else: bytes are no multiple of the size."""
    return [
        Stored(param, 7 + 10 * i + param.size, DTYPES[i * i % 3])
        for i, param in enumerate(describe(config))
    ]


def inspected(config: ModelConfig) -> dict[str, Any]:
    return report(config, "native", odd(config), UNUSED)


def preset(name: str) -> dict[str, Any]:
    config = ModelConfig.from_hf(PRESETS[name].hf_config)
    return report(config, "Hugging Face", stored(config), {})


def counts(found: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of every group there is."""
    return {g: t["parameters"] for g, t in found["groups"].items() if t["parameters"]}


def line_of(found: Mapping[str, Any], name: str) -> str:
    """The only line that starts with a name, its columns one blank apart, without the name."""
    lines = [" ".join(line.split()) for line in text(found).splitlines()]
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return line.removeprefix(f"{name} ")


# ---- parameters


def named_group(name: str, kinds: Sequence[str]) -> str:
    """The group a checkpoint tensor's name asks for."""
    if name.endswith("norm.weight"):
        return "norms"
    for part, group in (
        ("word_embeddings", "embedding"),
        ("lm_head", "head"),
        (".shared_experts.", "shared experts"),
        (".experts.", "routed experts"),
        (".gate.", "router"),
        (".mlp.", "dense ffn"),
    ):
        if part in name:
            return group
    return f"{kinds[int(name.split('.')[2])]} attention"


def checkpoint(hf_config: Mapping[str, Any]) -> dict[str, int]:
    """Elements of every tensor a model may use."""
    biased = "kv_lora_rank" in hf_config and hf_config["use_qkv_bias"]
    shapes = tensor_shapes({**hf_config, "num_nextn_predict_layers": 0}, kv_a_bias=biased)
    return {name: math.prod(shape) for name, shape in shapes.items()}


@EXAMPLES
@given(hf_config=draw_config())
def test_groups_have_the_checkpoints_elements(hf_config: dict[str, Any]) -> None:
    want: Counter[str] = Counter()
    for name, size in checkpoint(hf_config).items():
        want[named_group(name, layer_kinds(hf_config))] += size
    found = inspected(ModelConfig.from_hf(hf_config))
    assert counts(found) == want
    assert tuple(found["groups"]) == GROUPS


@EXAMPLES
@given(hf_config=draw_config())
def test_groups_and_dtypes_add_up_to_the_model(hf_config: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(hf_config)
    found, items = inspected(config), odd(config)
    want = {
        "arrays": len(describe(config)),
        "parameters": sum(math.prod(param.shape) for param in describe(config)),
        "bytes": sum(item.nbytes for item in items),
    }
    assert found["total"] == want
    for parts in (found["groups"], found["dtypes"]):
        assert {key: sum(part[key] for part in parts.values()) for key in want} == want
    for dtype, tally in found["dtypes"].items():
        assert tally["bytes"] == sum(item.nbytes for item in items if item.dtype == dtype)


@EXAMPLES
@given(hf_config=draw_config())
def test_active_parameters_are_those_of_the_first_experts(hf_config: dict[str, Any]) -> None:
    """As if a token's k experts were always the first k; an untied embedding is a lookup."""
    active = 0
    for name, size in checkpoint(hf_config).items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        idle = expert is not None and int(expert[1]) >= hf_config["num_experts_per_tok"]
        lookup = name.startswith("model.word_emb") and not hf_config["tie_word_embeddings"]
        active += 0 if idle or lookup else size
    assert inspected(ModelConfig.from_hf(hf_config))["active_parameters"] == active


# name: billions published, all and active without one of the two embeddings (the mean of the
# published counts with and without both), and half of the last published digit.
PUBLISHED = {
    "ling-mini-2.0": (16.256, (1.433 + 0.789) / 2, 0.0005),
    "ling-flash-2.0": (102.890, (6.152 + 4.865) / 2, 0.0005),
    "ling-1t": (999.705, (51.054 + 48.479) / 2, 0.0005),
    "ring-mini-linear-2.0": (16.423, (1.601 + 0.957) / 2, 0.0005),
    "ring-flash-linear-2.0": (104.182, (7.444 + 6.157) / 2, 0.0005),
    "ling-2.6-flash": (104.187, (7.449 + 6.162) / 2, 0.0005),
    "ling-2.6-1t": (1012.2, (63.6 + 61.0) / 2, 0.05),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_models_have_the_published_counts(name: str) -> None:
    total, active, half_digit = PUBLISHED[name]
    found = preset(name)
    assert found["total"]["parameters"] / 1e9 == pytest.approx(total, rel=0, abs=half_digit)
    assert found["active_parameters"] / 1e9 == pytest.approx(active, rel=0, abs=half_digit)


def test_v2_by_hand() -> None:
    """ling-mini-2.0: hidden 2048, 20 layers, 16 heads and 4 kv heads of 128, 8 of 256 experts."""
    found = preset("ling-mini-2.0")
    assert counts(found) == {
        "embedding": 157184 * 2048,
        "gqa attention": 20 * (2048 * (16 + 2 * 4) * 128 + 2048 * 2048),
        "dense ffn": 3 * 2048 * 5120,
        "router": 19 * (2048 * 256 + 256),
        "routed experts": 19 * 256 * 3 * 2048 * 512,
        "shared experts": 19 * 3 * 2048 * 512,
        "norms": 20 * (2 * 2048 + 2 * 128) + 2048,
        "head": 157184 * 2048,
    }
    assert found["layers"] == {"gqa + dense": 1, "gqa + experts": 19}
    assert found["request"] == {
        "kv_bytes_per_token": 40_960,  # 20 layers x 2 x 4 x 128 values x 2 bytes
        "state_bytes": 0,
        "kv_equals_state_tokens": None,
        "max_positions_bytes": 1_342_177_280,  # 32768 tokens
    }
    assert found["groups"]["router"]["bytes"] == 4 * 9_966_336
    assert found["dtypes"]["float32"] == {
        "arrays": 38, "parameters": 9_966_336, "bytes": 39_865_344
    }  # fmt: skip


def test_linear_v2_by_hand() -> None:
    """ring-mini-linear-2.0: as ling-mini-2.0, but four of five layers are lightning."""
    found = preset("ring-mini-linear-2.0")
    got = counts(found)
    assert got["lightning attention"] == 16 * 5 * 2048 * 2048
    assert got["gqa attention"] == 4 * (2048 * 24 * 128 + 2048 * 2048)
    assert got["norms"] == 16 * (2048 + 2 * 128) + 4 * 2 * 128 + 20 * 2 * 2048 + 2048
    assert found["layers"] == {
        "lightning + dense": 1, "lightning + experts": 15, "gqa + experts": 4
    }  # fmt: skip
    assert found["request"] == {
        "kv_bytes_per_token": 8_192,  # 4 layers x 2 x 4 x 128 values x 2 bytes
        "state_bytes": 16_777_216,  # 16 layers x 16 heads x 128 x 128 x 4 bytes
        "kv_equals_state_tokens": 2_048,
        "max_positions_bytes": 1_090_519_040,  # 131072 tokens
    }


def test_v2_5_by_hand() -> None:
    """ling-2.6-flash: hidden 4096, 32 layers and heads, every eighth layer mla of rank 512 + 64."""
    found = preset("ling-2.6-flash")
    got = counts(found)
    assert got["lightning attention"] == 28 * 5 * 4096 * 4096
    query, latent = 4096 * 1536 + 1536 * 32 * (128 + 64), 4096 * (512 + 64)
    assert got["mla attention"] == 4 * (query + latent + 512 * 32 * (128 + 128) + 4096 * 4096)
    lightning_norms, mla_norms = 28 * (4096 + 2 * 128), 4 * (1536 + 512)
    assert got["norms"] == lightning_norms + mla_norms + 32 * 2 * 4096 + 4096
    assert found["layers"] == {
        "lightning + dense": 1, "lightning + experts": 27, "mla + experts": 4
    }  # fmt: skip
    assert found["request"] == {
        "kv_bytes_per_token": 4_608,  # 4 layers x 576 values x 2 bytes
        "state_bytes": 58_720_256,  # 28 layers x 32 heads x 128 x 128 x 4 bytes
        "kv_equals_state_tokens": 12_744,  # 12743.1
        "max_positions_bytes": 662_700_032,  # 131072 tokens
    }


STRANGERS = (
    "model.layers.1.attention",
    "model.layers.1.mlp.norm.weight",
    "model.layers.1.mlp.gate.bias",
    "model.layers.1.mlp.gate.weight_scale",
    "model.layers.1.mlp.experts.3.up_proj.weight",
    "model.layers.1.mlp.shared_experts.gate.weight",
    "model.layers.7.attention.dense.weight",  # the model has layers 0 to 6
    "model.layers.norm.weight",
    "model.extra.weight",
    "lm_head.bias",
    "attention.dense.weight",
)


@pytest.mark.parametrize("path", STRANGERS)
def test_a_parameter_of_no_group_is_an_error(path: str) -> None:
    config = read(V2_5)
    stranger = Stored(Param(path, (3, 5), ("embed", "heads"), ()), 30, "bfloat16")
    with pytest.raises(ValueError, match=rf"^{re.escape(path)} is in no group"):
        report(config, "native", [*stored(config), stranger], {})


def test_an_optional_parameter_left_out_has_no_dtype() -> None:
    """The model has the bias of kv_a_proj all the same, as zeros."""
    config = read(V2_5, use_qkv_bias=True)
    items = [
        Stored(i.param, 0, "float16") if "kv_a_proj_with_mqa.bias" in i.param.path else i
        for i in stored(config)
    ]
    assert sum(item.nbytes == 0 for item in items) == 3
    whole = report(config, "native", stored(config), {})
    found = report(config, "native", items, {})
    assert set(found["dtypes"]) == {"bfloat16", "float32"}
    assert counts(found) == counts(whole)
    assert found["total"]["parameters"] == whole["total"]["parameters"]
    left_out = 3 * (31 + 8)
    assert found["total"]["bytes"] == whole["total"]["bytes"] - 2 * left_out
    assert found["dtypes"]["bfloat16"]["parameters"] == (
        whole["dtypes"]["bfloat16"]["parameters"] - left_out
    )


# ---- layers


@EXAMPLES
@given(hf_config=draw_config())
def test_layers_are_all_counted_and_in_order(hf_config: dict[str, Any]) -> None:
    kinds, dense = layer_kinds(hf_config), hf_config["first_k_dense_replace"]
    mlps = ["dense"] * dense + ["experts"] * (len(kinds) - dense)
    found = inspected(ModelConfig.from_hf(hf_config))
    assert found["layers"] == Counter(f"{a} + {m}" for a, m in zip(kinds, mlps, strict=True))
    assert sum(found["layers"].values()) == found["model"]["num_layers"] == len(kinds)
    for key, want in (("attention_runs", kinds), ("ffn_runs", mlps)):
        names = [name for _, name in found[key]]
        assert all(a != b for a, b in pairwise(names))
        assert [name for count, name in found[key] for _ in range(count)] == want
    assert expanded(line_of(found, "attention in order")) == kinds
    assert expanded(line_of(found, "feed-forward in order")) == mlps


def expanded(picture: str) -> list[str]:
    """`2 x (1 a, 2 b), 1 a` as a, b, b, a, b, b, a."""
    repeated = re.compile(r"(\d+) x \(([^()]+)\)")
    plain = repeated.sub(lambda m: ", ".join([m[2]] * int(m[1])), picture)
    runs = [run.split() for run in plain.split(", ")]
    return [name for count, name in runs for _ in range(int(count))]


@pytest.mark.parametrize(
    ("layers", "group", "picture"),
    [
        (80, 8, "10 x (7 lightning, 1 gqa)"),
        (10, 3, "2 x (2 lightning, 1 gqa), 2 lightning, 2 gqa"),
        (4, 3, "2 lightning, 2 gqa"),
        (5, 9, "5 gqa"),
    ],
)
def test_equal_groups_are_drawn_once(layers: int, group: int, picture: str) -> None:
    config = read(LINEAR_V2, num_hidden_layers=layers, layer_group_size=group)
    assert line_of(inspected(config), "attention in order") == picture


# ---- memory of a request


@EXAMPLES
@given(hf_config=draw_config())
def test_request_is_what_the_engine_allocates(hf_config: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(hf_config)
    request = inspected(config)["request"]
    kv, state = request["kv_bytes_per_token"], request["state_bytes"]
    spec = StateSpec(num_slots=1, num_pages=1, page_dtype="bfloat16")
    assert state_bytes(config, spec) == PAGE_SIZE * kv + state
    leaves = leaf_shapes(config, StateSpec(1, 1, "bfloat16", page_size=1))
    split = Counter[str]()
    for leaf in leaves:
        split[str(leaf.dtype)] += math.prod(leaf.shape) * leaf.dtype.itemsize
    assert split == Counter(bfloat16=kv, float32=state)
    assert request["max_positions_bytes"] == config.max_positions * kv + state
    tokens = request["kv_equals_state_tokens"]
    if "lightning" in layer_kinds(hf_config):
        assert (tokens - 1) * kv < state <= tokens * kv
    else:
        assert state == 0
        assert tokens is None


NO_STATE = "none, as no layer is lightning: only the KV cache counts"


@pytest.mark.parametrize(
    "config",
    [read(V2), read(V2_5, layer_group_size=8), read(LINEAR_V2, layer_group_size=1)],
    ids=["v2", "group larger than the model", "groups of one"],
)
def test_a_model_without_lightning_layers_has_no_crossover(config: ModelConfig) -> None:
    found = inspected(config)
    assert found["request"]["kv_equals_state_tokens"] is None
    assert found["request"]["kv_bytes_per_token"] > 0
    assert found["model"]["decay_layer_offset"] is None
    assert line_of(found, "recurrent state") == NO_STATE
    assert "crossover" not in text(found)
    assert "decay" not in text(found)


# ---- the text


@pytest.mark.parametrize("offset", [0, 1])
def test_the_decay_layer_offset_is_said(offset: int) -> None:
    found = inspected(read(V2_5, decay_layer_offset=offset))
    assert found["model"]["decay_layer_offset"] == offset
    assert line_of(found, "decay layer offset") == str(offset)
    assert NO_STATE not in text(found)


@EXAMPLES
@given(hf_config=draw_config())
def test_every_figure_has_its_line(hf_config: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(hf_config)
    found = inspected(config)
    lines = text(found).splitlines()
    assert all(len(line) <= 100 and line == line.rstrip() for line in lines)
    assert lines[0] == f"{config.architecture}, native checkpoint"
    model = found["model"]
    assert line_of(found, "vocabulary") == f"{config.vocab_size:,}"
    assert line_of(found, "hidden size") == f"{config.hidden_size:,}"
    assert line_of(found, "max positions") == f"{config.max_positions:,}"
    assert line_of(found, "tied embeddings") == ("yes" if config.tie_embeddings else "no")
    for name, count in found["layers"].items():
        assert line_of(found, name) == str(count)
    groups = counts(found)
    for name, count in (*groups.items(), ("total", found["total"]["parameters"])):
        share = f"{count / found['total']['parameters']:.1%}"
        assert line_of(found, name).startswith(f"{count:,} {share} ")
    assert line_of(found, "active a token").startswith(f"{found['active_parameters']:,} ")
    for name, tally in found["dtypes"].items():
        assert line_of(found, name).startswith(f"arrays {tally['arrays']:,} ")
    has_state = found["request"]["kv_equals_state_tokens"] is not None
    assert (model["decay_layer_offset"] is not None) == has_state
    # Headings, blank lines, and what has been looked for above and below.
    fixed = 5 + 4 + (4 + 2 + 2 + 3)
    listed = len(found["layers"]) + len(groups) + len(found["dtypes"]) + len(UNUSED)
    assert len(lines) == fixed + listed + 2 * has_state
    assert line_of(found, "KV cache").startswith(f"{found['request']['kv_bytes_per_token']:,} b")
    assert f" at {config.max_positions:,} tokens" in line_of(found, "together")


@pytest.mark.parametrize("tied", [False, True])
def test_active_parameters_say_what_they_count(tied: bool) -> None:
    line = line_of(inspected(read(V2, tie_word_embeddings=tied)), "active a token")
    assert line.endswith("% with the embedding, as head" if tied else "% without embedding lookup")


def test_unused_tensors_are_listed_with_count_and_size() -> None:
    found = inspected(read(V2))
    assert found["unused"] == {
        "MTP (next-token prediction layers are not run)": {
            "tensors": 1045, "bytes": 34_567_890_123
        },
        "buffers (computed from the config)": {"tensors": 3, "bytes": 12},
    }  # fmt: skip
    lines = [" ".join(line.split()) for line in text(found).splitlines()]
    assert [line for line in lines if line.startswith("not read")] == [
        "not read tensors 1,045 32.19 GiB MTP (next-token prediction layers are not run)",
        "not read tensors 3 12 B buffers (computed from the config)",
    ]
    assert "not read" not in text(preset("ling-mini-2.0"))


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (2**20, "1.00 MiB"),
        (5 * 2**29, "2.50 GiB"),
        (2**40, "1.00 TiB"),
        (3 * 2**50, "3,072.00 TiB"),
    ],
)
def test_sizes_have_binary_units(num_bytes: int, shown: str) -> None:
    config = read(V2)
    found = report(config, "native", stored(config), {"group": (1, num_bytes)})
    assert line_of(found, "not read") == f"tensors 1 {shown} group"


@EXAMPLES
@given(hf_config=draw_config())
def test_report_survives_json_and_order(hf_config: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(hf_config)
    found = inspected(config)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert text(again) == text(found)
    backwards = report(config, "native", odd(config)[::-1], UNUSED)
    assert json.dumps(backwards) == json.dumps(found)
    assert (found["kind"], found["architecture"]) == ("native", config.architecture)


def test_the_largest_release_fits_the_page() -> None:
    config = ModelConfig.from_hf(PRESETS["ling-2.6-1t"].hf_config)
    lines = text(report(config, "Hugging Face", stored(config), UNUSED)).splitlines()
    assert max(map(len, lines)) <= 100
    assert 25 <= len(lines) <= 40


GOLDEN_TEXT = """\
BailingMoeV2_5ForCausalLM, Hugging Face checkpoint
  hidden size           128
  vocabulary            512
  max positions       1,024
  tied embeddings        no
  decay layer offset      0

6 layers
  lightning + dense    1
  lightning + experts  3
  mla + experts        2
  attention in order     2 x (2 lightning, 1 mla)
  feed-forward in order  1 dense, 5 experts

Parameters
  embedding             65,536    7.1%  256.00 KiB
  lightning attention  327,680   35.3%    1.25 MiB
  mla attention        122,880   13.3%  480.00 KiB
  dense ffn             61,440    6.6%  240.00 KiB
  router                 5,160    0.6%   20.16 KiB
  routed experts       245,760   26.5%  960.00 KiB
  shared experts        30,720    3.3%  120.00 KiB
  norms                  2,528    0.3%    9.88 KiB
  head                  65,536    7.1%  256.00 KiB
  total                927,240  100.0%    3.54 MiB
  active a token       677,384   73.1%  without embedding lookup

Stored
  float32    arrays  94  3.54 MiB
  not read  tensors   4  4.00 KiB  buffers (computed from the config)

Memory of a request
  KV cache         256 bytes a token in bfloat16
  recurrent state  64.00 KiB in float32
  crossover        at 256 tokens the KV cache is as large as the state
  together         320.00 KiB at 1,024 tokens, the max positions"""


def test_a_whole_text() -> None:
    config = ModelConfig.from_hf(GOLDEN / "v2_5-mla")
    items = [Stored(param, 4 * param.size, "float32") for param in describe(config)]
    unused = {"buffers (computed from the config)": (4, 4096)}
    assert text(report(config, "Hugging Face", items, unused)) == GOLDEN_TEXT
