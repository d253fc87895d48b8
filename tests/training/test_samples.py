"""Samples and packs: what is learnt from, where it lies, and that it depends on nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_models import VOCAB_SIZE
from tiny_tokenizer import V2_TEMPLATE, write_tiny_tokenizer
from training_cases import write_data

from bailing_jax.errors import UserError
from bailing_jax.tasks.recall import recall_problem
from bailing_jax.tasks.word_problems import word_problem
from bailing_jax.text.chat import ChatTemplate, load_chat_template
from bailing_jax.text.tokenizer import Tokenizer, load_tokenizer
from bailing_jax.training.packs import MAX_SAMPLES, PackSize, PackStream, make_pack, measure
from bailing_jax.training.samples import Chat, Sample, SourceSpec, find_turns, open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(path)
    write_data(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    tokenizer = load_tokenizer(folder, VOCAB_SIZE)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def template(folder) -> ChatTemplate:
    template = load_chat_template(folder)
    assert template is not None
    return template


def spec_of(folder: Path, name: str, **changed) -> SourceSpec:
    template, tokenizer = load_chat_template(folder), load_tokenizer(folder, VOCAB_SIZE)
    assert template is not None
    assert tokenizer is not None
    spec = SourceSpec(
        name, folder, VOCAB_SIZE, find_turns(template, tokenizer), 0.25, max_length=64, seed=5
    )
    return dataclasses.replace(spec, **changed)


def answers(sample: Sample, tokenizer: Tokenizer) -> str:
    """The text that is learnt in full, turn ends shown as |."""
    text = ""
    for token, weight in zip(sample.tokens.tolist(), sample.weights.tolist(), strict=True):
        if weight == 1:
            text += "|" if token in tokenizer.special_ids else tokenizer.decode([token])
    return text


def test_a_sample_is_the_rendered_conversation(tokenizer, template):
    """Token for token what generation sees; answers and their ends are learnt, the rest hardly."""
    chat = Chat(tokenizer, find_turns(template, tokenizer), prompt_loss=0.25)
    exchanges = [("the cat <role> 12", "hello 3\nno"), ("and?", "out"), ("", "in")]
    sample = chat.sample(exchanges)
    messages = [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    assert sample.tokens.tolist() == template.encode(
        tokenizer, messages, add_generation_prompt=False
    )
    assert answers(sample, tokenizer) == "hello 3\nno|out|in|"
    assert set(sample.weights.tolist()) == {0.25, 1.0}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ messages[0].content }}", "in order"),
        ("{% for m in messages|reverse %}<{{ m.content }}>{% endfor %}", "in order"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "more than one way"),
        (V2_TEMPLATE.replace("if add_", "if messages|length > 2 and add_"), "more than one way"),
        (V2_TEMPLATE.replace("if add_", "if messages|length < 2 and add_"), "more than one way"),
    ],
)
def test_templates_that_can_not_be_taken_apart(tokenizer, source, said):
    with pytest.raises(UserError, match=said) as caught:
        find_turns(ChatTemplate(source, "here.jinja"), tokenizer)
    assert "here.jinja" in caught.value.message


def test_tasks_come_from_the_training_split(folder, tokenizer):
    sample = open_source(spec_of(folder, "word-problems")).sample(17)
    assert answers(sample, tokenizer) == word_problem(5, 17, "train").answer + "|"


def test_problems_in_a_row_are_turns_or_plain_text(folder, tokenizer):
    source = open_source(spec_of(folder, "problem-runs"))
    lengths, kinds = set(), set()
    for index in range(24):
        sample = source.sample(index)
        is_chat = sample.tokens[0] in tokenizer.special_ids
        whole = answers(sample, tokenizer)
        if is_chat:
            written = whole.removesuffix("|").split("|")
        else:
            assert not set(sample.tokens.tolist()) & set(tokenizer.special_ids)
            text = tokenizer.decode(sample.tokens.tolist())
            blocks = text.removesuffix("\n\n").split("\n\n")
            written = [block.partition("\n")[2] for block in blocks]
            assert whole == "".join(written)
        first = (1 << 50) + 5 * index
        problems = [word_problem(5, first + i, "train") for i in range(len(written))]
        assert written == [problem.answer for problem in problems]
        if not is_chat:
            assert blocks == [f"{p.question}\n{p.answer}" for p in problems]
        lengths.add(len(written))
        kinds.add(is_chat)
    assert lengths == {2, 3, 4, 5}
    assert kinds == {True, False}


def test_every_code_word_is_asked_for(folder, tokenizer):
    """First the problem's own, then those of everyone else it names."""
    several = 0
    for index in range(8):
        sample = open_source(spec_of(folder, "recall")).sample(index)
        problem = recall_problem(5, index, "train", lambda s: len(tokenizer.encode(s)))
        first, *others, end = answers(sample, tokenizer).split("|")
        assert (first, end) == (problem.answer, "")
        assert all(f" is {word}." in problem.prompt for word in others)
        assert len({first, *others}) == problem.prompt.count("The code word of")
        several += bool(others)
    assert several


def test_lines_are_drawn_by_seed_and_index(folder, tokenizer):
    path = str(folder / "lines.jsonl")
    source = open_source(spec_of(folder, path))
    samples = [source.sample(i) for i in range(300)]
    again = open_source(spec_of(folder, path))
    for index in (0, 7, 299):
        np.testing.assert_array_equal(again.sample(index).tokens, samples[index].tokens)
    other = open_source(spec_of(folder, path, seed=6))
    assert any(len(other.sample(i).tokens) != len(samples[i].tokens) for i in range(20))
    # Windows of the long text start anywhere in it; short texts are whole.
    windows = {tuple(s.tokens.tolist()) for s in samples if len(s.tokens) == 64}
    assert len(windows) > 3
    assert all((s.weights == 1).all() for s in samples if len(s.tokens) == 64)
    assert {answers(s, tokenizer) for s in samples} >= {"1|", "39|", "one, 19, two, 361"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": 3}\n', 'line 2: needs "text"'),
        ('{"text": "a"\n', "line 1: not JSON"),
        ('\n["a"]\n', "line 2: needs"),
        ('{"prompt": "a"}\n', "line 1: needs"),
        ("\n", "no lines"),
    ],
)
def test_bad_lines_are_named(folder, tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        open_source(spec_of(folder, str(path)))
    assert str(path) in caught.value.message


def test_missing_pieces_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        open_source(spec_of(folder, str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match="no chat template, which recall needs"):
        open_source(spec_of(folder, "recall", turns=None))
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        open_source(spec_of(folder, "recall", tokenizer=tmp_path))
    with pytest.raises(UserError, match="need a chat template"):
        open_source(spec_of(folder, str(folder / "lines.jsonl"), turns=None))


class Counting:
    """Sample n has tokens n, n + 1, ... of a length that depends on n; some are too long."""

    def sample(self, index: int) -> Sample:
        length = 2 + (index * 7) % 13 if index % 5 else 90
        return Sample(
            np.arange(index, index + length, dtype=np.int32),
            np.linspace(0, 1, length, dtype=np.float32),
        )


def test_a_pack_holds_samples_in_order():
    size = PackSize(rows=60, segments=50, window=32)
    pack = make_pack(Counting(), 3, size)
    assert pack.tokens.shape == pack.targets.shape == pack.weights.shape == (60,)
    row, index = 0, 3 * MAX_SAMPLES
    for length in pack.lengths:
        while len(Counting().sample(index).tokens) > 33:
            index += 1
        sample = Counting().sample(index)
        rows = slice(row, row + length)
        np.testing.assert_array_equal(pack.tokens[rows], sample.tokens[:-1])
        np.testing.assert_array_equal(pack.targets[rows], sample.tokens[1:])
        np.testing.assert_array_equal(pack.weights[rows], sample.weights[1:])
        row, index = row + length, index + 1
    assert 60 - 14 < row <= 60
    assert (pack.weights[row:] == 0).all()
    assert len(make_pack(Counting(), 3, PackSize(60, 2, 32)).lengths) == 2


def test_sizes_are_measured():
    size = measure(Counting(), "x", rows=4096, max_length=40)
    # The longest that is taken has 14 tokens, 13 rows, and 5 % room; a multiple of 64 and the cap.
    assert size.window == 40
    filled = [make_pack(Counting(), n, size).lengths for n in range(1, 5)]
    assert all(0.97 * 4096 < sum(lengths) <= 4096 for lengths in filled)
    assert all(len(lengths) <= size.segments < 1.2 * len(lengths) for lengths in filled)
    with pytest.raises(UserError, match="do not have 2 to 2 tokens"):
        measure(Counting(), "x", rows=4096, max_length=1)
    with pytest.raises(UserError, match="share of a step is 30 tokens"):
        measure(Counting(), "x", rows=30, max_length=40)


def test_worker_processes_make_the_same_packs(folder):
    specs = [
        spec_of(folder, str(folder / "lines.jsonl")),
        spec_of(folder, "recall", max_length=2**12),
    ]
    sizes = [PackSize(300, 20, 64), PackSize(5000, 3, 4096)]
    made = []
    for workers in (0, 2):
        with PackStream(specs, sizes, accumulate=2, workers=workers) as stream:
            made.append(list(stream.steps(3, 6)))
    for one, two in zip(*made, strict=True):
        for parts, again in zip(one, two, strict=True):
            assert len(parts) == len(again) == 2
            for pack, same in zip(parts, again, strict=True):
                assert pack.lengths == same.lengths
                np.testing.assert_array_equal(pack.tokens, same.tokens)
    # No pack comes twice, and a later start gives what an earlier one would have given.
    first = [pack.tokens.tobytes() for step in made[0] for parts in step for pack in parts]
    assert len(set(first)) == len(first) == 12
    with PackStream(specs, sizes, accumulate=2, workers=0) as stream:
        (late,) = list(stream.steps(5, 6))
    np.testing.assert_array_equal(late[0][1].tokens, made[0][2][0][1].tokens)
