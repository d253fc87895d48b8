"""When one sequence ends, and which of its text may be shown before we know.

`StopMatcher` is fed each token with the text it completed. Three things end a sequence: a stop or
end-of-sequence id (its own text is not shown), a stop string (neither it nor what follows is
shown; finish reason "stop" for all three), and the token budget ("length"). A stop string may
span tokens, so text that could be the beginning of one is held back. The strings are matched by
one Aho-Corasick automaton: after each character its state is the longest end of the text that
begins some stop string, so what to hold is the state's depth, and the cost is linear in the text.
Works without a tokenizer (text None): ids and budget only. Knows nothing of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from bailing_jax.errors import EXIT_USAGE, UserError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class StopResult:
    """The text that may be shown now, and why the sequence ended, if it did."""

    text: str
    finish_reason: FinishReason | None


class StopMatcher:
    """Stop handling of one sequence: `push` every token, then `flush` once at the end.

    With stop strings "bcd" and "c" the text "abc" ends at the "c": the string that is complete
    first counts, and of several complete at the same character the longest. So what is shown
    does not depend on how the text was split into tokens.

    Raises:
        UserError: an empty stop string, too many or too long ones, or max_tokens < 1.
    """

    def __init__(
        self,
        stop_strings: Sequence[str],
        stop_ids: Collection[int],
        ignore_eos: bool,
        eos_ids: Collection[int],
        max_tokens: int,
    ) -> None:
        """Check the limits and build the automaton; `ignore_eos` leaves `stop_ids` in force."""
        _check(stop_strings, max_tokens)
        self._ids = frozenset(stop_ids) | (frozenset() if ignore_eos else frozenset(eos_ids))
        self._tokens_left = max_tokens
        self._automaton = _Automaton(stop_strings)
        self._state = 0
        self._held = ""
        self._finish_reason: FinishReason | None = None
        self._cut = False

    @property
    def ids(self) -> frozenset[int]:
        """The ids that end the sequence."""
        return self._ids

    def ends_with(self, token_id: int) -> bool:
        """Whether this id would end the sequence; its text need not be decoded then."""
        return token_id in self._ids

    def push(self, token_id: int, text_increment: str | None) -> StopResult:
        """Take one token and the text it completed; nothing is held back once it is finished."""
        if self._finish_reason is not None:
            raise ValueError(f"push after the sequence finished ({self._finish_reason})")
        self._tokens_left -= 1
        if token_id in self._ids:
            self._finish_reason = "stop"
            return StopResult(self.flush(), "stop")
        text = self._match(text_increment or "")
        if self._cut:
            self._finish_reason = "stop"
        elif self._tokens_left <= 0:
            self._finish_reason = "length"
            text += self.flush()
        return StopResult(text, self._finish_reason)

    def flush(self, text_increment: str = "") -> str:
        """The text still held, when no more tokens come (finished, aborted).

        `text_increment` is what the text stream itself still held: incomplete characters.
        """
        if self._cut:
            return ""
        text = self._match(text_increment)
        if not self._cut:
            text += self._held
        self._held, self._state = "", 0
        return text

    def _match(self, new: str) -> str:
        """Add `new` to the held text and return what can no longer belong to a stop string."""
        text = self._held + new
        for end, character in enumerate(new, len(self._held) + 1):
            self._state = self._automaton.step(self._state, character)
            if length := self._automaton.matched[self._state]:
                self._cut, self._held = True, ""
                return text[: end - length]
        shown = len(text) - self._automaton.depth[self._state]
        self._held = text[shown:]
        return text[:shown]


class _Automaton:
    """Aho-Corasick over the stop strings; state 0 is "nothing matched".

    `depth[s]`: characters of a stop string that the text now ends with. `matched[s]`: length of
    the longest stop string the text now ends with, or 0.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depth = [0]
        self.matched = [0]
        self._next: list[dict[str, int]] = [{}]
        for string in strings:
            self._add(string)
        self._fallback = [0] * len(self._next)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character; constant time on average over a text."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.matched.append(0)
            state = self._next[state][character]
        self.matched[state] = len(string)

    def _link(self) -> None:
        """Give each state that of its longest proper end: where to go on when no edge fits."""
        waiting = deque([0])
        while waiting:  # breadth first, so that shorter states are linked before longer ones
            state = waiting.popleft()
            for character, child in self._next[state].items():
                if state:
                    self._fallback[child] = self.step(self._fallback[state], character)
                # A string inside a longer one is complete as soon as it ends.
                self.matched[child] = self.matched[child] or self.matched[self._fallback[child]]
                waiting.append(child)


def _check(stop_strings: Sequence[str], max_tokens: int) -> None:
    if max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}; allowed: 1 or more", "", EXIT_USAGE)
    if len(stop_strings) > MAX_STOP_STRINGS:
        raise UserError(
            f"stop = {len(stop_strings)} strings; allowed: up to {MAX_STOP_STRINGS}",
            exit_code=EXIT_USAGE,
            options=("stop",),
        )
    for string in stop_strings:
        if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise UserError(
                f"stop = {string[:20]!r}, of {len(string)} characters; "
                f"allowed: 1 to {MAX_STOP_CHARACTERS}",
                exit_code=EXIT_USAGE,
                options=("stop",),
            )
