"""generate --env: what this machine and installation are, for reports of problems.

Every item is found out on its own and one that can't be told is "unknown": a report must come out
of a half-broken installation too. Values of variables that may hold secrets are never shown.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from bailing_jax.errors import EXIT_OK

UNKNOWN = "unknown"

_PACKAGES = (
    "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "tokenizers", "jinja2", "safetensors",
    "orbax-checkpoint", "huggingface_hub", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin",
)  # fmt: skip
_VARIABLES = re.compile(r"(JAX|XLA|LIBTPU|TPU|CUDA|NVIDIA|TF_CPP|HF|HUGGING|OMP)_.*|XDG_CACHE_HOME")
_SECRET = re.compile("token|secret|key|password|passwd|credential|auth", re.IGNORECASE)
# user:password@ of an address.
_USER = re.compile(r"//[^/@\s]+@")

Facts = dict[str, Any]


def run(*, compile_cache: str | None = None, as_json: bool = False) -> int:
    """Print what there is; returns the exit code.

    Args:
        compile_cache: the command's --compile-cache.
        as_json: one JSON object in place of the text.
    """
    if as_json:
        print(json.dumps(environment(compile_cache)), flush=True)
        return EXIT_OK
    # One by one: XLA may end the process over a flag or a driver, and the rest is on paper then.
    for section, find in _sections(compile_cache).items():
        print(as_text({section: _told(find)}), flush=True)
    return EXIT_OK


def environment(compile_cache: str | None = None) -> Facts:
    """Everything there is to tell, by section; what can't be told is "unknown"."""
    return {section: _told(find) for section, find in _sections(compile_cache).items()}


def _sections(compile_cache: str | None) -> Mapping[str, Callable[[], Any]]:
    """How to find each section out; those that start the device come last."""
    return {
        "versions": _versions,
        "system": _system,
        "variables": functools.partial(_variables, os.environ),
        "compile_cache": functools.partial(_compile_cache, compile_cache),
        "devices": _devices,
        "kernels": _kernels,
    }


def as_text(facts: Facts) -> str:
    """The sections with one line an item."""
    lines: list[str] = []
    for section, items in facts.items():
        lines.append(section.replace("_", " "))
        if not isinstance(items, dict):
            lines.append(f"  {items}")
        elif not items:
            lines.append("  none")
        else:
            width = max(map(len, items)) + 2
            lines += [f"  {name:<{width}}{_shown(name, items[name])}" for name in items]
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        unit, size = ("GiB", 2**30) if value >= 2**30 else ("MiB", 2**20)
        return f"{value / size:.1f} {unit}"
    text = str(value)
    return text if text.isprintable() else repr(text)


def _told(find: Callable[[], Any]) -> Any:
    """What `find` returns; "unknown" when it fails or has nothing."""
    # Whatever is broken here is what the report is for: jaxlib may fail in any way it likes.
    try:
        found = find()
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        return f"{UNKNOWN} ({type(error).__name__}{': ' * bool(reason)}{reason})"
    return UNKNOWN if found is None or found == "" else found


def _versions() -> Facts:
    from bailing_jax import __version__

    found: Facts = {"bailing-jax": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _system() -> Facts:
    from bailing_jax.compile_cache import cpu_facts

    return {
        "os": _told(platform.platform),
        "cpu": _told(lambda: cpu_facts().get("model name")),
        "machine": _told(platform.machine),
        "cores": _told(os.cpu_count),
        "cores_allowed": _told(lambda: len(os.sched_getaffinity(0))),
        "memory_bytes": _told(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "python_program": sys.executable or UNKNOWN,
    }


def _devices() -> Facts:
    import jax

    from bailing_jax import runtime

    devices = jax.devices()
    return {
        "platform": _told(runtime.platform),
        "platform_version": _told(lambda: " ".join(devices[0].client.platform_version.split())),
        "kind": _told(lambda: devices[0].device_kind),
        "count": len(devices),
        "memory_bytes": _told(runtime.memory_bytes),
        "processes": _told(jax.process_count),
    }


def _kernels() -> Facts:
    """What "auto" takes for each operator here: for bfloat16 at a released model's sizes."""
    import pallas_kernels  # noqa: F401  (its operators register themselves)
    from pallas_kernels import dispatch

    def taken(operator: str, *arguments: object) -> str | None:
        run = dispatch.choose(operator, "auto", *arguments)
        for name in dispatch.implementations(operator):
            try:
                if dispatch.choose(operator, name, *arguments) is run:
                    return name
            except ValueError:  # this one can't run here
                continue
        return None

    return {
        operator: _told(functools.partial(taken, operator, *arguments))
        for operator, arguments in _example_calls().items()
    }


def _example_calls() -> dict[str, tuple[object, ...]]:
    """The arguments by which each operator chooses, as shapes."""
    import jax
    import jax.numpy as jnp

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    rows, heads = shape(512, 16, 128), shape(9, 16, 128, 128, dtype=jnp.float32)
    recurrent = (rows, rows, rows, shape(16, dtype=jnp.float32), heads)
    keys, up = shape(512, 4, 128), shape(256, 2048, 512)
    return {
        "lightning_prefill": recurrent,
        "lightning_decode": recurrent,
        "paged_attention": (rows, keys, keys, shape(513, 64, 2, 4, 128)),
        "latent_attention": (shape(512, 16, 576), shape(512, 576), shape(513, 64, 576)),
        "expert_mlp": (shape(512, 2048), up, up, shape(256, 512, 2048)),
    }


def _compile_cache(choice: str | None) -> Facts:
    from bailing_jax.compile_cache import find_directory, size_of

    directory = find_directory(choice)
    if directory is None:
        return {"directory": "off"}
    if isinstance(directory, str):  # object storage, which bills for being looked through
        return {"directory": directory}
    return {"directory": str(directory), "size_bytes": _told(lambda: size_of(directory))}


def _variables(environ: Mapping[str, str]) -> Facts:
    """The variables that jax, XLA and their libraries read, without anything secret."""
    return {
        name: "(set, not shown)" if _SECRET.search(name) else _USER.sub("//(not shown)@", value)
        for name, value in sorted(environ.items())
        if _VARIABLES.fullmatch(name)
    }
