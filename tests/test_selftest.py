"""selftest: sound here, and each check fails and says why when its subject is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bailing_jax import runtime, selftest
from bailing_jax.engine import check_operators, exact_check, selfcheck
from bailing_jax.engine.check_operators import CheckFailed
from bailing_jax.engine.exact_check import require_exact
from bailing_jax.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, UserError
from bailing_jax.model import BailingForCausalLM

OPERATORS = {
    "lightning decode": "lightning_decode",
    "lightning prefill": "lightning_prefill",
    "grouped-query attention": "paged_attention",
    "latent attention": "latent_attention",
}


def test_all_checks_pass_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert [check["name"] for check in found["checks"]] == list(selfcheck.CHECKS)
    assert all(check["problem"] is None for check in found["checks"])


def fake_checks(monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    def found() -> None:
        if fails:
            raise CheckFailed("two of them")

    def crashes() -> None:
        if fails:
            raise MemoryError("of\nmany lines")

    monkeypatch.setattr(selfcheck, "CHECKS", {"a": found, "b": crashes, "c": lambda: None})


def test_a_failure_is_named_and_the_other_checks_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_checks(monkeypatch, fails=True)
    assert selftest.main([]) == EXIT_FAILURE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a ")
    assert lines[0].endswith(" s  FAILED: two of them")
    assert lines[1].endswith(" s  FAILED: MemoryError: of")
    assert lines[2].endswith(" s  ok")
    assert lines[3].startswith("FAILED: a, b (cpu, ")
    assert selftest.main(["--json"]) == EXIT_FAILURE
    found = json.loads(capsys.readouterr().out)
    assert [check["problem"] for check in found["checks"]] == [
        "two of them", "MemoryError: of", None,
    ]  # fmt: skip


def test_one_line_a_check_and_a_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_checks(monkeypatch, fails=False)
    assert selftest.main([]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("all checks passed (cpu, ")


def broken(
    monkeypatch: pytest.MonkeyPatch, operator: str, spoil: Callable[[Any, Any], Any]
) -> None:
    """The operator's results go through `spoil` before the check sees them."""
    real = getattr(check_operators, operator)
    monkeypatch.setattr(
        check_operators, operator, lambda *a, **k: spoil(*(map(np.array, real(*a, **k))))
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_r105_a_wrong_output_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    broken(monkeypatch, OPERATORS[name], lambda o, state: (o * 1.0005, state))
    with pytest.raises(CheckFailed, match=f"{OPERATORS[name]}, output: off by"):
        selfcheck.CHECKS[name]()


@pytest.mark.parametrize("name", OPERATORS)
def test_r102_nan_in_an_output_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    broken(monkeypatch, OPERATORS[name], lambda o, state: (o * np.nan, state))
    with pytest.raises(CheckFailed, match=OPERATORS[name]):
        selfcheck.CHECKS[name]()


@pytest.mark.parametrize("name", OPERATORS)
def test_r038_output_of_padding_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def spoil(o: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        o[3 if "prefill" not in name else 75] = 1
        return o, state

    broken(monkeypatch, OPERATORS[name], spoil)
    with pytest.raises(CheckFailed, match="the output of padding is not zero"):
        selfcheck.CHECKS[name]()


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", OPERATORS)
def test_r035_a_write_to_null_or_to_anothers_place_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, place: int
) -> None:
    def spoil(o: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        state[place].reshape(-1)[5] = 3
        return o, state

    broken(monkeypatch, OPERATORS[name], spoil)
    with pytest.raises(CheckFailed, match="bits changed"):
        selfcheck.CHECKS[name]()


@pytest.mark.parametrize("name", ["lightning decode", "lightning prefill"])
def test_r003_a_state_rounded_to_bfloat16_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def spoil(o: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return o, np.array(jnp.asarray(state).astype(jnp.bfloat16).astype(jnp.float32))

    broken(monkeypatch, OPERATORS[name], spoil)
    with pytest.raises(CheckFailed, match="state: off by"):
        selfcheck.CHECKS[name]()


@pytest.mark.parametrize(
    ("row", "value", "found"), [(2, 1.0, "output: off by"), (3, 1.0, "padding is not zero")]
)
def test_r107_wrong_experts_are_found(
    monkeypatch: pytest.MonkeyPatch, row: int, value: float, found: str
) -> None:
    real = check_operators.expert_mlp

    def spoiled(*arguments: Any) -> np.ndarray:
        y = np.array(real(*arguments))
        y[row, 0] += value
        return y

    monkeypatch.setattr(check_operators, "expert_mlp", spoiled)
    with pytest.raises(CheckFailed, match=found):
        selfcheck.CHECKS["experts"]()


@pytest.mark.parametrize("offset", [1, -1])
def test_r001_another_decay_convention_is_found(
    monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    real = selfcheck.decay_table
    monkeypatch.setattr(selfcheck, "decay_table", lambda config: real(config) + offset * 1e-6)
    with pytest.raises(CheckFailed, match="want"):
        selfcheck.CHECKS["decay table"]()


INDEX_CASES = [name for name, _, _ in selfcheck._index_cases(np.zeros((5, 7), np.float32))]


@pytest.mark.parametrize("name", INDEX_CASES)
def test_r104_each_broken_index_rule_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = selfcheck._indexed

    def spoiled(x: Any) -> dict[str, Any]:
        found = {key: np.array(value) for key, value in real(x).items()}
        found[name].reshape(-1)[1] += 1
        return found

    monkeypatch.setattr(selfcheck, "_indexed", spoiled)
    with pytest.raises(CheckFailed, match=name):
        selfcheck.CHECKS["index semantics"]()


def test_r010_a_model_that_looks_at_its_company_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BailingForCausalLM.logits
    monkeypatch.setattr(
        BailingForCausalLM, "logits", lambda self, x: real(self, x) + 1e-6 * jnp.abs(x).sum()
    )
    with pytest.raises(CheckFailed, match=r"float32: the logits .* changed in company"):
        selfcheck.CHECKS["exact mode"]()


def loaded(exact: bool, placement: object = None) -> Any:
    return SimpleNamespace(
        runtime=SimpleNamespace(exact=exact),
        placement=placement,
        model=None,
        config=None,
        limits=None,
        state_spec=None,
    )


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_exact_mode_is_refused_where_the_check_fails(
    monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(runtime, "platform", lambda: platform)
    monkeypatch.setattr(exact_check, "find_difference", lambda *_: "layer 3 changed in company")
    require_exact(loaded(exact=False))
    with pytest.raises(UserError, match=f"not exact on this {platform}: layer 3 changed") as caught:
        require_exact(loaded(exact=True))
    assert caught.value.exit_code == EXIT_USAGE
    monkeypatch.setattr(exact_check, "find_difference", lambda *_: None)
    require_exact(loaded(exact=True))
    require_exact(loaded(exact=False, placement=object()))
    with pytest.raises(UserError, match=f"not checked on several {platform} devices"):
        require_exact(loaded(exact=True, placement=object()))


def test_on_a_cpu_no_check_delays_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_check, "find_difference", lambda *_: pytest.fail("it ran"))
    require_exact(loaded(exact=True))
