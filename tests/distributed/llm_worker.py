"""One process of several that call an LLM by themselves; writes what it came to as an .npz file.

Arguments: the coordinator's address (or -), how many processes, this one's number, the model's
folder, the file.
"""

from __future__ import annotations

import faulthandler
import sys

import numpy as np

import bailing_jax  # isort: skip  before jax: it sets a flag of XLA's

import jax

IDS = [5, 9, 200, 31, 7, 7, 100] * 5


def main() -> None:
    """Generate and score."""
    faulthandler.dump_traceback_later(400, exit=True)
    address, count, index, folder, output = sys.argv[1:]
    if address != "-":
        jax.distributed.initialize(address, int(count), int(index))
    llm = bailing_jax.LLM(
        folder, max_num_seqs=2, max_model_len=96, prefill_chunk=16, report=lambda _line: None
    )
    greedy = bailing_jax.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    answers = llm.generate([IDS, IDS[:3]], greedy)
    states = llm.recurrent_states(IDS)
    # Nobody names a seed: process 0's counts.
    drawn = llm.generate(IDS, bailing_jax.SamplingParams(max_tokens=6, ignore_eos=True))
    np.savez(
        output,
        tokens=np.array([answer.outputs[0].token_ids for answer in answers]),
        drawn=np.array(drawn[0].outputs[0].token_ids),
        logits=llm.logits(IDS),
        hidden_states=llm.hidden_states(IDS),
        token_logprobs=llm.token_logprobs(IDS),
        **{f"state{layer}": state for layer, state in states.items()},
    )


if __name__ == "__main__":
    main()
