"""Running jobs in tests: inputs, answers by id, and what an output asks of the system."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_models import is_idle, linear_llm

from bailing_jax import LLM
from bailing_jax.cli import job_output
from bailing_jax.cli.job import run_job
from bailing_jax.errors import EXIT_OK, EXIT_USAGE, UserError

Entry = dict[str, Any]


class Prompts:
    """As the command makes token ids; `raw` leaves the template out for texts."""

    def __init__(self, llm: LLM, raw: bool = False) -> None:
        self._llm = llm
        self._raw = raw

    def from_text(self, text: str) -> list[int]:
        if self._raw:
            return self._llm.encode(text)
        return self.from_messages([{"role": "user", "content": text}])

    def from_messages(self, messages: Any) -> list[int]:
        return self._llm.chat_prompt(messages)


def write_input(path: Path, entries: Sequence[Entry]) -> Path:
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(
    llm: LLM,
    source: Path | None,
    output: Path | None,
    raw: bool = False,
    say: Callable[[str], None] = lambda _line: None,
    **defaults: Any,
) -> None:
    defaults = {"max_tokens": 5, "seed": 0, "ignore_eos": True, **defaults}
    code = run_job(lambda: (llm, Prompts(llm, raw)), source, output, defaults, say)
    assert code == EXIT_OK
    assert is_idle(llm)


def read(path: Path) -> dict[Any, Entry]:
    """The answers by id; every line is whole and no id stands twice."""
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    answers = [json.loads(line) for line in text.split("\n")[:-1]]
    assert len({repr(answer["id"]) for answer in answers}) == len(answers)
    return {answer["id"]: answer for answer in answers}


def sorted_lines(path: Path) -> list[bytes]:
    """All lines, in an order of their own."""
    return sorted(path.read_bytes().splitlines(keepends=True))


SHORT: list[Entry] = [
    {"id": f"é{i}", "prompt_ids": [i, 7 * i % 300], "max_tokens": 1 + 5 * i % 4, "seed": i,
     "temperature": i % 2}
    for i in range(1, 9)
]  # fmt: skip


def whole_run(source: Path, folder: Path) -> list[bytes]:
    """The lines of an uninterrupted run of SHORT, which `source` holds then."""
    path = folder / "whole.jsonl"
    run(linear_llm(), write_input(source, SHORT), path)
    assert len(read(path)) == len(SHORT)
    return path.read_bytes().splitlines(keepends=True)


def watch_os(monkeypatch: pytest.MonkeyPatch, name: str, do: Any = None) -> list[Any]:
    """What the output passes to a function of os, which `do` replaces."""
    calls: list[Any] = []
    real = getattr(os, name)

    def called(fd: int, *args: Any) -> Any:
        calls.append(bytes(args[0]) if args else os.fstat(fd).st_size)
        return (do or real)(fd, *args)

    class Os:
        def __getattr__(self, attribute: str) -> Any:
            return called if attribute == name else getattr(os, attribute)

    monkeypatch.setattr(job_output, "os", Os())
    return calls


def no_model() -> Any:
    pytest.fail("the model was loaded")


def refused(
    source: Path | None, output: Path | None, load: Any = no_model, **defaults: Any
) -> UserError:
    before = output.read_bytes() if output is not None and output.is_file() else None
    with pytest.raises(UserError) as caught:
        run_job(load, source, output, defaults, lambda _line: None)
    assert caught.value.exit_code == EXIT_USAGE
    if output is not None:
        assert (output.read_bytes() if output.is_file() else None) == before
    return caught.value
