"""Laws of LLM streams and of chance: a seed decides an answer, company and interruptions do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_models import NUM_SEQS, greedy, is_idle, linear_llm

from bailing_jax import LLM, RequestOutput, SamplingParams
from bailing_jax.errors import UserError

LENGTHS = (1, 2, 15, 16, 17, 40, 1, 33, 5, 7, 31, 32, 3)
ANSWERS = (9, 1, 30, 2, 12, 5, 20, 7, 3, 16, 1, 25, 4)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return linear_llm()


@pytest.fixture(autouse=True)
def _idle(llm: LLM) -> Iterator[None]:
    """Whatever a test did, afterwards nobody holds a slot or a page."""
    yield
    assert is_idle(llm)


def ids_of(request: RequestOutput) -> list[int]:
    return request.outputs[0].token_ids


# Chance.


def test_seeds_are_reproducible_and_deaf_to_company(llm: LLM, rng: np.random.Generator) -> None:
    prompts = [rng.integers(0, 303, length).tolist() for length in LENGTHS]
    params = [
        SamplingParams(max_tokens=n, temperature=1.3, top_p=0.95, seed=i, ignore_eos=True)
        for i, n in enumerate(ANSWERS)
    ]
    together = [ids_of(r) for r in llm.generate(prompts, params)]
    alone = [ids_of(llm.generate(p, s)[0]) for p, s in zip(prompts, params, strict=True)]
    backwards = [ids_of(r) for r in llm.generate(prompts[::-1], params[::-1])][::-1]
    assert together == alone == backwards


def test_other_seeds_give_other_answers_and_so_does_no_seed(llm: LLM) -> None:
    def answer(seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True, seed=seed)
        return tuple(ids_of(llm.generate([1, 2], params)[0]))

    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    assert len({answer(seed) for seed in seeds}) == len(seeds)
    assert len({answer(None) for _ in range(4)}) == 4


def test_n_answers_use_n_seeds(llm: LLM) -> None:
    def outputs(seed: int, n: int) -> list[Any]:
        params = SamplingParams(max_tokens=6, temperature=1.0, seed=seed, n=n)
        return llm.generate(["the", [4, 5]], params)

    for request in outputs(40, 5):
        assert [output.index for output in request.outputs] == list(range(5))
        assert len({tuple(output.token_ids) for output in request.outputs}) == 5
    for i in range(5):
        single, several = outputs(40 + i, 1), outputs(40, 5)
        for one_of, all_of in zip(single, several, strict=True):
            assert one_of.outputs[0].token_ids == all_of.outputs[i].token_ids
    # The last seed is followed by the first.
    wrapped = outputs(2**64 - 1, 2)[0].outputs[1].token_ids
    assert wrapped == outputs(0, 1)[0].outputs[0].token_ids


# Streams.


def test_a_stream_gives_the_same_answer_one_piece_a_token(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    (want,) = llm.generate("hello", params)[0].outputs
    pieces = list(llm.stream("hello", params))
    assert [piece.token_id for piece in pieces] == want.token_ids
    assert "".join(piece.text or "" for piece in pieces) == want.text
    assert [piece.finish_reason for piece in pieces] == [None] * 29 + ["length"]


def test_the_text_of_an_answer_is_that_of_its_tokens(llm: LLM) -> None:
    """Also where it ends inside a character, as random tokens do."""
    assert llm.tokenizer is not None
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=0, n=20, ignore_eos=True)
    outputs = llm.generate("hello", params)[0].outputs
    for output in outputs:
        assert output.text == llm.tokenizer.decode(output.token_ids)
    assert any((output.text or "").endswith("\ufffd") for output in outputs)


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_r024_closing_a_stream_early_frees_its_place(llm: LLM, taken: int) -> None:
    """Also one that waits in the queue, and one half through its prompt."""
    (want,) = llm.generate([5] * 30, greedy(6, ignore_eos=True))
    streams = [llm.stream([i] * 40, greedy(40, ignore_eos=True)) for i in range(NUM_SEQS + 2)]
    for stream in streams:
        for _ in range(taken):
            next(stream)
    for stream in streams:
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not llm._engine.has_work
    assert llm._engine._scheduler.slots.num_free == NUM_SEQS
    assert llm.generate([5] * 30, greedy(6, ignore_eos=True)) == [want]


def test_streams_and_batches_may_share_the_engine(llm: LLM) -> None:
    """Interleaved, nobody's answer changes, and nobody waits for another's end."""
    short, long = greedy(4, ignore_eos=True), greedy(40, ignore_eos=True)
    want = [ids_of(r) for r in llm.generate([[1], [2], [3] * 20], [short, long, short])]
    long_stream, short_stream = llm.stream([2], long), llm.stream([1], short)
    first = [next(long_stream).token_id for _ in range(2)]
    assert [piece.token_id for piece in short_stream] == want[0]
    assert llm._engine.has_work
    assert ids_of(llm.generate([3] * 20, short)[0]) == want[2]
    assert llm._engine.has_work
    assert first + [piece.token_id for piece in long_stream] == want[1]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_r085_an_interrupted_call_leaves_no_ghosts(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Ctrl-C in the middle of a step: all that ran ends, and the next answer is right."""
    (want,) = llm.generate([9, 9], greedy(5))
    open_stream = llm.stream([4], greedy(30, ignore_eos=True))
    next(open_stream)
    run, left = llm._engine._programs.step, [steps]

    def interrupted(*args: Any) -> Any:
        result = run(*args)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine._programs, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1] * 20] * 5, greedy(20))
    assert not llm._engine.has_work
    assert llm.generate([9, 9], greedy(5)) == [want]
    with pytest.raises(RuntimeError, match="an error in another call ended this stream"):
        list(open_stream)


def test_r085_an_interruption_between_steps_spares_the_open_stream(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = greedy(30, ignore_eos=True)
    want = list(llm.stream([4], params))
    open_stream = llm.stream([4], params)
    pieces = [next(open_stream)]
    run = llm._engine.step

    def interrupted() -> None:
        run()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1] * 20] * 5, greedy(20))
    assert llm._engine._scheduler.slots.num_free == NUM_SEQS - 1
    assert pieces + list(open_stream) == want


def test_a_stream_is_checked_before_it_is_read(llm: LLM) -> None:
    for prompt, params in (([], greedy()), ([1], SamplingParams(n=2)), ([1], greedy(stop=""))):
        with pytest.raises(UserError):
            llm.stream(prompt, params)


@pytest.mark.parametrize("moment", ["before", "queued", "after"])
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_while_submitting_leaves_no_request_behind(
    monkeypatch: pytest.MonkeyPatch, moment: str, call: str
) -> None:
    """A request nobody knows the number of would run on, beside all that follow."""
    llm = linear_llm()
    target: Any = llm._engine._scheduler if moment == "queued" else llm._engine
    real = target.submit

    def submit(*args: Any, **named: Any) -> Any:
        if moment != "before":
            real(*args, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "submit", submit)
    calls = {
        "generate": lambda: llm.generate([[1, 2], [3]], greedy(4)),
        "stream": lambda: next(llm.stream([1, 2], greedy(4))),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[call]()
    monkeypatch.undo()
    assert is_idle(llm)
    assert not llm._engine._requests
    (output,) = llm.generate([5, 6], greedy(3, ignore_eos=True))[0].outputs
    assert len(output.token_ids) == 3
