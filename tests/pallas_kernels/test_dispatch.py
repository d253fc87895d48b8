"""The choice of an implementation: by name or not at all, automatic in one known order."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels  # noqa: F401  (registers the operators)
from pallas_kernels import dispatch, lightning_decode

OPERATORS = (
    "lightning_prefill", "lightning_decode", "paged_attention", "latent_attention", "expert_mlp"
)  # fmt: skip


def named(name: str):
    return lambda *_args, **_kwargs: name


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator of its own in an empty registry, with no choice logged so far."""
    monkeypatch.setattr(dispatch, "_REGISTRY", {})
    dispatch._log_choice.cache_clear()
    return "probe"


def on(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)


def only_even(n: int, **_kwargs: object) -> str | None:
    return None if n % 2 == 0 else f"{n} is odd"


def test_a_named_implementation_runs(operator):
    for name in ("xla", "reference", "mine"):
        dispatch.register(operator, name, named(name))
    assert dispatch.implementations(operator) == ("xla", "reference", "mine")
    for name in ("mine", "reference", "xla"):
        assert dispatch.choose(operator, name)() == name


def test_r017_a_named_implementation_never_falls_through(operator):
    dispatch.register(operator, "xla", named("xla"))
    dispatch.register(operator, "gpu", named("gpu"), only_even)
    assert dispatch.choose(operator, "gpu", 4)() == "gpu"
    with pytest.raises(ValueError, match="probe: 'gpu' can't run: 3 is odd"):
        dispatch.choose(operator, "gpu", 3)


def test_the_exact_form_runs_only_where_it_is_asked_for(operator):
    dispatch.register(operator, "xla", named("xla"), exact=named("xla, exact"))
    dispatch.register(operator, "mine", named("mine"))
    assert dispatch.implementations(operator, exact=True) == ("xla",)
    for name in ("auto", "xla"):
        assert dispatch.choose(operator, name)() == "xla"
        assert dispatch.choose(operator, name, exact=True)() == "xla, exact"
    assert dispatch.choose(operator, "mine")() == "mine"
    with pytest.raises(ValueError, match="probe: 'mine' can't run: it has no exact form"):
        dispatch.choose(operator, "mine", exact=True)


def test_auto_passes_over_what_has_no_exact_form(operator, monkeypatch):
    on(monkeypatch, "gpu")
    dispatch.register(operator, "gpu", named("gpu"))
    dispatch.register(operator, "xla", named("xla"), exact=named("xla, exact"))
    assert dispatch.choose(operator, "auto")() == "gpu"
    assert dispatch.choose(operator, "auto", exact=True)() == "xla, exact"


def test_an_unknown_name_lists_the_names(operator):
    dispatch.register(operator, "xla", named("xla"))
    dispatch.register(operator, "mine", named("mine"))
    said = "probe: no implementation 'gpu'; there are: auto, xla, mine"
    with pytest.raises(ValueError, match=said):
        dispatch.choose(operator, "gpu")


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_specification_and_a_portable_form(name):
    assert {"xla", "reference"} <= set(dispatch.implementations(name))
    with pytest.raises(ValueError, match=f"{name}: no implementation 'nonsense'; .*xla, reference"):
        dispatch.choose(name, "nonsense")


def test_a_public_function_passes_the_name_on():
    arrays = [jnp.zeros(s) for s in ((2, 3, 4), (2, 3, 4), (2, 3, 5), (3,), (6, 3, 4, 5))]
    with pytest.raises(ValueError, match="lightning_decode: no implementation 'nonsense'"):
        lightning_decode(
            *arrays, slots=jnp.zeros(2, jnp.int32), scale=1.0, implementation="nonsense"
        )


def test_a_name_is_taken_once(operator):
    dispatch.register(operator, "xla", named("first"))
    with pytest.raises(ValueError, match="probe already has an implementation named 'xla'"):
        dispatch.register(operator, "xla", named("second"))
    assert dispatch.choose(operator, "xla")() == "first"


@pytest.mark.parametrize(
    ("platform", "want"),
    [("cpu", "xla"), ("gpu", "gpu"), ("tpu", "tpu"), ("another", "xla")],
)
def test_auto_goes_by_platform(operator, monkeypatch, platform, want):
    """Never the reference, never a plugin: those run when named."""
    on(monkeypatch, platform)
    for name in ("reference", "mine", "tpu", "gpu", "xla"):
        dispatch.register(operator, name, named(name))
    assert dispatch.choose(operator, "auto")() == want


def test_auto_passes_over_what_can_not_run(operator, monkeypatch):
    on(monkeypatch, "gpu")
    dispatch.register(operator, "xla", named("xla"))
    dispatch.register(operator, "gpu", named("gpu"), only_even)
    assert dispatch.choose(operator, "auto", 4)() == "gpu"
    assert dispatch.choose(operator, "auto", 3)() == "xla"


def test_auto_gives_the_reasons_when_nothing_can_run(operator, monkeypatch):
    on(monkeypatch, "gpu")
    dispatch.register(operator, "reference", named("reference"))
    dispatch.register(operator, "gpu", named("gpu"), only_even)
    dispatch.register(operator, "xla", named("xla"), lambda *_args: "too large")
    with pytest.raises(
        ValueError, match="probe: nothing can run on gpu: gpu: 3 is odd; xla: too large"
    ):
        dispatch.choose(operator, "auto", 3)


def test_the_call_is_shown_to_supports(operator):
    seen = []
    dispatch.register(operator, "xla", named("xla"), lambda *a, **k: seen.append((a, k)))
    dispatch.choose(operator, "xla", 1, 2, size=3)
    dispatch.choose(operator, "auto", 4)
    assert seen == [((1, 2), {"size": 3}), ((4,), {})]


def test_auto_logs_a_choice_and_its_reason_once(operator, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="pallas_kernels.dispatch")
    on(monkeypatch, "gpu")
    dispatch.register(operator, "xla", named("xla"))
    dispatch.register(operator, "gpu", named("gpu"), only_even)
    for n in (2, 4, 3, 2, 5):
        dispatch.choose(operator, "auto", n)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "probe: gpu on gpu"),
        ("WARNING", "probe: xla on gpu, because gpu: 3 is odd"),
        ("WARNING", "probe: xla on gpu, because gpu: 5 is odd"),
    ]
