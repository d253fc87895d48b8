"""What is to be answered: where the prompt's text comes from, and how it becomes token ids."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bailing_jax.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from bailing_jax.llm import LLM
    from bailing_jax.tasks.word_problems import WordProblem

MAX_PROMPT_BYTES = 64_000_000  # far more than any model's context


def read_text(args: argparse.Namespace) -> str | None:
    """The text of --prompt or --prompt-file, where - is stdin; None when neither is given.

    A single newline at the end of a file is the file's, not the prompt's.

    Raises:
        UserError: the file can't be read, is not UTF-8, too long or empty.
    """
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    if args.prompt is None and args.prompt_file is None:
        return None
    path = "-" if args.prompt_file is None else args.prompt_file
    where = "stdin" if path == "-" else path
    try:
        if path == "-":
            raw = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(MAX_PROMPT_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read: {error.strerror}", "Check the path.", EXIT_USAGE
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start})", "Save it as UTF-8.", EXIT_USAGE
        ) from error
    if len(raw) > MAX_PROMPT_BYTES:
        raise UserError(f"{where}: longer than {MAX_PROMPT_BYTES} bytes", "", EXIT_USAGE)
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UserError(f"{where}: empty", "Give a prompt of at least one character.", EXIT_USAGE)
    return text


def example(seed: int) -> WordProblem:
    """What is asked where nobody asks anything: a problem held out from training."""
    from bailing_jax.tasks.word_problems import word_problem

    return word_problem(seed, 0, "test")


def parse_ids(text: str | None) -> list[int] | None:
    """The token ids of --prompt-ids.

    Raises:
        UserError: it is not a list of ids.
    """
    if text is None:
        return None
    words = text.strip("[] ").replace(",", " ").split()
    if not all(word.isdecimal() and len(word) < 20 for word in words):
        raise UserError(
            f"--prompt-ids: {text!r:.60} is not a list of token ids", "Write 1,2,3.", EXIT_USAGE
        )
    return [int(word) for word in words]


class PromptMaker:
    """Turns texts and conversations into token ids, as the flags say."""

    def __init__(
        self, llm: LLM, *, raw: bool, system: str | None, template_args: Mapping[str, Any]
    ) -> None:
        """Check that the model can do what the flags ask.

        Raises:
            UserError: there is no chat template for --system or --chat-template-args.
        """
        self._llm = llm
        self._system = system
        self._template_args = template_args
        self._plain = raw or llm.tokenizer is None or llm.chat_template is None
        flag = "--system" if system is not None else "--chat-template-args"
        if self._plain and (system is not None or template_args):
            raise UserError(
                f"{flag}: the model has no chat template to write it", "Leave it out.", EXIT_USAGE
            )

    def from_text(self, text: str) -> list[int]:
        """A text as the user's only message, or as it is where there is no template (or --raw)."""
        if self._plain:
            return self._llm.encode(text)
        return self.from_messages([{"role": "user", "content": text}])

    def opens_thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thinking block, so that the answer begins in one."""
        from bailing_jax.text.thinking import prompt_opens_thinking

        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            return False
        # The tag and white space around it are a few tokens. Decoding leaves control tokens out.
        tag = tokenizer.token_id("<think>")
        opened = tag is not None and tag in ids[-3:]
        return opened or prompt_opens_thinking(tokenizer.decode(ids[-16:]))

    def from_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation; --system stands before it unless it has a system message itself."""
        listed = list(messages)
        has_own = bool(listed) and listed[0].get("role") == "system"
        if self._system is not None and not has_own:
            listed.insert(0, {"role": "system", "content": self._system})
        return self._llm.chat_prompt(listed, self._template_args)
