"""S09, what a weight may be: every bit pattern of every dtype against what numpy says it means.

`check_values` looks at bits. Here the same values are widened to float64 and looked at one by one.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bailing_jax.errors import EXIT_USAGE, UserError
from convert import values
from convert.safetensors_file import DTYPES
from convert.values import LARGEST, check_values, count_not_finite

FILE = Path("folder/model.safetensors")
FLOATS = [str(dtype) for dtype in DTYPES.values() if dtype.kind not in "biu"]
INTEGERS = [str(dtype) for dtype in DTYPES.values() if dtype.kind in "biu"]
# Whose range goes beyond LARGEST; that of float8_e8m0fnu does too, but it holds scales.
WIDE = ["float64", "float32", "bfloat16"]
SMALL = [name for name in FLOATS if name not in ("float64", "float32")]


def of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def patterns(name: str) -> np.ndarray:
    """Every value of a dtype of one or two bytes."""
    size = of(name).itemsize
    return np.arange(2 ** (8 * size), dtype=f"u{size}").view(of(name))


def problem(array: np.ndarray) -> tuple[str, int, tuple[int, ...]] | None:
    """What `check_values` finds: which kind, how many, and the first index."""
    try:
        check_values(array, FILE, "a.name")
        return None
    except UserError as caught:
        error = caught
    assert error.exit_code == EXIT_USAGE
    found = re.fullmatch(
        rf"{FILE}: tensor 'a\.name' has (\d+) (NaN or infinite values|values above 1e\+30 in "
        rf"magnitude) of {array.size}, the first at index \((.*)\)",
        error.message,
    )
    assert found
    index = tuple(int(i) for i in found[3].split(",") if i)
    return found[2].split()[0], int(found[1]), index


def by_numpy(array: np.ndarray) -> tuple[str, int, tuple[int, ...]] | None:
    """The same, slowly."""
    # What numpy says of the dtype itself: a cast of a signalling NaN would warn.
    wide = np.array([float(value) for value in array.reshape(-1)]).reshape(array.shape)
    limit = LARGEST if str(array.dtype) in WIDE else math.inf
    for kind, wrong in (("NaN", ~np.isfinite(wide)), ("values", np.abs(wide) > limit)):
        if wrong.any():
            index = np.argwhere(wrong)[0]
            return kind, int(wrong.sum()), tuple(int(i) for i in index)
    return None


# ---- every value


@pytest.mark.parametrize("name", SMALL)
def test_s09_every_bit_pattern_is_judged_rightly(name: str) -> None:
    array = patterns(name)
    wide = [float(value) for value in array]
    limit = LARGEST if name in WIDE else math.inf
    good = np.array([math.isfinite(value) and abs(value) <= limit for value in wide])
    assert problem(array[good]) is None
    # Alone and last in an array that is otherwise sound.
    bad = array[~good]
    one = np.ones((2, 3), of(name))
    for value in bad[:: max(len(bad) // 99, 1)]:
        one[1, 2] = value
        wanted = "values" if math.isfinite(float(value)) else "NaN"
        assert problem(one) == (wanted, 1, (1, 2))


@pytest.mark.parametrize("name", FLOATS)
def test_s09_random_bits_are_counted_and_the_first_is_named(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of any size: what lies across their borders is seen once."""
    kinds = set()
    for size in (1, 7, 24, 25, 10**6):
        monkeypatch.setattr(values, "_BLOCK", size)
        for share in (0.0, 0.02, 0.3, 1.0):
            array = np.array(rng.uniform(0.5, 1.0, (5, 5, 2))).astype(of(name))
            random = rng.integers(0, 256, array.nbytes, np.uint8).view(of(name)).reshape(5, 5, 2)
            array = np.where(rng.random((5, 5, 2)) < share, random, array)
            if share > 0.1:
                array[rng.random((5, 5, 2)) < 0.1] = np.nan
            wanted = by_numpy(array)
            assert problem(array) == wanted
            count, first = count_not_finite(array)
            if wanted and wanted[0] == "NaN":
                index = int(np.ravel_multi_index(wanted[2], array.shape))
                assert (count, first) == (wanted[1], index)
            else:
                assert (count, first) == (0, -1)
            kinds.add(wanted and wanted[0])
    assert None in kinds
    assert "NaN" in kinds


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_s09_each_place_of_a_block_is_looked_at(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_BLOCK", size)
    for place in range(9):
        array = np.ones(9, of(name))
        array[place] = np.nan
        assert problem(array) == ("NaN", 1, (place,))
        if name in WIDE:
            array[place] = -1e31
            assert problem(array) == ("values", 1, (place,))


def test_s09_the_real_blocks_too() -> None:
    array = np.ones(3 * values._BLOCK - 1, np.float16)
    for place in (0, values._BLOCK - 1, values._BLOCK, array.size - 1):
        array[place] = -np.inf
        assert problem(array) == ("NaN", 1, (place,))
        array[place] = 1


# ---- the limit


@pytest.mark.parametrize("name", WIDE)
def test_s09_the_largest_value_passes_and_the_next_does_not(name: str) -> None:
    dtype = of(name)
    bits = np.array([LARGEST], dtype).view(f"u{dtype.itemsize}")
    assert float(bits.view(dtype)[0]) == LARGEST
    for sign in (0, 1):
        signed = bits | np.array(sign << (8 * dtype.itemsize - 1), bits.dtype)
        assert problem(signed.view(dtype)) is None
        assert problem((signed + 1).view(dtype)) == ("values", 1, (0,))
    assert problem(np.array([1e30, -1e30], dtype)) is None
    assert problem(np.array([1, 1.01e30], dtype)) == ("values", 1, (1,))


def test_s09_a_tensor_passes_widened_and_narrowed_as_it_passes_itself() -> None:
    """Or a folder that was just converted would not be sound."""
    array = patterns("bfloat16")
    good = array[[problem(array[i : i + 1]) is None for i in range(len(array))]]
    assert problem(good.astype(np.float32)) is None
    bits = np.array([LARGEST], np.float32).view(np.uint32)[0]
    near = np.arange(bits - 2**17, bits + 1, dtype=np.uint32).view(np.float32)
    assert problem(near) is None
    assert problem(near.astype(of("bfloat16"))) is None


def test_s09_not_finite_is_said_before_too_large() -> None:
    array = np.array([1, 1e35, np.nan, -np.inf], np.float32)
    assert problem(array) == ("NaN", 2, (2,))


# ---- zeros


@pytest.mark.parametrize("name", [*INTEGERS, *(n for n in FLOATS if n != "float8_e8m0fnu")])
def test_only_zeros_of_either_sign_are_nothing_but_zeros(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = of(name)
    zeros = np.zeros((2, 5), dtype)
    assert check_values(zeros, FILE, "w") is True
    assert check_values(np.zeros((0, 3), dtype), FILE, "w") is True
    assert check_values(np.zeros((), dtype), FILE, "w") is True
    assert check_values(-zeros if dtype.kind not in "biu" else zeros, FILE, "w") is True
    for size in (1, 3, 10**6):
        monkeypatch.setattr(values, "_BLOCK", size)
        for place in (0, 4, 9):
            array = zeros.copy()
            # The smallest pattern above zero: a subnormal, or 1.
            array.reshape(-1).view(np.uint8)[place * dtype.itemsize] = 1
            assert check_values(array, FILE, "w") is False


def test_a_scale_without_a_zero_is_not_zero() -> None:
    assert check_values(np.zeros(4, np.uint8).view(of("float8_e8m0fnu")), FILE, "w") is False


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_and_bools_pass_whatever_they_are(name: str, rng: np.random.Generator) -> None:
    raw = rng.integers(0, 256, 64 * of(name).itemsize, np.uint8)
    array = (raw & 1 if name == "bool" else raw).view(of(name))
    assert problem(array) is None
    assert count_not_finite(array) == (0, -1)


@pytest.mark.parametrize("name", FLOATS)
def test_nothing_is_written(name: str) -> None:
    array = np.ones((3, 4), of(name))
    array.flags.writeable = False
    before = array.tobytes()
    assert check_values(array, FILE, "w") is False
    assert array.tobytes() == before


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2), (2, 3, 4)])
def test_s09_the_index_has_the_tensors_dimensions(shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.float32)
    array.reshape(-1)[-1] = np.nan
    assert problem(array) == ("NaN", 1, tuple(size - 1 for size in shape))
