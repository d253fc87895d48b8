"""Recall of a code word over a distance: which word belonged to whom, many sentences ago.

A prompt tells the code words of 1 to 8 people at scattered places in filler text and ends with a
question about one of them. The distance is counted in tokens, from the end of the sentence that
tells the asked code word to the end of the prompt. A pair of words is held out from the train
split by a stable hash, one pair in 8; the code word asked for in a test problem is such a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from bailing_jax.errors import bad_value
from bailing_jax.tasks.filler import filler_sentence
from bailing_jax.tasks.held_out import (
    Split,
    between,
    is_held_out,
    pick,
    pick_distinct,
    random_of,
)
from bailing_jax.tasks.stories import NAMES

MIN_DISTANCE = 50
MAX_DISTANCE = 1_500
MAX_TOKENS = 1_799  # of a prompt
MAX_PEOPLE = 8
PAIR_ONE_IN = 8
# A first sentence has no space before it, which may change its count by a token or two.
_MAX_COUNTED = MAX_TOKENS - 19
_MAX_BEFORE = 300  # tokens before the asked code word's sentence
# The range of distances, and even parts of a draw that is nearly even in the logarithm.
_OCTAVES = ((50, 99), (100, 199), (200, 399), (400, 799), (800, 1_500))

FIRST_WORDS = (
    "amber", "ancient", "arctic", "azure", "bitter", "blazing", "bold", "brave", "bronze", "busy",
    "charming", "clever", "copper", "cosmic", "crimson", "crystal", "curious", "daring", "dusty",
    "eager", "electric", "elegant", "emerald", "fancy", "fearless", "fierce", "floating", "frozen",
    "gentle", "giant", "gloomy", "golden", "graceful", "hidden", "hollow", "humble", "icy", "ivory",
    "jolly", "lazy", "lonely", "lucky", "magic", "marble", "mellow", "mighty", "misty", "noble",
    "odd", "polite", "proud", "purple", "rapid", "rusty", "scarlet", "secret", "shiny", "silent",
    "silver", "sleepy", "solar", "velvet", "violet", "witty",
)  # fmt: skip
SECOND_WORDS = (
    "badger", "bat", "bear", "beaver", "bison", "camel", "cobra", "condor", "coyote", "crab",
    "crane", "crow", "deer", "dolphin", "dragon", "eagle", "falcon", "ferret", "finch", "fox",
    "gazelle", "gecko", "giraffe", "goose", "hamster", "hawk", "heron", "hornet", "hyena",
    "iguana", "jackal", "jaguar", "koala", "lemur", "leopard", "lion", "lizard", "llama",
    "lobster", "lynx", "magpie", "mole", "moose", "moth", "octopus", "otter", "owl", "panda",
    "panther", "parrot", "pelican", "penguin", "puma", "rabbit", "raven", "salmon", "seal",
    "shark", "spider", "squid", "swan", "tiger", "walrus", "wolf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecallProblem:
    """One problem.

    Args:
        prompt: facts, filler and the question, one paragraph.
        answer: the code word asked for.
        distance: tokens from the end of the sentence that tells it to the end of the prompt.
    """

    prompt: str
    answer: str
    distance: int


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether code words of these two words belong to the test split."""
    return is_held_out(f"code word:{first}-{second}", PAIR_ONE_IN)


def recall_problem(
    seed: int,
    index: int,
    split: Split,
    count_tokens: Callable[[str], int],
    distance: int | None = None,
) -> RecallProblem:
    """Problem `index` of a split; the same arguments give the same problem everywhere.

    Args:
        seed: which sequence of problems, 0 or greater.
        index: which problem of it, 0 or greater.
        split: "train" or "test".
        count_tokens: how many tokens a sentence with the space before it has, at least 1. Called
            once a sentence; hashable, since what it said is remembered.
        distance: the distance to come within a sentence of, 50..1,500; None draws it nearly
            evenly in the logarithm.

    Raises:
        UserError: an argument outside these.
        ValueError: `count_tokens` finds no tokens in a sentence, or so many that none fit.
    """
    if distance is not None and not MIN_DISTANCE <= distance <= MAX_DISTANCE:
        raise bad_value("distance", distance, f"{MIN_DISTANCE}..{MAX_DISTANCE} or None")
    random = random_of("recall", seed, split, index)
    wanted = between(*pick(_OCTAVES, random), random) if distance is None else distance
    names = pick_distinct(NAMES, between(1, MAX_PEOPLE, random), random)
    words = _code_words(len(names), split, random)
    asked, *others = (
        f"The code word of {name} is {word}." for name, word in zip(names, words, strict=True)
    )
    question = f"What is the code word of {names[0]}?"

    tokens = partial(_tokens, count_tokens)
    # Tokens of filler and facts after the asked fact and before it.
    room = [wanted - tokens(question), 0]
    least = [MIN_DISTANCE - tokens(question), 0]
    room[1] = max(0, min(_MAX_BEFORE, _MAX_COUNTED - wanted - tokens(asked)))
    placed: tuple[list[str], list[str]] = ([], [])
    for fact in others:
        side = 0 if random() * sum(room) < room[0] else 1
        if tokens(fact) <= room[side]:
            placed[side].append(fact)
            room[side] -= tokens(fact)
            least[side] -= tokens(fact)
    room[1] = between(0, room[1], random)
    after, before = (
        _scattered(placed[side], room[side], least[side], tokens, random) for side in (0, 1)
    )
    actual = sum(map(tokens, after)) + tokens(question)
    if actual > MAX_DISTANCE or actual + sum(map(tokens, [*before, asked])) > MAX_TOKENS:
        raise ValueError(f"count_tokens finds {tokens(question)} tokens in {question!r}: too many")
    return RecallProblem(" ".join([*before, asked, *after, question]), words[0], actual)


def _scattered(
    facts: list[str],
    room: int,
    least: int,
    tokens: Callable[[str], int],
    random: Callable[[], float],
) -> list[str]:
    """The facts among filler that fills the room as far as whole sentences do, but the least."""
    sentences: list[str] = []
    filled = 0
    while True:
        sentence = filler_sentence(random)
        after = filled + tokens(sentence)
        if after > room and filled >= least:
            break
        sentences.append(sentence)
        filled = after
    for fact in facts:
        sentences.insert(between(0, len(sentences), random), fact)
    return sentences


@lru_cache(maxsize=1 << 16)
def _tokens(count_tokens: Callable[[str], int], sentence: str) -> int:
    """The tokens of a sentence in the middle of a text."""
    tokens = count_tokens(" " + sentence)
    if tokens < 1:
        raise ValueError(f"count_tokens finds {tokens} tokens in {sentence!r}")
    return tokens


def _code_words(count: int, split: Split, random: Callable[[], float]) -> list[str]:
    """Code words without a common first or second word; the first is the one asked for."""
    words: list[str] = []
    used: set[str] = set()
    while len(words) < count:
        first, second = pick(FIRST_WORDS, random), pick(SECOND_WORDS, random)
        if first in used or second in used:
            continue
        is_asked, held_out = not words, is_held_out_pair(first, second)
        if (split == "train" and held_out) or (split == "test" and is_asked and not held_out):
            continue
        used |= {first, second}
        words.append(f"{first}-{second}-{between(10, 99, random)}")
    return words
