"""Known failures of whole engines: warming up, awkward chunk sizes, and words of the neighbours."""

from __future__ import annotations

import pytest
from tiny_models import greedy, linear_llm, tiny_llm

from bailing_jax import LLM
from bailing_jax.request import RequestOutput
from bailing_jax.tasks.recall import recall_problem

# What takes the time here is compiling, and no program is compared with one made otherwise.
pytestmark = pytest.mark.unoptimised

PROMPTS = [[7] * 30, [9, 8, 7], [11], list(range(40, 90))]


def said(outputs: list[RequestOutput]) -> list[object]:
    return [(out.token_ids, out.logprobs) for output in outputs for out in output.outputs]


def test_r044_warming_up_and_fifty_requests_leave_no_trace() -> None:
    """The first answers are, to the last bit, those of an engine that was never warmed up."""
    params = greedy(6, ignore_eos=True, logprobs=3)
    want = said(linear_llm().generate(PROMPTS, params))
    llm = tiny_llm()
    llm.warm_up_all(lambda _line: None)
    assert said(llm.generate(PROMPTS, params)) == want
    for i in range(50):
        llm.generate([i] * (1 + i), greedy(1 + i % 5))
    assert said(llm.generate(PROMPTS, params)) == want


@pytest.mark.parametrize("chunk", [1, 5])
def test_r050_any_prefill_chunk_makes_progress(chunk: int) -> None:
    """Also one below the chunk of the kernels, and one that divides nothing."""
    params = greedy(6, ignore_eos=True)
    want = linear_llm().generate(PROMPTS, params)
    got = tiny_llm(prefill_chunk=chunk).generate(PROMPTS, params)
    assert [out.outputs[0].token_ids for out in got] == [out.outputs[0].token_ids for out in want]


def test_r089_an_answer_holds_its_own_code_word_and_nobody_elses() -> None:
    """The shipped model is told a word and asked for it, among eleven others told others."""
    llm = LLM(max_num_seqs=4, max_model_len=512, prefill_chunk=64, report=lambda _line: None)
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    problems = [recall_problem(3, i, "test", count, 60) for i in range(12)]
    asked = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    texts = [out.outputs[0].text or "" for out in llm.chat(asked, greedy(16))]
    words = [problem.answer for problem in problems]
    assert len(set(words)) == len(words)
    for i, text in enumerate(texts):
        assert not [word for j, word in enumerate(words) if j != i and word in text], (i, text)
    assert sum(word in text for word, text in zip(words, texts, strict=True)) >= 9
