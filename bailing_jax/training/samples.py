"""Sources of training samples: token ids with a loss weight each.

Sample `index` of a source depends on the run's seed and the index alone, so that a run that was
cut goes on with the data it would have seen. No jax: samples are made in worker processes.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.tasks.recall import RecallProblem, recall_problem
from bailing_jax.tasks.word_problems import word_problem
from bailing_jax.text.chat import ChatTemplate
from bailing_jax.text.tokenizer import Tokenizer

_FACT = re.compile(r"The code word of (\w+) is ([\w-]+)\.")
_LONGEST_RUN = 5
_RUNS_FROM = 1 << 50  # beyond every index that another source asks for
_QUESTION, _ANSWER, _FOLLOW_UP = "\ue000", "\ue001", "\ue002"


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: int32 [n], n >= 2.
        weights: float32 [n], the weight of predicting each token; the first is never predicted.
    """

    tokens: np.ndarray
    weights: np.ndarray


class Source(Protocol):
    """Where samples come from."""

    def sample(self, index: int) -> Sample:
        """Sample number `index` of the run."""
        ...


@dataclass(frozen=True)
class Turns:
    """The control tokens a chat template puts around messages.

    Attributes:
        opening: before the first question.
        reply: between a question and its answer.
        closing: after an answer; the model learns to write it.
        next: between `closing` and the next question.
    """

    opening: tuple[int, ...]
    reply: tuple[int, ...]
    closing: tuple[int, ...]
    next: tuple[int, ...]


def find_turns(template: ChatTemplate, tokenizer: Tokenizer) -> Turns:
    """Read the turns off a rendered conversation.

    Raises:
        UserError: what the template writes around a message depends on the conversation in a
            way that training here does not know.
    """
    user, assistant = {"role": "user"}, {"role": "assistant"}
    messages = [user | {"content": _QUESTION}, assistant | {"content": _ANSWER}]
    whole = template.render([*messages, user | {"content": _FOLLOW_UP}], add_generation_prompt=True)
    pieces, rest = [], whole
    for mark in (_QUESTION, _ANSWER, _FOLLOW_UP):
        before, found, rest = rest.partition(mark)
        pieces.append(before if found else None)
    done = template.render(messages, add_generation_prompt=False)
    asked = template.render(messages[:1], add_generation_prompt=True)
    opening, reply, between = pieces
    if opening is None or reply is None or between is None:
        raise _unusable(template, "does not write the messages of a conversation in order")
    closing = done.partition(_ANSWER)[2]
    same = between.startswith(closing) and rest == reply and asked == opening + _QUESTION + reply
    if not closing or not same:
        raise _unusable(template, "ends a turn or opens a reply in more than one way")
    ids = (tokenizer.encode(text, allow_special=True) for text in
           (opening, reply, closing, between.removeprefix(closing)))  # fmt: skip
    return Turns(*map(tuple, ids))


def _unusable(template: ChatTemplate, problem: str) -> UserError:
    return UserError(
        f"{template.where}: {problem}",
        'Train on plain text ({"text": ...} lines), or use another template.',
        EXIT_USAGE,
    )


class Chat:
    """Conversations as samples."""

    def __init__(self, tokenizer: Tokenizer, turns: Turns, prompt_loss: float) -> None:
        self.tokenizer = tokenizer
        self._turns = turns
        self._prompt_loss = prompt_loss
        # Texts of the generators repeat sentence by sentence.
        self.count_tokens = functools.lru_cache(maxsize=100_000)(
            lambda text: len(tokenizer.encode(text))
        )

    def text(self, pieces: Sequence[tuple[str, bool]]) -> Sample:
        """Plain text of (piece, whether it is an answer) pairs, without the template."""
        tokens: list[int] = []
        weights: list[float] = []
        for piece, is_answer in pieces:
            ids = self.tokenizer.encode(piece)
            tokens += ids
            weights += [1.0 if is_answer else self._prompt_loss] * len(ids)
        return _sample(tokens, weights)

    def sample(self, exchanges: Sequence[tuple[str, str]]) -> Sample:
        """A conversation of (question, answer) pairs; answers and turn ends weigh 1."""
        tokens: list[int] = []
        weights: list[float] = []
        before = self._turns.opening
        for question, answer in exchanges:
            asked = [*before, *self.tokenizer.encode(question), *self._turns.reply]
            answered = [*self.tokenizer.encode(answer), *self._turns.closing]
            tokens += asked + answered
            weights += [self._prompt_loss] * len(asked) + [1.0] * len(answered)
            before = self._turns.next
        return _sample(tokens, weights)


class WordProblems:
    """Word problems of the training split, one a sample."""

    def __init__(self, chat: Chat, seed: int) -> None:
        self._chat, self._seed = chat, seed

    def sample(self, index: int) -> Sample:
        """See `Source`."""
        problem = word_problem(self._seed, index, "train")
        return self._chat.sample([(problem.question, problem.answer)])


class ProblemRuns:
    """Word problems of the training split in a row, as turns of a conversation or as plain text.

    So that a model answers a second question too, and is not surprised by a text that goes on.
    """

    def __init__(self, chat: Chat, seed: int) -> None:
        self._chat, self._seed = chat, seed

    def sample(self, index: int) -> Sample:
        """See `Source`."""
        rng = random.Random(f"problem run {self._seed} {index}")
        # Other problems than those of `WordProblems` with the same seed.
        first = _RUNS_FROM + index * _LONGEST_RUN
        problems = [
            word_problem(self._seed, first + i, "train")
            for i in range(rng.randint(2, _LONGEST_RUN))
        ]
        if rng.random() < 1 / 2:
            return self._chat.sample([(problem.question, problem.answer) for problem in problems])
        # Cut where the tokenizer cuts too.
        pieces = ((text, text is problem.answer) for problem in problems
                  for text in (problem.question, "\n", problem.answer, "\n", "\n"))  # fmt: skip
        return self._chat.text(list(pieces))


class Recall:
    """Recall problems of the training split; then every other code word is asked for too."""

    def __init__(self, chat: Chat, seed: int) -> None:
        self._chat, self._seed = chat, seed

    def sample(self, index: int) -> Sample:
        """See `Source`."""
        problem = recall_problem(self._seed, index, "train", self._chat.count_tokens)
        return self._chat.sample([(problem.prompt, problem.answer), *_follow_ups(problem)])


def _follow_ups(problem: RecallProblem) -> list[tuple[str, str]]:
    """A question and its answer for every other person of a problem."""
    facts = _FACT.findall(problem.prompt)
    return [
        (f"What is the code word of {name}?", word)
        for name, word in facts
        if word != problem.answer
    ]


class JsonLines:
    """A JSONL file: {"text": ...} or {"prompt": ..., "answer": ...} a line, drawn at random.

    Lines are drawn with replacement; a text longer than a window gives a window of it.
    """

    def __init__(
        self, path: Path, chat: Chat | None, tokenizer: Tokenizer, window: int, seed: int
    ) -> None:
        self._chat, self._tokenizer, self._window, self._seed = chat, tokenizer, window, seed
        self._lines = read_lines(path, chat is not None)
        self._encode = functools.lru_cache(maxsize=4096)(tokenizer.encode)

    def sample(self, index: int) -> Sample:
        """See `Source`."""
        # A string seeds the same generator on every machine.
        rng = random.Random(f"lines {self._seed} {index}")
        line = self._lines[rng.randrange(len(self._lines))]
        if isinstance(line, tuple) and self._chat is not None:
            return self._chat.sample([line])
        tokens = self._encode(line)
        start = rng.randrange(max(1, len(tokens) - self._window + 1))
        tokens = tokens[start : start + self._window]
        return _sample(tokens, [1.0] * len(tokens))


def _sample(tokens: Sequence[int], weights: Sequence[float]) -> Sample:
    return Sample(np.asarray(tokens, np.int32), np.asarray(weights, np.float32))


def read_lines(path: Path, has_chat: bool) -> list[str | tuple[str, str]]:
    """The records of a file.

    Raises:
        UserError: the file or a line of it can't be used; names the line.
    """
    try:
        raw = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", "Give a readable JSONL file.", EXIT_USAGE) from error
    lines: list[str | tuple[str, str]] = []
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, f"not JSON: {error}") from error
        fields = record if isinstance(record, dict) else {}
        if isinstance(fields.get("text"), str):
            lines.append(fields["text"])
        elif isinstance(fields.get("prompt"), str) and isinstance(fields.get("answer"), str):
            if not has_chat:
                raise _bad_line(path, number, "prompt and answer need a chat template; none here")
            lines.append((fields["prompt"], fields["answer"]))
        else:
            raise _bad_line(path, number, 'needs "text", or "prompt" and "answer", as strings')
    if not lines:
        raise UserError(f"{path}: no lines", "Give a JSONL file with records.", EXIT_USAGE)
    return lines


def _bad_line(path: Path, number: int, problem: str) -> UserError:
    return UserError(f"{path}, line {number}: {problem}", "Correct the line.", EXIT_USAGE)


BUILT_IN = {"word-problems": WordProblems, "problem-runs": ProblemRuns, "recall": Recall}


@dataclass(frozen=True)
class SourceSpec:
    """What a worker needs to make a source: it loads the tokenizer by itself.

    Attributes:
        name: of a `BUILT_IN` source, or a JSONL file.
        tokenizer: the folder that holds tokenizer.json.
        vocab_size: of the model.
        turns: from `find_turns`; None without a chat template.
        prompt_loss: see `TrainOptions`.
        max_length: longest sample.
        seed: of the run.
    """

    name: str
    tokenizer: Path
    vocab_size: int
    turns: Turns | None
    prompt_loss: float
    max_length: int
    seed: int


def open_source(spec: SourceSpec) -> Source:
    """The source of a spec.

    Raises:
        UserError: it needs a tokenizer, a chat template or a file that is not there.
    """
    from bailing_jax.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec.tokenizer, spec.vocab_size)
    if tokenizer is None:
        raise UserError(f"{spec.tokenizer}: no tokenizer.json", "Training needs one.", EXIT_USAGE)
    chat = None if spec.turns is None else Chat(tokenizer, spec.turns, spec.prompt_loss)
    if spec.name not in BUILT_IN:
        return JsonLines(Path(spec.name), chat, tokenizer, spec.max_length, spec.seed)
    if chat is None:
        raise UserError(
            f"{spec.tokenizer}: no chat template, which {spec.name} needs",
            "Add chat_template.jinja, or train on a file of plain text.",
            EXIT_USAGE,
        )
    return BUILT_IN[spec.name](chat, spec.seed)
