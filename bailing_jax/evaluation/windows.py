"""The token sequences whose likelihood is measured; every token but a window's first counts.

A document is cut into windows of equal length that share one token, so that every token but the
first counts once; what is left at its end is dropped, unless it is all there is. Without a file a
document is one worked problem of the held-out split as the chat template writes it. No jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation.problems import SPLIT
from bailing_jax.evaluation.texts import Texts
from bailing_jax.text.chat import ChatTemplate
from bailing_jax.text.tokenizer import Tokenizer

PROBLEMS = "word-problems"


@dataclass(frozen=True)
class Window:
    """One sequence.

    Attributes:
        source: the file, or what made it.
        ids: its tokens, at least two.
    """

    source: str
    ids: tuple[int, ...]

    @property
    def num_scored(self) -> int:
        """The tokens that count."""
        return len(self.ids) - 1


def worked_problems(seed: int, num: int) -> Texts:
    """Held-out word problems with their answers.

    Args:
        seed: of the generator.
        num: how many.
    """
    from bailing_jax.tasks.word_problems import word_problem

    problems = (word_problem(seed, index, SPLIT) for index in range(num))
    return Texts(PROBLEMS, [(problem.question, problem.answer) for problem in problems])


def windows_of(
    texts: Texts, tokenizer: Tokenizer, template: ChatTemplate | None, length: int
) -> list[Window]:
    """The windows of all documents.

    Args:
        texts: the documents.
        tokenizer: the model's.
        template: the model's; pairs of prompt and answer need one.
        length: most tokens of a window, at least 2.

    Raises:
        UserError: there is no template, or no document has two tokens.
    """
    windows: list[Window] = []
    for document in texts.documents:
        if isinstance(document, str):
            ids = tokenizer.encode(document)
        elif template is None:
            raise UserError(
                f"{texts.name}: the model has no chat template to write prompt and answer with",
                "Give a plain text: --data FILE.",
                EXIT_USAGE,
            )
        else:
            prompt, answer = document
            asked = template.encode(tokenizer, [{"role": "user", "content": prompt}])
            ids = [*asked, *tokenizer.encode(answer)]
        windows += _cut(texts.name, ids, length)
    if not windows:
        raise UserError(
            f"{texts.name}: a single token; a token can be predicted from the second on",
            "Give a longer text.",
            EXIT_USAGE,
        )
    return windows


def _cut(source: str, ids: Sequence[int], length: int) -> list[Window]:
    """Windows of `length` tokens, or a single shorter one; none of less than two tokens."""
    if len(ids) < 2:
        return []
    length = min(length, len(ids))
    starts = range(0, len(ids) - length + 1, length - 1)
    return [Window(source, tuple(ids[start : start + length])) for start in starts]
