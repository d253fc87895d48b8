"""What the processes of a job must have in common, compared before any work starts.

Every process tells facts, each a name and a short value: versions, engine options, the variables
that change programs, and of the model what makes it: the fields of its JSON files, the sizes and
headers of its weight files, the manifest. Process 0 compares. A path is no fact, since a host may
keep its copy of a model anywhere. No jax.

A job has a `Group` for it. A program that calls an `LLM` in several processes has none: there each
process compares for itself (`agree_without_group`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import bailing_jax
from bailing_jax import distributed
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.group import Group

Facts = dict[str, str]

MAX_SHOWN = 20
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "tokenizers", "jinja2")
# Those that change what is compiled or when it runs.
_VARIABLES = (
    "BAILING_DEBUG", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS", "XLA_FLAGS",
)  # fmt: skip
_MAX_TEXT = 40
_HEADER_BYTES = 8
_MAX_HEADER = 100_000_000


def facts_of_installation(environ: Mapping[str, str] = os.environ) -> Facts:
    """Versions, and variables that matter."""
    facts = {
        "version of bailing_jax": bailing_jax.__version__,
        "version of Python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[f"version of {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[f"version of {package}"] = "not installed"
    return {**facts, **{name: environ.get(name, "not set") for name in _VARIABLES}}


def facts_of_values(values: Mapping[str, object], where: str = "") -> Facts:
    """One fact a value: short ones as JSON, long ones by their checksum."""
    return {where + name: _short(value) for name, value in values.items()}


def facts_of_engine(options: Mapping[str, object], folder: Path) -> Facts:
    """Everything that makes an engine but the device's memory: installation, options, model.

    Args:
        options: everything that is asked for, by name.
        folder: the model's; of a preset, which has none, its name.

    Raises:
        UserError: a file can't be read.
    """
    return {
        **facts_of_installation(),
        **facts_of_values(options, "option "),
        **facts_of_model(folder),
    }


def facts_of_model(folder: Path) -> Facts:
    """What makes the model in a folder; of a preset, which has none, its name.

    Raises:
        UserError: a file can't be read.
    """
    if not folder.is_dir():
        return {"model": str(folder)}
    facts: Facts = {}
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".safetensors":
                facts[path.name] = _header(path)
            elif path.suffix == ".json":
                facts |= _fields(path)
            elif path.suffix in (".jinja", ".model", ".txt"):
                facts[path.name] = _sum(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return facts


def agree(
    group: Group,
    facts: Facts,
    about: str,
    hint: str = "Give all of them the same command, installation and model.",
) -> None:
    """Compare this process' facts with everybody's; returns once they are known to be equal.

    Args:
        group: the processes.
        facts: what this one has.
        about: names the comparison; each has another name.
        hint: what to do about a difference.

    Raises:
        UserError: on process 0, whose end ends the others: host, field and both values.
    """
    if not group.leads:
        group.report(about, facts=facts)
        while group.next_order()["order"] != about:
            pass
        return
    reports = sorted(group.reports(about).items())
    theirs = {group.name(number): message["facts"] for number, message in reports}
    _require_equal(group.name(), facts, theirs, hint)
    group.order(about)


_without_group = itertools.count(1)


def agree_without_group(facts: Facts, hint: str) -> None:
    """`agree` over jax.distributed alone; every process must make the same calls in one order.

    Raises:
        UserError: on every process, if one differs from process 0: host, field and both values. Or
            one does not come.
    """
    own = json.dumps({"host": socket.gethostname(), "facts": facts})
    told = distributed.told_by_all(f"facts {next(_without_group)}", own)
    all_facts = {
        f"process {number} of {len(told)} ({found['host']})": found["facts"]
        for number, found in enumerate(map(json.loads, told))
    }
    first = next(iter(all_facts))
    _require_equal(first, all_facts.pop(first), all_facts, hint)


def _require_equal(name: str, facts: Facts, others: Mapping[str, Facts], hint: str) -> None:
    """Compare the facts of process `name` with those of the others, by their names."""
    differences = [
        f"{other}: {field} = {theirs.get(field, 'missing')}; "
        f"{name} has {facts.get(field, 'missing')}"
        for other, theirs in others.items()
        for field in sorted(facts.keys() | theirs.keys())
        if theirs.get(field) != facts.get(field)
    ]
    if not differences:
        return
    more = len(differences) - MAX_SHOWN
    shown = differences[:MAX_SHOWN] + [f"and {more} more"] * (more > 0)
    raise UserError(
        "the processes of this job do not agree:\n" + "\n".join(shown), hint, EXIT_USAGE
    )


def _fields(path: Path) -> Facts:
    """The fields of a JSON file; of one that has none, its checksum."""
    data = path.read_bytes()
    try:
        values: Any = json.loads(data)
    except (ValueError, RecursionError):  # said better when it is loaded
        values = None
    if not isinstance(values, dict):
        return {path.name: _sum(data)}
    return facts_of_values(values, f"{path.name} ")


def _header(path: Path) -> str:
    """A weight file's size, and the checksum of its header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        header = file.read(min(length, _MAX_HEADER))
    return f"{path.stat().st_size} bytes, header {_sum(header)}"


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _MAX_TEXT else _sum(text.encode())


def _sum(data: bytes) -> str:
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"
