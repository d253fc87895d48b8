"""The number an answer ends with: what counts as one, and where it is looked for.

A number is digits, with commas between groups of three, and a fraction after a point. A minus
and a dollar sign may stand right before it; a minus after a letter, a digit or a bracket, or with
a blank behind it, subtracts. Commas, the dollar sign and a period at its end are no part of its
value, so that "$1,234.", "1234" and "1234.00" are equal.
"""

from __future__ import annotations

import re
from decimal import Decimal

# The sign before the dollar or after it; U+2212 is the minus that typesetting writes.
_NUMBER = (
    r"(?P<sign>(?<![\w)\]])[-−])?(?:\$ ?)?(?P<inner>(?<=\$)[-−])?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?P<fraction>\.[0-9]+)?"
)
_ANYWHERE = re.compile(_NUMBER)
# Asterisks: "#### **18**" is how chat models write it.
_MARKED = re.compile(r"####[ \t]*\**[ \t]*" + _NUMBER)


def marked_number(text: str) -> Decimal | None:
    """The number right behind the last `####` that has one behind it; None without one.

    A heading (`#### Step two`) is no such mark. What follows the number does not matter.
    """
    return _last(_MARKED, text)


def final_number(text: str) -> Decimal | None:
    """The number behind `####`, else the last number of the text; None without any."""
    marked = marked_number(text)
    return _last(_ANYWHERE, text) if marked is None else marked


def _last(pattern: re.Pattern[str], text: str) -> Decimal | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = matches[-1]
    value = Decimal(found["digits"].replace(",", "") + (found["fraction"] or ""))
    return value.copy_negate() if found["sign"] or found["inner"] else value
