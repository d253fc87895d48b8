"""Matching a checkpoint with a model before a byte of data is read.

`match` pairs every parameter with its tensors and refuses, in one message, everything that does
not fit: missing and unexpected tensors, wrong shapes and dtypes, in groups with a count and one
example each. Names that differ only in layer or expert numbers form a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bailing_jax.config import ModelConfig
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.params import Param, Source, describe, unused_reason
from convert.safetensors_file import TensorInfo
from convert.strict_json import show

READABLE = ("float32", "bfloat16", "float16")
_LONGEST_NAME = 160  # characters of a name that messages show whole
_MTP_LAYER = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")


@dataclass(frozen=True)
class Match:
    """How a checkpoint fills a model.

    Attributes:
        params: each parameter with its sources and their tensors; None for an optional tensor
            the checkpoint does not have.
        unused: names of recognised tensors that are not used, by group.
        num_bytes: bytes to be read.
    """

    params: tuple[tuple[Param, tuple[tuple[Source, TensorInfo | None], ...]], ...]
    unused: Mapping[str, tuple[str, ...]]
    num_bytes: int


def match(config: ModelConfig, tensors: Mapping[str, TensorInfo], where: str) -> Match:
    """Pair parameters and tensors.

    Raises:
        UserError: anything missing, unexpected, of a wrong shape or an unreadable dtype.
    """
    problems: dict[str, list[str]] = {}
    used: set[str] = set()
    params = []
    for param in describe(config):
        pairs = []
        for source in param.sources:
            info = _find(source, tensors)
            if info is None and not source.optional:
                problems.setdefault("missing", []).append(source.name)
            elif info is not None:
                used.add(info.name)
                _check(source, info, problems)
            pairs.append((source, info))
        params.append((param, tuple(pairs)))
    unused = _unused(config, tensors, used, problems)
    if problems:
        raise UserError(
            f"{where}: the tensors do not fit {config.architecture}:\n"
            + "\n".join(_report(kind, names) for kind, names in problems.items()),
            "Check that config.json and the safetensors files come from the same release.",
            EXIT_USAGE,
        )
    num_bytes = sum(info.nbytes for _, pairs in params for _, info in pairs if info is not None)
    return Match(tuple(params), unused, num_bytes)


def _find(source: Source, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    names = (source.name, *source.aliases)
    return next((tensors[name] for name in names if name in tensors), None)


def _check(source: Source, info: TensorInfo, problems: dict[str, list[str]]) -> None:
    if info.shape != source.shape:
        kind = f"wrong shape (got {list(info.shape)}, want {list(source.shape)})"
        problems.setdefault(kind, []).append(info.name)
    elif str(info.dtype) not in READABLE:
        kind = f"dtype {info.dtype} (readable: {', '.join(READABLE)})"
        problems.setdefault(kind, []).append(info.name)


def _unused(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    used: set[str],
    problems: dict[str, list[str]],
) -> dict[str, tuple[str, ...]]:
    mtp_layers = {
        int(found[1])
        for name in tensors
        if (found := _MTP_LAYER.fullmatch(name)) and int(found[1]) >= config.num_layers
    }
    unused: dict[str, list[str]] = {}
    for name in tensors.keys() - used:
        group = unused_reason(config, name, mtp_layers)
        if group is None:
            problems.setdefault("unexpected", []).append(name)
        else:
            unused.setdefault(group, []).append(name)
    return {group: tuple(sorted(names)) for group, names in sorted(unused.items())}


def _report(kind: str, names: Iterable[str]) -> str:
    groups: dict[str, list[str]] = {}
    # One tensor may fill two parameters; it counts once.
    for name in sorted(set(names)):
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return "\n".join(
        f"  {kind}: {len(group)} x {_plain(pattern)}, e.g. {_plain(group[0])}"
        for pattern, group in groups.items()
    )


def _plain(name: str) -> str:
    """A name as it is, unless it could write to the terminal or fill the screen."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else show(name)
