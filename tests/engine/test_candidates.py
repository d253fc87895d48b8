"""Candidates found by halving, against candidates found by sorting, in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bailing_jax.engine.candidates import candidates

CANDIDATES = jax.jit(candidates)
VOCAB = 157_184  # the family's own


def by_sorting(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """bool [vocab], by definition: one row, its tokens in order, one cut after the other."""
    order = np.argsort(-scaled, kind="stable")
    order = order[np.isfinite(scaled[order])]
    if top_k > 0:
        order = order[:top_k]
    weight = np.exp(scaled[order].astype(np.float64))
    share = weight / weight.sum()
    before = np.concatenate([[0.0], np.cumsum(share)[:-1]])
    keeps = weight >= min_p
    if top_p < 1:
        keeps &= before < top_p
    found = np.zeros(scaled.shape, bool)
    found[order[keeps]] = True
    return found


def found(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The same of the function tested, for one row."""
    knobs = np.int32([top_k]), np.float32([top_p]), np.float32([min_p])
    return np.asarray(CANDIDATES(scaled[None], *knobs))[0]


def made(rng: np.random.Generator, vocab: int, scale: float, ties: bool) -> np.ndarray:
    """float32 [vocab], the best 0; with `ties`, of a few values only, as bfloat16 logits are."""
    logits = scale * rng.standard_normal(vocab).astype(np.float32)
    if ties:
        logits = (np.round(logits * 4) / 4).astype(np.float32)
    return logits - logits.max()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.01, 30),
    ties=st.booleans(),
    excluded=st.integers(0, 30),
    top_k=st.integers(-1, 45),
)
def test_top_k_is_the_start_of_the_order(
    seed: int, scale: float, ties: bool, excluded: int, top_k: int
) -> None:
    rng = np.random.default_rng(seed)
    scaled = made(rng, 41, scale, ties)
    others = np.flatnonzero(scaled < 0)
    scaled[rng.permutation(others)[:excluded]] = -np.inf
    np.testing.assert_array_equal(found(scaled, top_k, 1.0, 0.0), by_sorting(scaled, top_k, 1, 0))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(50, 1.0, 0.0), (0, 0.9, 0.0), (1000, 0.95, 0.0), (0, 1.0, 0.05), (VOCAB - 1, 0.5, 0.01)],
)
def test_a_whole_vocabulary(
    rng: np.random.Generator, top_k: int, top_p: float, min_p: float, ties: bool
) -> None:
    """Only tokens whose share decides within float32's rounding of a sum may fall otherwise."""
    scaled = made(rng, VOCAB, 3.0, ties)
    got = found(scaled, top_k, top_p, min_p)
    for nudge in (-1e-5, 1e-5):
        near = min(top_p + nudge, 1.0) if top_p < 1 else 1.0
        want = by_sorting(scaled, top_k, near, min_p)
        assert (got >= want).all() if nudge < 0 else (got <= want).all()
    assert 0 < got.sum() < VOCAB


def test_nothing_is_cut_where_nothing_is_asked(rng: np.random.Generator) -> None:
    """A top-p of 1 keeps tokens too unlikely to change a sum."""
    scaled = made(rng, 1000, 1.0, False)
    scaled[7], scaled[8] = -80.0, -np.inf
    np.testing.assert_array_equal(found(scaled, 0, 1.0, 0.0), np.arange(1000) != 8)


def test_rows_are_searched_apart(rng: np.random.Generator) -> None:
    """Rows that need another number of rounds, among them rows of NaN that nobody reads."""
    rows = np.stack([made(rng, 500, 2.0, bool(i % 2)) for i in range(9)])
    top_k = np.int32([0, 3, 7, 499, 1, 0, 20, 0, 5])
    top_p = np.float32([1, 1, 0.5, 0.9, 0.2, 0.7, 1, 0.01, 0.999])
    min_p = np.float32([0, 0.1, 0, 0, 1, 0, 0.02, 0, 0])
    alone = [
        found(row, int(k), float(p), float(m))
        for row, k, p, m in zip(rows, top_k, top_p, min_p, strict=True)
    ]
    rows[5] = np.nan
    got = np.asarray(CANDIDATES(rows, top_k, top_p, min_p))
    for i in (0, 1, 2, 3, 4, 6, 7, 8):
        np.testing.assert_array_equal(got[i], alone[i])
