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

from bailing_jax.params import Param, describe
from bailing_jax.placement import Placement, ReadBox
from bailing_jax.sharding import Box

IDS = [5, 9, 200, 31, 7, 7, 100] * 5


def main() -> None:
    """Generate and score."""
    faulthandler.dump_traceback_later(400, exit=True)
    address, count, index, folder, output = sys.argv[1:]
    if address != "-":
        jax.distributed.initialize(address, int(count), int(index))
    read = _count_what_is_read()
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
        bytes_read=np.array(sum(read)),
        bytes_of_weights=np.array(4 * sum(param.size for param in describe(llm.config))),
        tokens=np.array([answer.outputs[0].token_ids for answer in answers]),
        drawn=np.array(drawn[0].outputs[0].token_ids),
        logits=llm.logits(IDS),
        hidden_states=llm.hidden_states(IDS),
        token_logprobs=llm.token_logprobs(IDS),
        **{f"state{layer}": state for layer, state in states.items()},
    )


def _count_what_is_read() -> list[int]:
    """Bytes of each box of a parameter that this process asks for, from now on."""
    read: list[int] = []
    make = Placement.make

    def counting(self: Placement, param: Param, read_box: ReadBox) -> jax.Array:
        def counted(box: Box) -> np.ndarray:
            part = read_box(box)
            read.append(part.nbytes)
            return part

        return make(self, param, counted)

    Placement.make = counting  # pyright: ignore
    return read


if __name__ == "__main__":
    main()
