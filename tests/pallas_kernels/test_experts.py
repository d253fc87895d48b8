"""The expert mixture against a float64 loop over rows, and against `jax.lax.ragged_dot`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal, poison

from pallas_kernels import expert_mlp

IMPLEMENTATIONS = ("xla", "reference")
E, D, F, X = 7, 11, 5, 3
TOLERANCE = {"float32": "experts", "bfloat16": "experts_bfloat16"}


@dataclass(frozen=True)
class Mixture:
    """The arguments of `expert_mlp`."""

    x: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    exists: np.ndarray

    def experts(self, start: int, stop: int) -> Mixture:
        """The same on a device that has these experts only."""
        here = (self.ids >= start) & (self.ids < stop)
        gate, up, down = (w[start:stop] for w in (self.gate, self.up, self.down))
        ids = np.where(here, self.ids - start, stop - start).astype(np.int32)
        return replace(self, gate=gate, up=up, down=down, ids=ids)

    def rows(self, index) -> Mixture:
        return replace(
            self, x=self.x[index], ids=self.ids[index], weights=self.weights[index],
            exists=self.exists[index],
        )  # fmt: skip

    def run(self, implementation: str, dtype: str | None = None, **kwargs) -> np.ndarray:
        arrays = (self.x, self.gate, self.up, self.down, self.ids, self.weights, self.exists)
        y = expert_mlp(
            *(jnp.asarray(a) for a in arrays), implementation=implementation, dtype=dtype, **kwargs
        )
        assert y.dtype == (dtype or self.x.dtype)
        return np.asarray(y)

    def loop(self) -> np.ndarray:
        """Row by row, choice by choice, in float64."""
        y = np.zeros(self.x.shape)
        for t in np.flatnonzero(self.exists):
            x = self.x[t].astype(np.float64)
            for e, weight in zip(self.ids[t], self.weights[t].astype(np.float64), strict=True):
                gate, up, down = (w[e].astype(np.float64) for w in (self.gate, self.up, self.down))
                hidden = x @ gate
                y[t] += weight * ((hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down)
        return y


def mixture(rng: np.random.Generator, rows: int, dtype: str = "float32") -> Mixture:
    """Random weights, and distinct experts for every row."""
    return Mixture(
        x=normal(rng, (rows, D), dtype),
        gate=normal(rng, (E, D, F), dtype),
        up=normal(rng, (E, D, F), dtype),
        down=normal(rng, (E, F, D), dtype),
        ids=np.stack([rng.permutation(E)[:X] for _ in range(rows)]).astype(np.int32),
        weights=rng.random((rows, X), np.float32),
        exists=np.ones(rows, bool),
    )


def spoil(rng: np.random.Generator, m: Mixture, missing: np.ndarray) -> Mixture:
    """NaN and expert numbers that mean nothing in the rows that do not exist."""
    x, ids, weights = m.x.copy(), m.ids.copy(), m.weights.copy()
    x[missing] = poison(rng, x[missing].shape, x.dtype.name)
    ids[missing] = rng.choice(np.array([-1, 0, E, 999], np.int32), ids[missing].shape)
    weights[missing] = np.nan
    return replace(m, x=x, ids=ids, weights=weights, exists=~missing)


def test_more_pairs_than_integers_can_number_are_refused():
    """Expert and pair are sorted as one integer of 31 bits."""

    def trace(rows):
        spec = jax.ShapeDtypeStruct
        stacks = (spec((256, 3, 2), "float32"), spec((256, 3, 2), "float32"))
        chosen = (spec((rows, 8), "int32"), spec((rows, 8), "float32"), spec((rows,), "bool"))
        down = spec((256, 2, 3), "float32")
        return jax.eval_shape(expert_mlp, spec((rows, 3), "float32"), *stacks, down, *chosen)

    assert trace(1 << 19).shape == (1 << 19, 3)
    with pytest.raises(ValueError, match="4194312 places of 257 keys do not fit 31 bits"):
        trace((1 << 19) + 1)


def test_experts_nobody_chose_are_not_read(rng):
    """Their weights may hold NaN. (The reference multiplies every expert's output by a zero.)"""
    m = mixture(rng, 129)
    m = replace(m, ids=np.where(np.isin(m.ids, (0, 4)), E - 1, m.ids).astype(np.int32))
    gate = m.gate.copy()
    gate[[0, 4]] = np.nan
    assert_close(replace(m, gate=gate).run("xla"), m.loop(), "experts")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 129])
def test_a_choice_that_is_not_here_reads_no_expert(rng, rows, exact):
    """Neither a row that has none here, nor one with a neighbour in its block."""
    m = mixture(rng, rows)
    away = replace(m, ids=np.full_like(m.ids, E))
    assert (replace(away, gate=away.gate * np.nan).run("xla", exact=exact) == 0).all()
    # Products of the huge rows are infinite, wherever a block of their neighbour's covers them.
    huge = np.arange(rows) % 2 == 1
    x, ids = m.x.copy(), m.ids.copy()
    x[huge], ids[huge] = 3e38, E
    mixed = replace(m, x=x, ids=ids).run("xla", exact=exact)
    assert (mixed[huge] == 0).all()
    assert_same_bits(mixed[~huge], m.run("xla", exact=exact)[~huge])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "train"])
class TestParts:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("rows", [1, 2, 17, 129])
    def test_parts_of_the_experts_sum_to_the_whole(self, rng, implementation, rows, dtype):
        m = mixture(rng, rows, dtype)
        missing = rng.permutation(rows) < rows / 3 if rows > 1 else np.zeros(rows, bool)
        m = replace(m, exists=~missing)
        cuts = ((0, 3), (3, 4), (4, E))
        parts = [m.experts(*cut).run(implementation, "float32") for cut in cuts]
        assert_close(sum(parts), m.loop(), TOLERANCE[dtype])

    @pytest.mark.parametrize("rows", [1, 17])
    def test_nobody_is_here(self, rng, implementation, rows):
        m = mixture(rng, rows)
        m = replace(m, ids=np.full_like(m.ids, E))
        assert (m.run(implementation) == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestExperts:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("rows", [1, 2, 3, 17, 36, 70, 129, 300])
    def test_r108_every_row_count_is_the_loop(self, rng, implementation, rows, dtype):
        """Block sizes 1 to 64; once with all rows, once with a third of them missing."""
        m = mixture(rng, rows, dtype)
        assert_close(m.run(implementation), m.loop(), TOLERANCE[dtype])
        missing = rng.permutation(rows) < rows / 3
        m = spoil(rng, m, missing)
        y = m.run(implementation)
        assert (y[missing] == 0).all()
        assert_close(y, m.loop(), TOLERANCE[dtype])

    @pytest.mark.parametrize("first", [0, E - X])
    def test_all_rows_choose_the_same_experts(self, rng, implementation, first):
        """One block after another of few experts, none of the others."""
        m = mixture(rng, 129)
        m = replace(m, ids=np.tile(first + np.arange(X, dtype=np.int32), (129, 1)))
        assert_close(m.run(implementation), m.loop(), "experts")

    @pytest.mark.parametrize("expert", [0, 3, E - 1])
    def test_all_rows_choose_one_expert(self, rng, implementation, expert):
        m = mixture(rng, 129)
        m = replace(m, ids=np.full((129, 1), expert, np.int32), weights=m.weights[:, :1])
        assert_close(m.run(implementation), m.loop(), "experts")

    def test_an_expert_chosen_twice_counts_twice(self, rng, implementation):
        m = mixture(rng, 17)
        ids = m.ids.copy()
        ids[::2, 1] = ids[::2, 0]
        m = replace(m, ids=ids)
        assert_close(m.run(implementation), m.loop(), "experts")

    def test_no_row_exists(self, rng, implementation):
        m = spoil(rng, mixture(rng, 17), np.ones(17, bool))
        assert (m.run(implementation) == 0).all()

    def test_r022_the_order_of_rows_does_not_matter(self, rng, implementation):
        missing = rng.permutation(129) < 40
        m = spoil(rng, mixture(rng, 129), missing)
        y = m.run(implementation)
        for order in (np.arange(129)[::-1], rng.permutation(129)):
            assert_same_bits(m.rows(order).run(implementation), y[order])

    def test_equal_rows_give_equal_results(self, rng, implementation):
        m = mixture(rng, 129)
        copies = m.rows(np.arange(129) % 5)
        y = copies.run(implementation)
        assert_same_bits(y, y[np.arange(129) % 5])

    def test_r102_neighbours_do_not_matter(self, rng, implementation):
        """Others with NaN, other choices, or missing: the same bits."""
        m = mixture(rng, 129)
        y = m.run(implementation)
        mine = rng.permutation(129) < 9
        sick = m.x.copy()
        sick[~mine] = np.nan
        assert_same_bits(replace(m, x=sick).run(implementation)[mine], y[mine])
        ids = np.where(mine[:, None], m.ids, (m.ids + 2) % E)
        assert_same_bits(replace(m, ids=ids).run(implementation)[mine], y[mine])
        assert_same_bits(spoil(rng, m, ~mine).run(implementation)[mine], y[mine])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_agrees_with_ragged_dot(self, rng, implementation, dtype):
        m = mixture(rng, 129, dtype)
        order = np.argsort(m.ids, axis=None, kind="stable")
        sizes = jnp.asarray(np.bincount(m.ids.ravel(), minlength=E), jnp.int32)

        def product(x, w):
            return jax.lax.ragged_dot(
                jnp.asarray(x), jnp.asarray(w), sizes, precision="highest",
                preferred_element_type=jnp.float32,
            )  # fmt: skip

        x = m.x[order // X]
        hidden = jax.nn.silu(product(x, m.gate)) * product(x, m.up)
        y = np.empty((129 * X, D), np.float32)
        y[order] = product(hidden.astype(x.dtype), m.down)
        want = (y.reshape(129, X, D) * m.weights[..., None]).sum(axis=1)
        assert_close(m.run(implementation), want, TOLERANCE[dtype])

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"gate": (E, F, D)}, "gate"),
            ({"up": (E, D, F + 1)}, "up"),
            ({"down": (E, D, F)}, "down"),
            ({"weights": (17, X + 1)}, "weights"),
            ({"ids": (16, X), "weights": (16, X)}, "ids"),
            ({"exists": (16,)}, "exists"),
        ],
    )
    def test_r039_wrong_shapes_are_refused(self, implementation, changed, said):
        shapes = {
            "x": (17, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D),
            "ids": (17, X), "weights": (17, X), "exists": (17,), **changed,
        }  # fmt: skip
        with pytest.raises(ValueError, match=said):
            expert_mlp(*(jnp.zeros(s) for s in shapes.values()), implementation=implementation)
