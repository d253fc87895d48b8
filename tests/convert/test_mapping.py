"""Placing a checkpoint tensor in a parameter, and taking it out again.

That every source of every model is placed once and only once is in test_params.py.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bailing_jax.params import Source
from convert.mapping import place, unplace

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
