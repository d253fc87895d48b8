"""What a checkpoint holds and what its model costs to run: the figures of `convert inspect`.

`report` turns a config and the stored parameters into plain data that survives JSON, `text` turns
that data into lines for a reader. Owns the groups parameters are counted in and the arithmetic of
a request's memory. Must not open files or know a device: what is stored comes in as `Stored`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bailing_jax.config import ModelConfig
from bailing_jax.layer_plan import LayerSpec, layer_plan
from bailing_jax.params import Param

KV_ITEMSIZE = 2  # bfloat16, the dtype released models run in
STATE_ITEMSIZE = 4  # float32; a bfloat16 state halves it

GROUPS = (
    "embedding", "lightning attention", "gqa attention", "mla attention", "dense ffn", "router",
    "routed experts", "shared experts", "norms", "head",
)  # fmt: skip

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Of a path, in a layer with `layer.` for the prefix. The first that matches decides, so the norms
# inside attention are norms.
_PATTERNS = (
    (r"model\.norm\.weight|layer\.(attention\.)?\w+norm\.weight", "norms"),
    (r"layer\.attention\..+", "attention"),
    (r"layer\.mlp\.(gate|up|down)_proj\.weight", "dense ffn"),
    (r"layer\.mlp\.gate\.(weight|expert_bias)", "router"),
    (r"layer\.mlp\.experts\.(gate|up|down)_proj\.weight", "routed experts"),
    (r"layer\.mlp\.shared_experts\.(gate|up|down)_proj\.weight", "shared experts"),
    (r"model\.word_embeddings\.weight", "embedding"),
    (r"lm_head\.weight", "head"),
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_MLP_NAMES = {"dense": "dense", "moe": "experts"}


@dataclass(frozen=True)
class Stored:
    """One parameter as it lies in the checkpoint.

    Attributes:
        param: which one.
        nbytes: bytes it takes there; 0 for an optional one that is left out (it is zero then).
        dtype: numpy name, or "mixed" when its tensors differ.
    """

    param: Param
    nbytes: int
    dtype: str


def report(
    config: ModelConfig, kind: str, stored: Sequence[Stored], unused: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Everything there is to say about a checkpoint, as JSON-able data.

    Args:
        config: the model.
        kind: what sort of checkpoint it is: "Hugging Face" or "native".
        stored: every parameter of the model, in any order.
        unused: group of tensors that are not read -> (number of tensors, bytes).

    Returns:
        Counts are of elements, sizes in bytes. `groups` has every one of GROUPS, with zeros where
        the model has none; `dtypes` and `layers` have what occurs. `kv_equals_state_tokens` is
        the first context length whose KV cache is as large as the recurrent state, None for a
        model without such a state.

    Raises:
        ValueError: a parameter belongs to no group.
    """
    plan = layer_plan(config)
    members: dict[str, list[Stored]] = {group: [] for group in GROUPS}
    for item in stored:
        members[_group(item.param, plan)].append(item)
    groups = {group: _tally(items) for group, items in members.items()}
    present = [item for item in stored if item.nbytes]
    dtypes = sorted({item.dtype for item in present})
    layers = [f"{spec.attention} + {_MLP_NAMES[spec.mlp]}" for spec in plan]
    request = _request(config, plan)
    return {
        "kind": kind,
        "architecture": config.architecture,
        "model": {
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "max_positions": config.max_positions,
            "tie_embeddings": config.tie_embeddings,
            "decay_layer_offset": config.decay_layer_offset if request["state_bytes"] else None,
        },
        "layers": {name: layers.count(name) for name in dict.fromkeys(layers)},
        "attention_runs": _runs(spec.attention for spec in plan),
        "ffn_runs": _runs(_MLP_NAMES[spec.mlp] for spec in plan),
        "groups": groups,
        "total": _tally(stored),
        "active_parameters": _active(config, groups),
        "dtypes": {dtype: _tally([i for i in present if i.dtype == dtype]) for dtype in dtypes},
        "unused": {group: {"tensors": n, "bytes": size} for group, (n, size) in unused.items()},
        "request": request,
    }


def _group(param: Param, plan: Sequence[LayerSpec]) -> str:
    """The one of GROUPS a parameter is counted in; only the plan knows whose `dense` it is."""
    layer = _LAYER.match(param.path)
    number = int(layer[1]) if layer else 0
    name = f"layer.{param.path[layer.end() :]}" if layer else param.path
    group = next((group for pattern, group in _PATTERNS if re.fullmatch(pattern, name)), None)
    if group is None or number >= len(plan):
        raise ValueError(f"{param.path} is in no group of this model's parameters")
    return f"{plan[number].attention} attention" if group == "attention" else group


def _tally(items: Sequence[Stored]) -> dict[str, int]:
    parameters = sum(item.param.size for item in items)
    num_bytes = sum(item.nbytes for item in items)
    return {"arrays": len(items), "parameters": parameters, "bytes": num_bytes}


def _runs(names: Iterable[str]) -> list[list[Any]]:
    """[how many, name] of every run of equal names."""
    return [[len(list(run)), name] for name, run in groupby(names)]


def _active(config: ModelConfig, groups: Mapping[str, Mapping[str, int]]) -> int:
    """Parameters one token is multiplied with.

    Of the routed experts k of e count, of everything else all. Looking up a row of the embedding
    is no multiplication, so its table counts only where it is tied and serves as the head too.
    """
    count = {group: tally["parameters"] for group, tally in groups.items()}
    routed, moe = count["routed experts"], config.moe
    # Exact: every layer has all e experts.
    idle = routed - routed * moe.num_experts_per_token // moe.num_experts
    return sum(count.values()) - idle - (0 if config.tie_embeddings else count["embedding"])


def _request(config: ModelConfig, plan: Sequence[LayerSpec]) -> dict[str, int | None]:
    """Memory of one request, not rounded up to pages."""
    lightning_layers = sum(spec.attention == "lightning" for spec in plan)
    state = values = 0
    if (att := config.lightning) is not None:
        state = lightning_layers * att.num_heads * att.head_dim**2 * STATE_ITEMSIZE
    if (att := config.gqa) is not None:
        values = 2 * att.num_kv_heads * att.head_dim
    elif (att := config.mla) is not None:
        values = att.kv_lora_rank + att.rope_dim
    # Never 0: the last layer of every plan is a softmax layer.
    kv = (len(plan) - lightning_layers) * values * KV_ITEMSIZE
    return {
        "kv_bytes_per_token": kv,
        "state_bytes": state,
        "kv_equals_state_tokens": -(-state // kv) if state else None,
        "max_positions_bytes": kv * config.max_positions + state,
    }


def text(report: Mapping[str, Any]) -> str:
    """A report for a reader: aligned columns, at most 100 wide, sizes in binary units."""
    sections = (_model_lines, _layer_lines, _parameter_lines, _file_lines, _request_lines)
    return "\n\n".join("\n".join(section(report)) for section in sections)


def _model_lines(report: Mapping[str, Any]) -> list[str]:
    model, offset = report["model"], report["model"]["decay_layer_offset"]
    rows = [
        ("hidden size", f"{model['hidden_size']:,}"),
        ("vocabulary", f"{model['vocab_size']:,}"),
        ("max positions", f"{model['max_positions']:,}"),
        ("tied embeddings", "yes" if model["tie_embeddings"] else "no"),
    ]
    if offset is not None:
        rows.append(("decay layer offset", f"{offset}"))
    return [f"{report['architecture']}, {report['kind']} checkpoint", *_table(rows)]


def _layer_lines(report: Mapping[str, Any]) -> list[str]:
    return [
        f"{report['model']['num_layers']:,} layers",
        *_table([(name, f"{count:,}") for name, count in report["layers"].items()]),
        f"  attention in order     {_picture(report['attention_runs'])}",
        f"  feed-forward in order  {_picture(report['ffn_runs'])}",
    ]


def _picture(runs: Sequence[Sequence[Any]]) -> str:
    """Runs in words, equal pairs of them once: `9 x (7 lightning, 1 mla), 7 lightning, 3 mla`."""
    words = [f"{count} {name}" for count, name in runs]
    pairs = (", ".join(words[i : i + 2]) for i in range(0, len(words), 2))
    counted = ((pair, len(list(same))) for pair, same in groupby(pairs))
    return ", ".join(pair if n == 1 else f"{n} x ({pair})" for pair, n in counted)


def _parameter_lines(report: Mapping[str, Any]) -> list[str]:
    total, active = report["total"], report["active_parameters"]
    tallies = {group: tally for group, tally in report["groups"].items() if tally["arrays"]}
    tallies["total"] = total
    rows = [(name, t["parameters"], _size(t["bytes"])) for name, t in tallies.items()]
    rows.append(("active a token", active, ""))
    *lines, last = _table(
        [(name, f"{n:,}", f"{n / total['parameters']:.1%}", size) for name, n, size in rows]
    )
    tied = report["model"]["tie_embeddings"]
    last += "  with the embedding, as head" if tied else "  without embedding lookup"
    return ["Parameters", *lines, last]


def _file_lines(report: Mapping[str, Any]) -> list[str]:
    dtypes, unused = report["dtypes"], report["unused"]
    rows = [(name, "arrays", f"{t['arrays']:,}", _size(t["bytes"])) for name, t in dtypes.items()]
    # Several tensors may make an array, so the two are counted apart.
    for group in unused.values():
        rows.append(("not read", "tensors", f"{group['tensors']:,}", _size(group["bytes"])))
    names = [""] * len(dtypes) + [f"  {name}" for name in unused]
    return ["Stored", *(line + name for line, name in zip(_table(rows), names, strict=True))]


def _request_lines(report: Mapping[str, Any]) -> list[str]:
    request, positions = report["request"], report["model"]["max_positions"]
    equal, size = request["kv_equals_state_tokens"], _size(request["max_positions_bytes"])
    lines = [f"KV cache         {request['kv_bytes_per_token']:,} bytes a token in bfloat16"]
    if equal is None:
        lines.append("recurrent state  none, as no layer is lightning: only the KV cache counts")
    else:
        lines.append(f"recurrent state  {_size(request['state_bytes'])} in float32")
        lines.append(f"crossover        at {equal:,} tokens the KV cache is as large as the state")
    lines.append(f"together         {size} at {positions:,} tokens, the max positions")
    return ["Memory of a request", *(f"  {line}" for line in lines)]


def _size(num_bytes: int) -> str:
    """Bytes in the largest binary unit of which there is at least one."""
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{num_bytes / 1024**power:,.{2 if power else 0}f} {_UNITS[power]}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns: the first to the left, the others to the right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([name.ljust(first), *map(str.rjust, rest, widths)] for name, *rest in rows)
    return ["  ".join(["", *row]).rstrip() for row in cells]
