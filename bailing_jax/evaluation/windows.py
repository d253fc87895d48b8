"""The token sequences whose likelihood is measured, and which of their tokens count.

A text is cut into windows of equal length that share one token, so that every token but the first
counts once; what is left at its end is dropped, unless it is all there is. Without a text a window
is one worked problem of the held-out split, and its answer's tokens count. No jax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation.problems import SPLIT

if TYPE_CHECKING:
    from bailing_jax.text.chat import ChatTemplate
    from bailing_jax.text.tokenizer import Tokenizer

DEFAULT_PROBLEMS = 64
MAX_TEXT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Window:
    """One sequence.

    Attributes:
        source: the file, or what made it.
        ids: its tokens.
        first: the first position that counts, at least 1.
    """

    source: str
    ids: tuple[int, ...]
    first: int = 1

    @property
    def num_scored(self) -> int:
        """The tokens that count."""
        return len(self.ids) - self.first


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        UserError: it can't be read, is empty, too long or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UserError(
                f"--data {path}: longer than {MAX_TEXT_BYTES} bytes", "Cut it.", EXIT_USAGE
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--data {path}: cannot be read: {error.strerror}", "Check the path.", EXIT_USAGE
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {path}: not UTF-8 (byte {error.start})", "Save it as UTF-8.", EXIT_USAGE
        ) from error
    if not text.strip():
        raise UserError(f"--data {path}: empty", "Give a text.", EXIT_USAGE)
    return text


def cut(source: str, ids: Sequence[int], length: int) -> list[Window]:
    """The windows of a tokenized text.

    Args:
        source: what messages call it.
        ids: its tokens.
        length: tokens of a window, at least 2.

    Raises:
        UserError: there are less than two tokens.
    """
    if len(ids) < 2:
        raise UserError(
            f"{source}: {len(ids)} token; a token can be predicted from the second on",
            "Give a longer text.",
            EXIT_USAGE,
        )
    length = min(length, len(ids))
    starts = range(0, len(ids) - length + 1, length - 1)
    return [Window(source, tuple(ids[start : start + length])) for start in starts]


def worked_problems(
    seed: int, num: int, render: Callable[[str, str], tuple[list[int], list[int]]]
) -> list[Window]:
    """Held-out word problems with their answers.

    Args:
        seed: of the generator.
        num: how many.
        render: token ids of a question as a prompt, and of the answer to it.
    """
    from bailing_jax.tasks.word_problems import word_problem

    windows = []
    for index in range(num):
        problem = word_problem(seed, index, SPLIT)
        prompt, answer = render(problem.question, problem.answer)
        windows.append(Window("word-problems", (*prompt, *answer), len(prompt)))
    return windows


def renderer(
    tokenizer: Tokenizer, template: ChatTemplate
) -> Callable[[str, str], tuple[list[int], list[int]]]:
    """`render` of `worked_problems`: the chat template's prompt, and the plain answer."""

    def render(question: str, answer: str) -> tuple[list[int], list[int]]:
        prompt = template.encode(tokenizer, [{"role": "user", "content": question}])
        return prompt, tokenizer.encode(answer)

    return render
