"""Greedy answers to problems, as many at once as the engine has room for.

Each answer depends on its own problem and the model only; who shares a step changes the last bits
of the logits at most. Every prompt is checked before the first one runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bailing_jax.cli.prompts import PromptMaker
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.evaluation.problems import Problem, Task
from bailing_jax.llm import LLM
from bailing_jax.request import Request
from bailing_jax.sampling_params import NEUTRAL, SamplingParams
from bailing_jax.text.thinking import split

PROGRESS_S = 5.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Answered:
    """A problem with its answer.

    Attributes:
        problem: what was asked.
        text: the whole answer, its thinking too.
        tokens: its token ids.
        finish_reason: "stop", or "length" where it was cut.
        is_correct: whether what follows the thinking is right.
        prompt_tokens: of the prompt.
    """

    problem: Problem
    text: str
    tokens: list[int]
    finish_reason: str
    is_correct: bool
    prompt_tokens: int

    def record(self, measure: str | None) -> dict[str, Any]:
        """The line of --output."""
        return {
            "index": self.problem.index,
            "prompt": self.problem.prompt,
            "reference": self.problem.reference,
            "answer": self.text,
            "tokens": self.tokens,
            "correct": self.is_correct,
            **({} if measure is None else {measure: self.problem.measure}),
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True)
class Run:
    """All problems in their order, and the seconds that answering took."""

    answered: list[Answered]
    seconds: float


class Answerer:
    """Asks one model the problems of one task.

    Args:
        llm: the engine; its `max_num_seqs` is how many run at once.
        task: what is asked.
        max_tokens: most tokens of an answer.
        template_args: variables of the chat template.

    Raises:
        UserError: no chat template where the task needs one.
    """

    def __init__(
        self, llm: LLM, task: Task, max_tokens: int, template_args: Mapping[str, Any]
    ) -> None:
        if task.is_chat and llm.chat_template is None:
            other = "give --prompt 8shot" if task.name == "gsm8k" else "name another model"
            raise UserError(
                f"{task.name}: the model has no chat template to ask with",
                f"Use a complete release folder, or {other}.",
                EXIT_USAGE,
            )
        self._llm = llm
        self._task = task
        self._prompts = PromptMaker(llm, raw=False, system=None, template_args=template_args)
        # None of it from generation_config.json: a release samples, an evaluation does not.
        self.params = SamplingParams(
            max_tokens=max_tokens,
            stop=task.stop,
            **NEUTRAL,  # pyright: ignore[reportArgumentType]
        )

    def prepare(self, problems: Sequence[Problem]) -> list[Request]:
        """Check every prompt; nothing runs.

        Raises:
            UserError: one is too long, or can't be encoded.
        """
        return [self._prepare(problem) for problem in problems]

    def run(
        self,
        problems: Sequence[Problem],
        requests: Sequence[Request],
        keep: Callable[[Answered], None],
        say: Say,
    ) -> Run:
        """Answer them all.

        Args:
            problems: from the task.
            requests: from `prepare`.
            keep: called with each answer as it is finished, in order of completion.
            say: called with a line of progress now and then.
        """
        start = said = time.perf_counter()
        waiting = list(range(len(problems)))[::-1]
        active: list[int] = []
        answered: dict[int, Answered] = {}
        try:
            while waiting or active:
                # So many that no slot waits for one.
                while waiting and len(active) < 2 * self._llm.limits.total_num_seqs:
                    active.append(waiting.pop())
                    self._llm.submit(requests[active[-1]])
                self._llm.step()
                for number in [n for n in active if not self._llm.is_unfinished(requests[n])]:
                    active.remove(number)
                    requests[number].raise_error()
                    answered[number] = self._judged(problems[number], requests[number])
                    keep(answered[number])
                if time.perf_counter() - said >= PROGRESS_S:
                    said = time.perf_counter()
                    say(_progress(list(answered.values()), len(problems), said - start))
        finally:
            for number in active:
                self._llm.cancel(requests[number])
        seconds = time.perf_counter() - start
        return Run([answered[number] for number in range(len(problems))], seconds)

    def _prepare(self, problem: Problem) -> Request:
        what = f"problem {problem.index}"
        if not self._task.is_chat:
            return self._llm.prepare(problem.prompt, self.params, what)
        messages = [{"role": "user", "content": problem.prompt}]
        try:
            ids = self._prompts.from_messages(messages)
        except UserError as error:
            raise UserError(f"{what}: {error.message}", error.hint, EXIT_USAGE) from error
        return self._llm.prepare(ids, self.params, what)

    def _judged(self, problem: Problem, request: Request) -> Answered:
        (output,) = request.output().outputs
        if output.text is None or output.finish_reason is None:
            raise RuntimeError(f"problem {problem.index}: the engine gave no answer")
        thinking = self._prompts.opens_thinking(request.prompt_token_ids)
        answer = split(output.text, thinking)[1]
        return Answered(
            problem,
            output.text,
            output.token_ids,
            output.finish_reason,
            problem.is_correct(answer),
            len(request.prompt_token_ids),
        )


def _progress(answered: Sequence[Answered], total: int, seconds: float) -> str:
    correct = sum(answer.is_correct for answer in answered)
    tokens = sum(len(answer.tokens) for answer in answered)
    return (
        f"{len(answered)}/{total} problems, {correct} correct, "
        f"{tokens / seconds:.1f} tokens/s of finished answers"
    )
