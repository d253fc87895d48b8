"""Exact mode through the whole engine: answers and log probabilities of the request alone.

Random company, budgets, numbers of steps a call, and preemption at any step; greedy and sampled,
with penalties, biases and log probabilities in some rows only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import LATENT, LINEAR, tiny_llm

from bailing_jax import SamplingParams
from bailing_jax.engine.engine import Engine

REQUESTS = 20


def random_params(rng: np.random.Generator, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=int(rng.integers(1, 30)),
        temperature=float(rng.choice([0.0, 0.9])),
        top_p=0.95,
        seed=seed,
        ignore_eos=True,
        logprobs=int(rng.integers(0, 4)) if rng.random() < 0.5 else None,
        presence_penalty=float(rng.choice([0.0, 0.0, 0.7])),
        logit_bias={5: 1.5} if rng.random() < 0.2 else None,
    )


def disturb(monkeypatch: pytest.MonkeyPatch, chunk: int) -> list[int]:
    """Every step gets a random budget and drives out whom it likes; how many, step by step."""
    real, driven_out = Engine.step, list[int]()

    def step(self: Engine, **_wishes: Any) -> None:
        rng = np.random.default_rng(len(driven_out))
        victims = [s.number for s in self._scheduler.running if rng.random() < 0.07]
        driven_out.append(len(victims))
        budget = int(rng.integers(0, chunk + 1)) if rng.random() < 0.3 else None
        wishes: dict[str, Any] = {"preempt": victims, "budget": budget}
        real(self, **wishes, max_steps=int(rng.integers(1, 9)))

    monkeypatch.setattr(Engine, "step", step)
    return driven_out


@pytest.mark.parametrize(
    ("config", "chunk", "dtypes"),
    [
        # As long again, for other dtypes and the other softmax attention.
        pytest.param(
            LINEAR, 16, {"state_dtype": "bfloat16"}, id="linear", marks=pytest.mark.slow
        ),
        # In chunks of 128, prompts of up to 64 tokens prefill in smaller calls.
        pytest.param(
            {**LATENT, "num_hidden_layers": 2}, 128, {"dtype": "bfloat16"}, id="latent"
        ),
    ],
)
def test_r082_company_and_preemption_change_no_bit_of_an_answer(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], chunk: int, dtypes: dict[str, str]
) -> None:
    llm = tiny_llm(
        config, tokenizer=False, batch_invariant=True, max_num_seqs=5, prefill_chunk=chunk, **dtypes
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60 if chunk == 16 else 80, REQUESTS)
    prompts = [rng.integers(0, 300, int(n)).tolist() for n in lengths]
    params = [random_params(rng, seed) for seed in range(REQUESTS)]
    wants = [llm.generate([p], q)[0].outputs[0] for p, q in zip(prompts, params, strict=True)]
    driven_out = disturb(monkeypatch, chunk)
    for schedule in range(2):
        order = np.random.default_rng(schedule).permutation(REQUESTS)
        outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order])
        for i, output in zip(order, outputs, strict=True):
            assert output.outputs[0].token_ids == wants[i].token_ids
            assert output.outputs[0].logprobs == wants[i].logprobs
    assert sum(driven_out) > 20
