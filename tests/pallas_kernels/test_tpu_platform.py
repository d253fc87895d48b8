"""What is chosen for a TPU, asked on a host that has none: described devices, lowering only.

`scripts/tpu_check.py` compiles the same steps with the compiler for TPUs.
"""

from __future__ import annotations

import logging
import re

import jax
import pytest
import tpu_model
from jax.sharding import AbstractMesh

from pallas_kernels import compat, dispatch

KINDS = {"v5e": ("TPU v5 lite", 1), "v5p": ("TPU v5", 2), "v6e": ("TPU v6 lite", 1)}


def described(chip: str):
    """A mesh of one chip that is not there."""
    kind, cores = KINDS[chip]
    device = jax.sharding.AbstractDevice(kind, cores, "tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def kernels(text: str) -> list[str]:
    """Names of the TPU kernels in a lowered program."""
    calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    return sorted({re.search(r'kernel_name = "(\w+)"', line)[1] for line in calls})


@pytest.mark.parametrize("chip", KINDS)
def test_the_platform_is_that_of_the_described_device(chip):
    assert compat.target_platform() == jax.default_backend()
    assert compat.tpu_cores() == 1
    with described(chip):
        assert compat.target_platform() == "tpu"
        assert compat.tpu_cores() == KINDS[chip][1]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_small_models_steps_hold_the_tpu_kernels(chip, caplog):
    """Decode rows take the decode kernel, segments the prefill kernel; each choice said once."""
    dispatch._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger="pallas_kernels.dispatch")
    with described(chip):
        lowered = {
            name: traced.lower(lowering_platforms=("tpu",)).as_text()
            for name, traced in tpu_model.traced_steps().items()
        }
    assert kernels(lowered["decode"]) == ["lightning_decode"]
    assert kernels(lowered["mixed"]) == ["lightning_decode", "lightning_prefill"]
    said = [record.getMessage() for record in caplog.records if "lightning" in record.getMessage()]
    assert sorted(said) == ["lightning_decode: tpu on tpu", "lightning_prefill: tpu on tpu"]
    dispatch._log_choice.cache_clear()


def test_without_a_described_device_the_hosts_platform_is_chosen():
    text = tpu_model.traced_steps()["mixed"].lower().as_text()
    assert "tpu_custom_call" not in text
