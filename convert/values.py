"""What a weight may be: finite, and of a size that a weight can have.

`check_values` looks at every element once, in blocks that stay in the cache, and at bits rather
than numbers: sign removed, the bit patterns of floats are ordered as their magnitudes, with
infinity and NaN at the top, so one maximum answers everything. numpy only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.strict_json import malformed, show

# Larger magnitudes are finite in bfloat16 and float32 and yet never a trained weight. A value of
# bfloat16: what passes as it is then also passes widened to float32, or narrowed from it.
LARGEST = float(ml_dtypes.bfloat16(1e30))

_BLOCK = 2**18  # elements looked at together: they stay in the cache, 10 times faster than 2**24

# A value is NaN or infinite iff (bits & mask) == mask, or == the bits given third.
_NOT_FINITE: dict[np.dtype[Any], tuple[type[np.unsignedinteger[Any]], int, int]] = {
    np.dtype(np.float64): (np.uint64, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    np.dtype(np.float32): (np.uint32, 0x7F80_0000, 0x7F80_0000),
    np.dtype(np.float16): (np.uint16, 0x7C00, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80, 0x7F80),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, 0x7C, 0x7C),
    # One NaN and no infinity (e4m3fn: one of each sign).
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F, 0x7F),
    np.dtype(ml_dtypes.float8_e8m0fnu): (np.uint8, 0xFF, 0xFF),
    np.dtype(ml_dtypes.float8_e4m3fnuz): (np.uint8, 0xFF, 0x80),
    np.dtype(ml_dtypes.float8_e5m2fnuz): (np.uint8, 0xFF, 0x80),
}


def _bits(value: float, dtype: Any, unsigned: type[Any]) -> int:
    return int(np.array(value, dtype).view(unsigned))


# The dtypes whose range goes beyond LARGEST: (bits as, all but the sign, LARGEST's bits).
_TOO_LARGE: dict[np.dtype[Any], tuple[type[np.unsignedinteger[Any]], int, int]] = {
    np.dtype(dtype): (unsigned, mask, _bits(LARGEST, dtype, unsigned))
    for dtype, unsigned, mask in (
        (np.float64, np.uint64, 2**63 - 1),
        (np.float32, np.uint32, 2**31 - 1),
        (ml_dtypes.bfloat16, np.uint16, 2**15 - 1),
    )
}


def check_values(array: np.ndarray, file: Path, name: str) -> bool:
    """Refuse NaN, infinity and magnitudes above LARGEST; whether every element is zero.

    Args:
        array: C-ordered, of any dtype of the format; integers and bools pass.
        file: where it lies, for the message.
        name: the tensor, for the message.

    Raises:
        UserError: it holds such values: how many, and where the first is.
    """
    if array.dtype in _TOO_LARGE:
        largest, limit = _largest_magnitude(array)
        if largest <= limit:
            return largest == 0
    count, first = count_not_finite(array)
    what = "NaN or infinite values"
    if not count and array.dtype in _TOO_LARGE:
        flat = np.abs(array.reshape(-1).astype(np.float64)) > LARGEST
        count, first = int(np.count_nonzero(flat)), int(flat.argmax())
        what = f"values above {LARGEST:.0e} in magnitude"
    if count:
        index = tuple(int(i) for i in np.unravel_index(first, array.shape))
        raise malformed(
            file,
            f"tensor {show(name)} has {count} {what} of {array.size}, the first at index {index}",
        )
    return not any(block.any() for block in _blocks(array.reshape(-1)))


def count_not_finite(array: np.ndarray) -> tuple[int, int]:
    """How many values are NaN or infinite, and the flat index of the first (-1: none).

    `array` is C-ordered; integers and bools have none. Needs memory for one block only.
    """
    if array.dtype.kind in "biu":
        return 0, -1
    unsigned, mask, marker = _NOT_FINITE[array.dtype]
    count, first = 0, -1
    for number, block in enumerate(_blocks(array.reshape(-1).view(unsigned))):
        found = (block & unsigned(mask)) == unsigned(marker)
        if found.any():
            first = number * _BLOCK + int(found.argmax()) if first < 0 else first
            count += int(np.count_nonzero(found))
    return count, first


def _largest_magnitude(array: np.ndarray) -> tuple[int, int]:
    """The largest bit pattern without its sign, and the largest allowed."""
    unsigned, mask, limit = _TOO_LARGE[array.dtype]
    blocks = _blocks(array.reshape(-1).view(unsigned))
    return max((int((block & unsigned(mask)).max()) for block in blocks), default=0), limit


def _blocks(flat: np.ndarray) -> list[np.ndarray]:
    return [flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK)]
