"""Placing a checkpoint tensor in a parameter, and taking it out again, whole or slab by slab.

That every source of every model is placed once and only once is in test_params.py.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bailing_jax.params import Source
from convert import mapping
from convert.mapping import copy, in_order, place, slab_rows, unplace

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

# [out, in] of the checkpoint is [in, out] of the model.
LINEAR = Source("w", (3, 5), (3, 5), (1, 0))
# One expert of four.
EXPERT = Source("w", (3, 5), (3, 5), (1, 0), index=2)
# kv_b_proj: 2 heads of 3 key and 4 value channels, rank 5.
KEY = Source("w", (14, 5), (2, 7, 5), (0, 1, 2), take=(1, 0, 3))
VALUE = Source("w", (14, 5), (2, 7, 5), (0, 2, 1), take=(1, 3, 7))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape)


def test_a_linear_weight_is_transposed() -> None:
    out = np.full((5, 3), -1)
    place(LINEAR, numbered((3, 5)), out)
    np.testing.assert_array_equal(out, numbered((3, 5)).T)


def test_an_expert_goes_to_its_own_place_and_no_other() -> None:
    out = np.full((4, 5, 3), -1)
    place(EXPERT, numbered((3, 5)), out)
    np.testing.assert_array_equal(out[2], numbered((3, 5)).T)
    assert (out[[0, 1, 3]] == -1).all()


def test_halves_of_kv_b_proj_are_cut_head_by_head() -> None:
    tensor = numbered((14, 5))
    key, value = np.full((2, 3, 5), -1), np.full((2, 5, 4), -1)
    place(KEY, tensor, key)
    place(VALUE, tensor, value)
    # Rows of the checkpoint: 3 keys then 4 values of head 0, then the same of head 1.
    np.testing.assert_array_equal(key, [tensor[0:3], tensor[7:10]])
    np.testing.assert_array_equal(value, [tensor[3:7].T, tensor[10:14].T])


def test_unplacing_one_half_leaves_the_other() -> None:
    out = np.full((14, 5), -1)
    unplace(KEY, numbered((2, 3, 5)), out)
    rows = [0, 1, 2, 7, 8, 9]
    np.testing.assert_array_equal(out[rows], numbered((6, 5)))
    assert (np.delete(out, rows, axis=0) == -1).all()
    unplace(VALUE, numbered((2, 5, 4)), out)
    np.testing.assert_array_equal(out[10:14], numbered((2, 5, 4))[1].T)
    np.testing.assert_array_equal(out[rows], numbered((6, 5)))


def test_unplacing_takes_the_index_of_its_own_expert() -> None:
    out = np.full((3, 5), -1)
    unplace(EXPERT, numbered((4, 5, 3)), out)
    np.testing.assert_array_equal(out, numbered((4, 5, 3))[2].T)


def test_neither_changes_what_it_reads() -> None:
    tensor, parameter = numbered((14, 5)), numbered((2, 5, 4))
    place(VALUE, tensor, np.empty((2, 5, 4), np.int64))
    unplace(VALUE, parameter, np.empty((14, 5), np.int64))
    np.testing.assert_array_equal(tensor, numbered((14, 5)))
    np.testing.assert_array_equal(parameter, numbered((2, 5, 4)))


def test_three_axes_come_back_in_order() -> None:
    """An order that is not its own inverse."""
    source = Source("w", (24,), (2, 3, 4), (2, 0, 1))
    parameter, back = np.full((4, 2, 3), -1), np.full(24, -1)
    place(source, numbered((24,)), parameter)
    assert parameter[3, 1, 2] == 23
    assert parameter[1, 0, 2] == 9
    unplace(source, parameter, back)
    np.testing.assert_array_equal(back, numbered((24,)))


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (np.float32, ml_dtypes.bfloat16),
        (np.float16, ml_dtypes.bfloat16),
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
    ],
)
def test_placing_rounds_to_nearest_even_once(
    stored: type, held: type, rng: np.random.Generator
) -> None:
    tensor = rng.standard_normal((3, 5)).astype(stored)
    # Between 1 and 1 + 2^-7 in bfloat16: ties go to the even neighbour, the rest to the nearer.
    tensor[0, :4] = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-10, 2**-14]).astype(stored)
    out = np.zeros((5, 3), held)
    place(LINEAR, tensor, out)
    # By way of float64, which holds every value of all three exactly.
    np.testing.assert_array_equal(out.T, tensor.astype(np.float64).astype(np.float32).astype(held))
    if held is ml_dtypes.bfloat16:
        assert out[:3, 0].astype(np.float64).tolist() == [1, 1 + 2**-6, 1 + 2**-7]


# ---- the view everything rests on


@pytest.mark.parametrize("source", [LINEAR, EXPERT, KEY, VALUE])
def test_in_order_is_a_view_in_the_parameters_order(source: Source) -> None:
    tensor = numbered(source.shape)
    part = in_order(source, tensor)
    out = np.full((4, *part.shape) if source.index is not None else part.shape, -1)
    place(source, tensor, out)
    np.testing.assert_array_equal(part, out if source.index is None else out[source.index])
    assert np.shares_memory(part, tensor)
    # Written through, it fills the part it was read from, and no other.
    part[...] = -1
    taken = numbered(source.shape)[tensor == -1]
    assert sorted(taken) == sorted(out[out != -1]) != []


def test_in_order_of_a_vector_is_the_vector() -> None:
    source = Source("w", (5,), (5,), (0,))
    np.testing.assert_array_equal(in_order(source, numbered((5,))), np.arange(5))


# ---- slabs

SHAPES = st.lists(st.integers(1, 700), min_size=1, max_size=3).map(tuple)


@EXAMPLES
@given(
    shape=SHAPES,
    itemsize=st.sampled_from([1, 2, 4, 8]),
    slab=st.sampled_from([64, 1000, 2**16, 2**20]),
)
def test_slabs_cover_every_row_once_and_are_as_large_as_they_may(
    shape: tuple[int, ...], itemsize: int, slab: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "SLAB_BYTES", slab)
        slices = list(slab_rows(shape, itemsize))
    rows = [row for part in slices for row in range(part.start, part.stop)]
    assert rows == list(range(shape[0]))
    row = itemsize * math.prod(shape[1:])
    sizes = [(part.stop - part.start) for part in slices]
    assert max(sizes) == 1 or max(sizes) * row <= slab
    assert len(set(sizes[:-1])) <= 1
    if len(sizes) > 1:
        # Whole tiles, if one fits in; else another row would be too much.
        assert sizes[0] % mapping._TILE == 0 or (sizes[0] + 1) * row > slab
        assert (sizes[0] + mapping._TILE) * row > slab


def test_nothing_has_no_slabs() -> None:
    assert list(slab_rows((0, 3), 4)) == []
    assert list(slab_rows((3, 0), 4)) == [slice(0, 3)]


@EXAMPLES
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    source=st.sampled_from(["linear", "key", "value"]),
    slab=st.sampled_from([8, 100, 999, 4096]),
)
def test_slab_by_slab_a_tensor_goes_and_returns(
    shape: tuple[int, int], source: str, slab: int
) -> None:
    """As the converter does it, there and back; with all else in its place."""
    n, r = shape
    of = {
        "linear": Source("w", shape, shape, (1, 0)),
        "key": Source("w", (5 * n, r), (n, 5, r), (0, 1, 2), take=(1, 0, 2)),
        "value": Source("w", (5 * n, r), (n, 5, r), (0, 2, 1), take=(1, 2, 5)),
    }[source]
    tensor = numbered(of.shape).astype(np.uint32)
    wanted = np.ascontiguousarray(in_order(of, tensor))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "SLAB_BYTES", slab)
        parts = []
        back = np.full_like(tensor, 2**32 - 1)
        for rows in slab_rows(wanted.shape, 4):
            part = np.empty(wanted[rows].shape, np.uint32)
            copy(in_order(of, tensor)[rows], part)
            parts.append(part)
            copy(part, in_order(of, back)[rows])
    assert b"".join(part.tobytes() for part in parts) == wanted.tobytes()
    np.testing.assert_array_equal(in_order(of, back), wanted)
    assert np.count_nonzero(back != 2**32 - 1) == wanted.size


# ---- copies by tiles

DTYPES = [np.dtype(name) for name in ("u1", "f2", "f4", "f8")] + [np.dtype(ml_dtypes.bfloat16)]
# Below, at, and above one and two tiles, in every combination.
LENGTHS = [1, 2, 37, *(n * mapping._TILE + d for n in (1, 2) for d in (-1, 0, 1, 67))]


def laid(shape: tuple[int, int], dtype: np.dtype[Any], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """An array of `shape` laid out as `kind` says, of one repeated byte, and all of its memory."""
    rows, columns = shape
    if kind == "rows":
        memory = np.full((rows, columns, dtype.itemsize), 0xA5, np.uint8)
        return memory.view(dtype)[..., 0], memory
    if kind == "columns":
        memory = np.full((columns, rows, dtype.itemsize), 0xA5, np.uint8)
        return memory.view(dtype)[..., 0].T, memory
    # A slab of a larger array, as `in_order` of a part is: gaps between rows, or columns.
    memory = np.full((rows + 5, columns + 7, dtype.itemsize), 0xA5, np.uint8)
    if kind == "slab of rows":
        return memory.view(dtype)[3 : 3 + rows, 2 : 2 + columns, 0], memory
    memory = np.full((columns + 5, rows + 7, dtype.itemsize), 0xA5, np.uint8)
    return memory.view(dtype)[3 : 3 + columns, 2 : 2 + rows, 0].T, memory


KINDS = ["rows", "columns", "slab of rows", "slab of columns"]


@settings(EXAMPLES, max_examples=150)
@given(
    shape=st.tuples(st.sampled_from(LENGTHS), st.sampled_from(LENGTHS)),
    dtype=st.sampled_from(DTYPES),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
)
def test_copies_equal_numpys_in_every_direction(
    shape: tuple[int, int], dtype: np.dtype[Any], kinds: tuple[str, str]
) -> None:
    """Every bit, NaN payloads too; and nothing beside the array is touched."""
    values, _ = laid(shape, dtype, kinds[0])
    out, memory = laid(shape, dtype, kinds[1])
    bits = np.dtype(f"u{dtype.itemsize}")
    # A step that is odd: as many different values as the dtype has.
    wanted = (np.arange(math.prod(shape), dtype=np.uint64) * 0x9E3779B97F4A7C15).astype(bits)
    values.view(bits)[...] = wanted.reshape(shape)
    copy(values, out)
    np.testing.assert_array_equal(out.view(bits), wanted.reshape(shape))
    out.view(bits)[...] = np.frombuffer(b"\xa5" * dtype.itemsize, bits)[0]
    assert (memory == 0xA5).all()
    np.testing.assert_array_equal(values.view(bits), wanted.reshape(shape))


@pytest.mark.parametrize("held", [np.float32, ml_dtypes.bfloat16])
def test_copies_convert_where_dtypes_differ(held: type, rng: np.random.Generator) -> None:
    values = rng.standard_normal((300, 270)).astype(np.float16)
    out = np.zeros((270, 300), held)
    copy(values, out.T)
    np.testing.assert_array_equal(out, values.T.astype(held))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_three_axes_are_copied_in_any_order(order: tuple[int, int, int]) -> None:
    values = numbered((3, 5, 300)).transpose(order)
    out = np.full(values.shape, -1)
    copy(values, out)
    np.testing.assert_array_equal(out, values)
