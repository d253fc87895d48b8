"""Plain sentences that say nothing of use, to put distance between a fact and its question.

A sentence is a subject, an action and a place, or one of a few that stand alone. There are no
names of people, no numbers and no hyphens in them, so nothing here looks like a code word.
"""

from __future__ import annotations

from collections.abc import Callable

from bailing_jax.tasks.held_out import pick

_SUBJECTS = (
    "The farmer", "The baker", "The teacher", "The painter", "The doctor", "The driver",
    "The sailor", "A young student", "An old man", "A tall woman", "A small child", "A neighbor",
    "A group of friends", "The gardener", "A tired guest", "The cook", "The new worker", "A cousin",
    "A quiet visitor", "The happy family",
)  # fmt: skip
_ACTIONS = (
    "walks slowly", "waits for the bus", "reads a long letter", "sings a song", "drinks warm tea",
    "eats bread and cheese", "looks at the clouds", "talks about the weather", "sits and rests",
    "cleans the windows", "looks for a lost key", "takes a photo", "carries a heavy load",
    "listens to the radio", "tells a funny story", "draws a picture", "watches the birds",
    "plays the piano", "washes the dishes", "smiles at everyone",
)  # fmt: skip
_PLACES = (
    "near the river", "in the garden", "at the station", "on the bridge", "behind the old mill",
    "by the sea", "in front of the house", "at the market", "under a large tree", "in the kitchen",
    "next to the church", "on the hill", "at the end of the street", "in the park",
    "across from the school", "along the road",
)  # fmt: skip
_ALONE = (
    "It rains in the village.", "The wind is cold today.", "The sun is bright this morning.",
    "Snow covers the roof.", "The train is late again.", "The shop opens early.",
    "Nobody is in a hurry.", "The night is calm and clear.", "A boat leaves the harbor.",
    "The leaves turn yellow.", "Dinner is almost ready.", "The door is open.",
    "Music comes from the next room.", "The lake is still.", "Summer is short here.",
    "The lights go out one by one.",
)  # fmt: skip
_SHARE_ALONE = 0.2


def filler_sentence(random: Callable[[], float]) -> str:
    """One of about 6,400 sentences."""
    if random() < _SHARE_ALONE:
        return pick(_ALONE, random)
    return f"{pick(_SUBJECTS, random)} {pick(_ACTIONS, random)} {pick(_PLACES, random)}."
