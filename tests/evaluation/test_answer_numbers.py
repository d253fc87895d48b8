"""Which number an answer gives: forms that mean the same, and what is no number."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bailing_jax.evaluation.numbers import final_number, marked_number

# Text, the number behind ####, the final number.
FORMS: list[tuple[str, str | None, str | None]] = [
    ("3 + 4 = 7\n#### 7", "7", "7"),
    ("####7", "7", "7"),
    ("####    7  ", "7", "7"),
    ("#### 7.", "7", "7"),
    ("#### 7.50", "7.5", "7.5"),
    ("#### $7", "7", "7"),
    ("#### $ 7", "7", "7"),
    ("#### -7", "-7", "-7"),
    ("#### −7", "-7", "-7"),
    ("#### -$7", "-7", "-7"),
    ("#### $-7", "-7", "-7"),
    ("#### 1,234", "1234", "1234"),
    ("#### $1,234,567.89.", "1234567.89", "1234567.89"),
    ("#### 7 apples and 3 pears", "7", "7"),
    ("#### **7**", "7", "7"),
    ("**#### 7**", "7", "7"),
    ("#### 7\n\nQuestion: 9", "7", "7"),
    ("#### 7\nNo, wait.\n#### 8", "8", "8"),
    ("#### Step one\n2 * 3 = 6", None, "6"),
    ("####\n7 of 9", None, "9"),
    ("### 7", None, "7"),
    ("The answer is 7.", None, "7"),
    ("The answer is $1,234.", None, "1234"),
    ("The answer is **7**.", None, "7"),
    ("so x = -7", None, "-7"),
    ("(-7)", None, "-7"),
    ("9-7", None, "7"),
    ("9 - 7", None, "7"),
    ("(9)-7", None, "7"),
    ("a[1]-7", None, "7"),
    ("- 7 apples", None, "7"),
    ("1,2,3", None, "3"),
    ("12,34", None, "34"),
    ("1,2345", None, "2345"),
    ("3/4", None, "4"),
    ("7%", None, "7"),
    ("room B7", None, "7"),
    (r"\boxed{7}", None, "7"),
    ("<<3+4=7>>7", None, "7"),
    ("007", None, "7"),
    ("", None, None),
    ("no number, not one.", None, None),
    ("####", None, None),
    ("٣ and ½", None, None),
]


@pytest.mark.parametrize(("text", "marked", "final"), FORMS)
def test_form(text: str, marked: str | None, final: str | None) -> None:
    assert marked_number(text) == (None if marked is None else Decimal(marked))
    assert final_number(text) == (None if final is None else Decimal(final))


@given(
    st.integers(-(10**40), 10**40),
    st.integers(0, 3),
    st.sampled_from(["{}", "${}", "{}.", "${}.", " {} dollars", "**{}**"]),
    st.sampled_from(["", "First 3 + 4 = 7.\n", "#### 5\n", "Not #### so.\n"]),
)
def test_the_value_does_not_depend_on_how_it_is_written(
    units: int, places: int, form: str, before: str
) -> None:
    """Grouped or not, dollars or not, with a period or not, whatever stands before it."""
    want = value = Decimal(f"{units}E-{places}")  # exact, unlike arithmetic
    for spelled in (f"{value:f}", f"{value:,f}"):
        text = form.format(spelled)
        assert marked_number(f"{before}#### {text}") == want
        assert final_number(f"{before}#### {text}\nIs 1 or 2 left?") == want
        if "####" not in before:
            assert final_number(f"{before}It is {text}") == want
