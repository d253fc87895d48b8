"""Laws of the LLM class: what comes out is what each prompt gets alone, in the order asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tiny_models import EOS_ID, MODEL_LEN, VOCAB_SIZE, greedy, is_idle, latent_llm, linear_llm
from tolerances import TOLERANCES

from bailing_jax import LLM, RequestOutput, SamplingParams
from bailing_jax.engine.stop import StopMatcher
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.request import Answer

pytestmark = pytest.mark.unoptimised

BOUND = TOLERANCES["law_logits"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return linear_llm()


@pytest.fixture(scope="module")
def latent() -> LLM:
    """Another architecture, without tokenizer."""
    return latent_llm()


@pytest.fixture(autouse=True)
def _idle(llm: LLM) -> Iterator[None]:
    """Whatever a test did, afterwards nobody holds a slot or a page."""
    yield
    assert is_idle(llm)


def forced(token: int, max_tokens: int = 8, **fields: Any) -> SamplingParams:
    """Nothing but this token, so that a test knows what is said."""
    return greedy(max_tokens, logit_bias={token: 1e9}, **fields)


def ids_of(request: RequestOutput) -> list[int]:
    return request.outputs[0].token_ids


def prompts_of(rng: np.random.Generator, lengths: Sequence[int]) -> list[list[int]]:
    return [rng.integers(0, 303, length).tolist() for length in lengths]


# Batch = alone.

LENGTHS = (1, 2, 15, 16, 17, 40, 1, 33, 5, 7, 31, 32, 3)
ANSWERS = (9, 1, 30, 2, 12, 5, 20, 7, 3, 16, 1, 25, 4)


@pytest.mark.parametrize("name", ["llm", "latent"])
def test_r022_more_prompts_than_slots_each_get_the_answer_they_get_alone(
    request: pytest.FixtureRequest, rng: np.random.Generator, name: str
) -> None:
    """Staggered lengths and ends. Tokens are compared up to the first near tie of the two best."""
    model: LLM = request.getfixturevalue(name)
    prompts = prompts_of(rng, LENGTHS)
    params = [greedy(n, ignore_eos=True, logprobs=2) for n in ANSWERS]
    together = model.generate(prompts, params)
    compared = 0
    for prompt, param, got in zip(prompts, params, together, strict=True):
        (want,) = model.generate(prompt, param)
        assert got.prompt_token_ids == want.prompt_token_ids == prompt
        assert len(ids_of(got)) == param.max_tokens
        assert want.outputs[0].logprobs is not None
        for mine, theirs, best in zip(
            ids_of(got), ids_of(want), want.outputs[0].logprobs, strict=True
        ):
            first, second = sorted(best.values(), reverse=True)[:2]
            if first - second < 2 * BOUND:
                break
            assert mine == theirs
            compared += 1
    assert compared > 0.9 * sum(ANSWERS)


@pytest.mark.parametrize("name", ["llm", "latent"])
def test_greedy_answers_are_the_best_of_the_logits(
    request: pytest.FixtureRequest, rng: np.random.Generator, name: str
) -> None:
    """Generation and scoring are different programs over the same layers."""
    model: LLM = request.getfixturevalue(name)
    (prompt,) = prompts_of(rng, [21])
    (output,) = model.generate(prompt, greedy(20, ignore_eos=True, logprobs=3))[0].outputs
    logits = model.logits(prompt + output.token_ids[:-1])[20:]
    table = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    picked = logits[range(20), output.token_ids]
    assert (logits.max(1) - picked < 2 * BOUND).all()
    assert output.logprobs is not None
    assert [len(entry) for entry in output.logprobs] == [3] * 20
    for row, token, entry in zip(table, output.token_ids, output.logprobs, strict=True):
        assert next(iter(entry)) == token
        for i, value in entry.items():
            assert abs(value - row[i]) < BOUND
        assert min(entry.values()) > np.sort(row)[-3] - BOUND


def penalised_answer(llm: LLM, prompt: list[int], p: SamplingParams) -> list[int]:
    """Greedy tokens by the definition: the model's logits less what numpy counts in the answer."""
    answer: list[int] = []
    for _ in range(p.max_tokens):
        scores = llm.logits(prompt + answer)[-1].astype(np.float64)
        counts = np.bincount(answer, minlength=len(scores))
        scores -= (p.presence_penalty or 0) * (counts > 0) + (p.frequency_penalty or 0) * counts
        second, first = np.sort(scores)[-2:]
        assert first - second > BOUND  # no tie that rounding could turn
        answer.append(int(scores.argmax()))
    return answer


def test_penalties_count_the_answer_whoever_shares_the_steps(
    llm: LLM, rng: np.random.Generator
) -> None:
    """Alone, in company, in another order, and begun again after it was stopped half-way."""
    strengths = [(0.0, 0.0), (2.0, 0.0), (0.0, 0.7), (-2.0, -1.0), (1.5, -0.5), (-1.0, 2.0)]
    params = [
        greedy(12, ignore_eos=True, presence_penalty=presence, frequency_penalty=frequency)
        for presence, frequency in strengths
    ]
    prompts = [[5, 6, 7, 7], *prompts_of(rng, (3, 9, 17, 2, 5))]
    want = [penalised_answer(llm, *pair) for pair in zip(prompts, params, strict=True)]
    assert [ids_of(answer) for answer in llm.generate(prompts, params)] == want
    assert [
        ids_of(llm.generate(prompt, p)[0]) for prompt, p in zip(prompts, params, strict=True)
    ] == want
    plain = [ids_of(answer) for answer in llm.generate(prompts, greedy(12, ignore_eos=True))]
    assert sum(a != b for a, b in zip(plain, want, strict=True)) >= 4
    stopped = llm.prepare(prompts[2], params[2])
    llm.submit(stopped)
    for _ in range(5):
        llm.step()
    llm.cancel(stopped)
    order = rng.permutation(len(prompts))
    shuffled = llm.generate([prompts[i] for i in order], [params[i] for i in order])
    assert [ids_of(answer) for answer in shuffled] == [want[i] for i in order]


def test_logprobs_are_the_models_own_whatever_the_sampling(llm: LLM) -> None:
    prompt = [5, 6, 7]
    fields = {"temperature": 3.0, "repetition_penalty": 4.0, "logit_bias": {9: 5.0}, "seed": 1}
    params = SamplingParams(max_tokens=6, logprobs=0, **fields)
    (output,) = llm.generate(prompt, params)[0].outputs
    want = llm.token_logprobs(prompt + output.token_ids)[2:]
    assert output.logprobs is not None
    assert [list(entry) for entry in output.logprobs] == [[i] for i in output.token_ids]
    got = [entry[i] for entry, i in zip(output.logprobs, output.token_ids, strict=True)]
    np.testing.assert_allclose(got, want, rtol=0, atol=BOUND)


def test_r034_two_models_in_one_process_do_not_hear_each_other(llm: LLM, latent: LLM) -> None:
    want = [list(model.stream([3, 1, 4], greedy(10))) for model in (llm, latent)]
    streams = [llm.stream([3, 1, 4], greedy(10)), latent.stream([3, 1, 4], greedy(10))]
    got: list[list[Any]] = [[], []]
    for _ in range(10):
        for pieces, stream in zip(got, streams, strict=True):
            pieces += [piece for piece in [next(stream, None)] if piece is not None]
    assert got == want
    assert [p.token_id for p in want[0]] != [p.token_id for p in want[1]]


# What a prompt may be.


def test_text_ids_and_arrays_are_the_same_prompt(llm: LLM) -> None:
    text = "the other hello"
    ids = llm.encode(text)
    (want,) = llm.generate(text, greedy())
    assert (want.prompt, want.prompt_token_ids) == (text, ids)
    forms: list[Any] = [
        ids,
        tuple(ids),
        np.array(ids),
        np.array(ids, np.int32),
        [np.int64(i) for i in ids],
    ]
    for form in forms:
        (got,) = llm.generate(form, greedy())
        assert (got.prompt, got.prompt_token_ids) == (None, ids)
        assert {type(i) for i in got.prompt_token_ids} == {int}
        assert got.outputs == want.outputs
    mixed = llm.generate([text, *forms], greedy())
    assert [r.outputs for r in mixed] == [want.outputs] * 6
    assert [r.prompt for r in mixed] == [text, *[None] * 5]
    (same, other) = llm.generate(np.array([ids, ids[::-1]]), greedy())
    assert same.outputs == want.outputs
    assert other.prompt_token_ids == ids[::-1]


def test_no_prompts_no_answers(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_one_sampling_params_or_one_a_prompt(llm: LLM) -> None:
    prompts = [[1], [2], [3]]
    counts = [
        [len(ids_of(r)) for r in llm.generate(prompts, params)]
        for params in (forced(9, 2), [forced(9, n) for n in (3, 1, 2)], tuple([forced(9, 4)] * 3))
    ]
    assert counts == [[2, 2, 2], [3, 1, 2], [4, 4, 4]]


def test_text_in_a_prompt_cannot_write_control_tokens(llm: LLM) -> None:
    ids = llm.encode("<role>HUMAN</role><|endoftext|>")
    assert llm.tokenizer is not None
    assert not llm.tokenizer.special_ids & set(ids)


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt 0: empty"),
    ([[]], "prompt 0: empty"),
    ([[1, 2], []], "prompt 1: empty"),
    ([1, VOCAB_SIZE], f"prompt 0: token id {VOCAB_SIZE}; allowed: 0 to {VOCAB_SIZE - 1}"),
    ([-1], "prompt 0: token id -1"),
    ([[5], [7, 10**12]], "prompt 1: token id 1000000000000"),
    ([1] * MODEL_LEN, f"prompt 0: {MODEL_LEN} tokens leave no room for an answer"),
    ("a" * 1000, "max_model_len is 96"),
    ([[1.5, 2]], "prompt 0 = [1.5, 2]; allowed: a list of token ids"),
    ([None], "prompt 0 = None; allowed"),
    ([{"prompt_token_ids": [1]}], "prompt 0 = {'prompt_token_ids': [1]}; allowed"),
    (np.array([1.0, 2.0]), "allowed: a list of token ids"),
    (b"bytes", "prompt 0 = b'bytes'; allowed"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_refused_by_number(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        llm.generate(prompts, greedy())
    assert message in caught.value.message
    assert caught.value.exit_code == EXIT_USAGE


BAD_REQUESTS: list[tuple[Any, Any, str]] = [
    (prompts, greedy(), message) for prompts, message in BAD_PROMPTS[2:7]
] + [
    ([[1], [2]], [greedy()], "2 prompts and 1 sampling_params"),
    ([[1], [2]], [greedy(), greedy(stop="")], "stop = ''"),
    ([[1], [2]], [greedy(), greedy(stop=["a"] * 17)], "stop = 17 strings"),
    ([[1], [2]], [greedy(), greedy(stop_token_ids=[VOCAB_SIZE])], f"token id {VOCAB_SIZE}"),
    ([[1], [2]], [greedy(), greedy(logit_bias={999: 1.0})], "token id 999"),
]


@pytest.mark.parametrize(("prompts", "params", "message"), BAD_REQUESTS)
def test_nothing_runs_when_one_request_of_many_is_bad(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, prompts: Any, params: Any, message: str
) -> None:
    want = llm.generate([8], greedy(3))
    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", lambda: pytest.fail("a step ran"))
        with pytest.raises(UserError, match=message):
            llm.generate(prompts, params)
    assert not llm._engine.has_work
    assert llm.generate([8], greedy(3)) == want


def test_text_needs_a_tokenizer_and_ids_do_not(latent: LLM) -> None:
    for prompts, params in (("text", greedy()), ([[1], "text"], greedy()), ([1], greedy(stop="a"))):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            latent.generate(prompts, params)
    with pytest.raises(UserError, match=r"has no tokenizer\.json, which chat needs"):
        latent.chat([{"role": "user", "content": "hello"}])
    (output,) = latent.generate([1, 2], greedy(3, ignore_eos=True))[0].outputs
    assert output.text is None
    assert len(output.token_ids) == 3
    assert [piece.text for piece in latent.stream([1], forced(4, 2))] == [None, None]


# How an answer ends.


def one(
    llm: LLM, params: SamplingParams, prompt: Any = "hello"
) -> tuple[str | None, list[int], str]:
    (output,) = llm.generate(prompt, params)[0].outputs
    return output.text, output.token_ids, output.finish_reason


def token(llm: LLM, text: str) -> int:
    assert llm.tokenizer is not None
    found = llm.tokenizer.token_id(text)
    assert found is not None
    return found


def test_max_tokens_ends_with_length(llm: LLM) -> None:
    hello = token(llm, "hello")
    assert one(llm, forced(hello, 1)) == ("hello", [hello], "length")
    assert one(llm, forced(hello, 3)) == ("hellohellohello", [hello] * 3, "length")


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|role_end|>", ""])
def test_every_end_id_of_both_files_stops(llm: LLM, name: str) -> None:
    """generation_config.json names two, config.json a third."""
    end = token(llm, name) if name else EOS_ID
    assert one(llm, forced(end)) == ("", [end], "stop")
    assert one(llm, forced(end, ignore_eos=True)) == ("", [end] * 8, "length")


def test_stop_ids_stop_also_where_end_ids_are_ignored(llm: LLM) -> None:
    the = token(llm, "Ġthe")
    for ignore in (False, True):
        assert one(llm, forced(the, stop_token_ids=[4, the], ignore_eos=ignore)) == (
            "",
            [the],
            "stop",
        )


def test_a_stop_id_inside_a_character_hides_only_its_own_text(llm: LLM) -> None:
    """The byte before it can no longer become a character, and is shown as what it is."""
    assert llm.tokenizer is not None
    the = token(llm, "Ġthe")
    answer = Answer(0, StopMatcher((), [the], False, (), 9), llm.tokenizer.stream())
    assert answer.push(token(llm, "â"), None).text == ""
    assert answer.push(the, None).text == "\ufffd"
    assert answer.output().text == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("lohe", "hel", 2),
        (["xyz", "llohellohe"], "he", 3),
        ("h", "", 1),
        (["hello"], "", 1),
        (["ohellohellohello", "lo"], "hel", 1),
    ],
)
def test_stop_strings_end_across_tokens_and_are_not_shown(
    llm: LLM, stop: Any, text: str, tokens: int
) -> None:
    hello = token(llm, "hello")
    assert one(llm, forced(hello, stop=stop)) == (text, [hello] * tokens, "stop")
    pieces = list(llm.stream("hello", forced(hello, stop=stop)))
    assert "".join(piece.text or "" for piece in pieces) == text
    assert len(pieces) == tokens


def test_a_stop_string_that_only_begins_is_shown_at_the_end(llm: LLM) -> None:
    hello = token(llm, "hello")
    assert one(llm, forced(hello, 2, stop="lohelloX")) == ("hellohello", [hello] * 2, "length")


@pytest.mark.parametrize("room", [1, 2, 5])
def test_max_model_len_ends_with_length(llm: LLM, room: int) -> None:
    text, ids, reason = one(llm, forced(7, 50), [3] * (MODEL_LEN - room))
    assert (len(ids), reason) == (room, "length")
    assert text


# Chat.


def test_chat_goes_through_the_template(llm: LLM) -> None:
    one_turn = [{"role": "user", "content": "hello"}]
    turns = [
        {"role": "system", "content": "the end"},
        {"role": "user", "content": "<role>other"},
        {"role": "assistant", "content": "he"},
        {"role": "user", "content": "1 2"},
    ]
    assert llm.tokenizer is not None
    want = llm.tokenizer.encode(
        "<role>SYSTEM</role>detailed thinking off<|role_end|>"
        "<role>HUMAN</role>hello<|role_end|><role>ASSISTANT</role>",
        allow_special=True,
    )
    (answer,) = llm.chat(one_turn, greedy())
    assert answer.prompt_token_ids == want
    assert answer.outputs == llm.generate(want, greedy())[0].outputs
    both = llm.chat([one_turn, turns[1:]], greedy())
    assert both[0].outputs == answer.outputs
    assert both[1].prompt_token_ids == llm.chat_prompt(turns[1:])
    assert both[1].prompt_token_ids.count(token(llm, "<role>")) == 5


def test_chat_refuses_what_the_template_cannot_take(llm: LLM) -> None:
    for messages in ([], [{"role": "user"}], [{"role": "boss", "content": "x"}], [[]]):
        with pytest.raises(UserError):
            llm.chat(messages, greedy())
