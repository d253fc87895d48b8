"""--profile: a trace where it was asked for, and a bad place refused before anything is loaded."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bailing_jax.cli.profile import check, profiling
from bailing_jax.errors import EXIT_USAGE, UserError


def work() -> float:
    return float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(7.0)))


def test_the_trace_lies_where_it_is_said_to(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "new" / "folder"
    with profiling(folder, said.append):
        result = work()
        assert said == []
    assert result == work()
    (line,) = said
    trace = Path(line.splitlines()[0].removeprefix("profile: "))
    assert trace.is_relative_to(folder)
    assert list(trace.glob("*.xplane.pb"))
    (perfetto,) = trace.glob("*.trace.json.gz")
    assert json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    assert f"xprof --logdir {folder};" in line
    assert "https://ui.perfetto.dev" in line


def test_an_error_inside_comes_out_and_the_trace_is_written(tmp_path: Path) -> None:
    said: list[str] = []

    def interrupted() -> None:
        with profiling(tmp_path, said.append):
            work()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert len(said) == 1
    with profiling(tmp_path, said.append):  # the profiler is free again
        work()
    assert len(said) == 2


def test_a_folder_lost_on_the_way_costs_the_trace_only(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "folder"
    with profiling(folder, said.append):
        work()
        shutil.rmtree(folder)
        folder.write_text("in the way")
    (line,) = said
    assert line.startswith(f"profile: could not be written to {folder}: ")


def test_none_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.profiler, "start_trace", None)  # calling it would fail
    check(None)
    with profiling(None, lambda line: pytest.fail(line)):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        for use in (check, lambda place: profiling(place, pytest.fail).__enter__()):
            with pytest.raises(
                UserError, match=r"^--profile .*file.*: can't be written: "
            ) as caught:
                use(place)
            assert caught.value.exit_code == EXIT_USAGE
    check(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
