"""The dtype settings reach the arithmetic: state_dtype, rope_dtype and dtype, end to end.

Random golden models flip experts on tiny differences, so drift is read where nothing has been
routed yet: the first lightning layer's state, and the stream after it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from driver import Driver, Request, Sizes
from goldens import GOLDEN, LINEAR, OVERRIDES, golden
from slow import slow_but
from tolerances import TOLERANCES

from bailing_jax import LLM, SamplingParams

pytestmark = pytest.mark.unoptimised

SIZES = Sizes(num_decode=1, num_prefill=8, num_segments=1, page_size=16, pages_a_sequence=9)


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("name", slow_but(["v2_5-mla"], LINEAR[:2]))
def test_r003_drift_by_state_dtype_is_reported_and_bounded(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """112 tokens of decoding, the state rounded at each in one run and not in the other."""
    states = {}
    for dtype in ("float32", "bfloat16"):
        driver = Driver(GOLDEN / name, SIZES, overrides=OVERRIDES, state_dtype=dtype)
        assert {str(driver.state.layers[i].dtype) for i in driver.recurrent_layers()} == {dtype}
        request = Request(golden(name)["prompt_5"].tolist()[:112], 2, list(range(3, 12)))
        driver.step(segments=[(request, 1)])
        while request.done < 112:
            driver.step([request])
        states[dtype] = driver.recurrent_state(request)[0]
    drift = relative_rms(states["bfloat16"], states["float32"])
    record_property("relative_rms_drift", drift)
    assert 1e-4 < drift < TOLERANCES["bfloat16_state_drift"]


@pytest.mark.parametrize("name", slow_but(["v2_5-mla"], LINEAR[:2]))
def test_t10_rope_dtype_rounds_what_rope_hands_on(name: str) -> None:
    ids = golden(name)["prompt_2"]
    wide = LLM(GOLDEN / name, dtype="float32", max_num_seqs=1, hf_overrides=OVERRIDES)
    narrow = LLM(
        GOLDEN / name,
        dtype="float32",
        rope_dtype="bfloat16",
        max_num_seqs=1,
        hf_overrides=OVERRIDES,
    )
    a, b = wide.hidden_states(ids), narrow.hidden_states(ids)
    np.testing.assert_array_equal(a[0], b[0])
    assert 1e-6 < relative_rms(b[1], a[1]) < TOLERANCES["bfloat16_rope"]


def test_t10_rope_dtype_keeps_q_and_k_wide_in_a_bfloat16_model() -> None:
    name = "v2_5-mla-bf16"
    ids = golden(name)["prompt_2"]
    exact = LLM(GOLDEN / name, dtype="float32", max_num_seqs=1, hf_overrides=OVERRIDES)
    want = exact.hidden_states(ids)[1]
    errors = {}
    for rope_dtype in ("bfloat16", "float32"):
        llm = LLM(
            GOLDEN / name,
            dtype="bfloat16",
            rope_dtype=rope_dtype,
            max_num_seqs=1,
            hf_overrides=OVERRIDES,
        )
        errors[rope_dtype] = relative_rms(llm.hidden_states(ids)[1], want)
    assert errors["float32"] != errors["bfloat16"]
    assert max(errors.values()) < 2 * TOLERANCES["bfloat16_rope"]


def test_a_bfloat16_model_generates_on_a_cpu() -> None:
    """Weights, pages and activations bfloat16, router and statistics float32."""
    llm = LLM(GOLDEN / "v2_5-mla-bf16", dtype="bfloat16", state_dtype="bfloat16", max_num_seqs=2)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    outputs = llm.generate([[5, 6, 7], [9]], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [6, 6]
    logits = llm.logits([5, 6, 7])
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
