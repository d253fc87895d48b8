"""--env: complete, free of secrets, and told even where something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import bailing_jax
from bailing_jax import compile_cache, runtime
from bailing_jax.cli import environment
from bailing_jax.errors import EXIT_OK
from pallas_kernels import dispatch

SECTIONS = ["versions", "system", "variables", "compile_cache", "devices", "kernels"]


def test_versions_devices_and_system_are_those_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", (*environment._PACKAGES, "no-such-package"))
    facts = environment.environment()
    assert list(facts) == SECTIONS
    assert facts["versions"]["bailing-jax"] == bailing_jax.__version__
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["no-such-package"] == "not installed"
    assert facts["devices"]["platform"] == jax.default_backend()
    assert facts["devices"]["count"] == jax.device_count()
    assert facts["devices"]["kind"] == jax.devices()[0].device_kind
    assert facts["devices"]["memory_bytes"] == runtime.memory_bytes()
    assert facts["system"]["cores"] == os.cpu_count()
    assert facts["system"]["memory_bytes"] > 2**28


def test_kernels_are_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = set(dispatch._REGISTRY)
    kernels = environment.environment()["kernels"]
    assert kernels == dict.fromkeys(operators, "xla")
    assert len(operators) == 5
    better = dispatch.Implementation(lambda: None, dispatch.always)
    narrow = dispatch.Implementation(lambda: None, lambda *_args: "no")
    monkeypatch.setattr(dispatch, "_PREFERENCE", {jax.default_backend(): ("new", "xla")})
    for operator, new in (("expert_mlp", better), ("paged_attention", narrow)):
        monkeypatch.setitem(
            dispatch._REGISTRY, operator, {"new": new, **dispatch._REGISTRY[operator]}
        )
    kernels = environment.environment()["kernels"]
    assert (kernels["expert_mlp"], kernels["paged_attention"]) == ("new", "xla")


def test_text_and_json_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one-cache").write_bytes(b"x" * 5 * 2**20)
    assert environment.run(compile_cache=str(tmp_path), as_json=True) == EXIT_OK
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    facts = json.loads(out)
    assert facts["compile_cache"] == {"directory": str(tmp_path), "size_bytes": 5 * 2**20}
    assert environment.run(compile_cache=str(tmp_path)) == EXIT_OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["size_bytes", "5.0", "MiB"] in lines
    assert ["memory_bytes", f"{facts['system']['memory_bytes'] / 2**30:.1f}", "GiB"] in lines
    for section in SECTIONS:
        assert section.split("_") in lines
        for name in facts[section]:
            assert any(line[:1] == [name] for line in lines), name
    assert environment.environment("off")["compile_cache"] == {"directory": "off"}


def test_variables_are_shown_and_secrets_never(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_TWO_LINES", "first\nsecond")
    monkeypatch.setenv("UNRELATED", "hidden-0")
    secrets = ("JAX_API_KEY", "HF_TOKEN", "jax_x", "JAX_My_Secret", "HUGGING_FACE_HUB_TOKEN")
    for number, name in enumerate(secrets, 1):
        monkeypatch.setenv(name, f"hidden-{number}")
    monkeypatch.setenv("JAX_COORDINATOR", "http://somebody:hidden-9@host/path")
    for as_json in (True, False):
        environment.run(as_json=as_json)
        out = capsys.readouterr().out
        assert "hidden" not in out
        assert os.environ["XLA_FLAGS"] in out
        assert "http://(not shown)@host/path" in out
    facts = environment.environment()["variables"]
    assert facts["HF_TOKEN"] == facts["JAX_API_KEY"] == "(set, not shown)"
    assert facts["JAX_TWO_LINES"] == "first\nsecond"
    assert "UNRELATED" not in facts
    assert "  second" not in out


def test_what_cannot_be_told_is_unknown_and_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object) -> None:
        raise RuntimeError("no driver\nand a long story")

    monkeypatch.setattr(runtime, "memory_bytes", lambda *_: None)
    monkeypatch.setattr(os, "sysconf", fail)
    monkeypatch.setattr(compile_cache, "size_of", fail)
    facts = environment.environment()
    assert facts["devices"]["memory_bytes"] == "unknown"
    assert facts["system"]["memory_bytes"] == "unknown (RuntimeError: no driver)"
    assert facts["compile_cache"]["size_bytes"] == "unknown (RuntimeError: no driver)"
    assert facts["system"]["cores"] == os.cpu_count()
    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(compile_cache, "find_directory", fail)
    assert environment.run() == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    for section in ("devices", "compile cache"):
        assert lines[lines.index(section) + 1] == "  unknown (RuntimeError: no driver)"
    assert "kernels" in lines


def test_what_is_known_is_out_before_xla_can_end_the_process() -> None:
    """As it does over a flag it does not know."""
    code = "from bailing_jax.cli import environment; environment.run()"
    variables = {**os.environ, "XLA_FLAGS": "--xla_no_such_flag=1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "--xla_no_such_flag=1 --xla_cpu" in done.stdout
    assert "compile cache\n" in done.stdout
    assert "devices\n" not in done.stdout
