"""What the operators compile to: precision of products, loops, and who touches the pool."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pallas_kernels import (
    expert_mlp,
    latent_attention,
    lightning_decode,
    lightning_prefill,
    paged_attention,
)

pytestmark = pytest.mark.compiles

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
STATEFUL = pytest.mark.parametrize("name", ["prefill", "decode", "paged", "latent"])
T, P, CHUNK, WIDTH = 23, 6, 4, 9
# Nothing is allocated: large enough that a copy of the pool outweighs the rest.
SLOTS, PAGES = 10_007, 20_011


@dataclass(frozen=True)
class Program:
    """A function of (pool or weights, what says where, rows), all given by shape."""

    run: Callable
    pool: jax.ShapeDtypeStruct
    where: tuple[jax.ShapeDtypeStruct, ...]
    rows: tuple[jax.ShapeDtypeStruct, ...]

    def jaxpr(self) -> Jaxpr:
        return jax.make_jaxpr(self.run)(self.pool, self.where, self.rows).jaxpr


def program(name: str, implementation: str, dtype: str) -> Program:
    """An operator with everything of that dtype."""

    def spec(*shape: int, kind: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return spec(*shape, kind="int32")

    chosen = {"implementation": implementation}

    def prefill(state, where, rows):
        slots, cu_seqlens, is_fresh = where
        return lightning_prefill(
            *rows, state, slots=slots, cu_seqlens=cu_seqlens, is_fresh=is_fresh,
            scale=0.5, chunk_size=CHUNK, **chosen,
        )  # fmt: skip

    def decode(state, where, rows):
        return lightning_decode(*rows, state, slots=where[0], scale=0.5, **chosen)

    def paged(pages, where, rows):
        names = dict(zip(("page_table", "context_lengths", "cu_seqlens"), where, strict=True))
        return paged_attention(*rows, pages, **names, scale=0.5, **chosen)

    def latent(pages, where, rows):
        names = dict(zip(("page_table", "context_lengths", "cu_seqlens"), where, strict=True))
        return latent_attention(*rows, pages, **names, value_dim=7, scale=0.5, **chosen)

    def experts(gate, where, rows):
        ids, exists = where
        x, up, down, weights = rows
        return expert_mlp(x, gate, up, down, ids, weights, exists, **chosen)

    decays = spec(5, kind="float32")
    tables = (ints(P, WIDTH), ints(P), ints(P + 1))
    return {
        "prefill": Program(
            prefill, spec(SLOTS, 5, 3, 7), (ints(P), ints(P + 1), spec(P, kind="bool")),
            (spec(T, 5, 3), spec(T, 5, 3), spec(T, 5, 7), decays),
        ),
        "decode": Program(
            decode, spec(SLOTS, 5, 3, 7), (ints(P),),
            (spec(P, 5, 3), spec(P, 5, 3), spec(P, 5, 7), decays),
        ),
        "paged": Program(
            paged, spec(PAGES, 4, 42), tables,
            (spec(T, 6, 7), spec(T, 3, 7), spec(T, 3, 7)),
        ),
        "latent": Program(
            latent, spec(PAGES, 4, 12), tables, (spec(T, 5, 12), spec(T, 12)),
        ),
        "experts": Program(
            experts, spec(7, 11, 5), (ints(T, 3), spec(T, kind="bool")),
            (spec(T, 11), spec(7, 11, 5), spec(7, 5, 11), spec(T, 3, kind="float32")),
        ),
    }[name]  # fmt: skip


def inner(equation) -> list[Jaxpr]:
    """The programs inside an equation: a jit's, a loop's body."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found


def equations(jaxpr: Jaxpr) -> Iterator:
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for sub in inner(equation):
            yield from equations(sub)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("name", ["prefill", "decode", "paged", "latent", "experts"])
def test_r006_precision_is_set_on_every_product(name, implementation, dtype):
    """Results in float32, and float32 operands in full: never what a global default says."""
    with jax.default_matmul_precision("bfloat16"):
        found = list(equations(program(name, implementation, dtype).jaxpr()))
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert products
    for product in products:
        assert product.params["preferred_element_type"] == jnp.float32
        if any(x.aval.dtype == jnp.float32 for x in product.invars):
            assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


@DTYPES
def test_lightning_prefill_loops_over_chunks(dtype):
    """One loop, as long as there are chunks; nothing loops over tokens."""
    loops = {"scan", "while"}
    found = list(equations(program("prefill", "xla", dtype).jaxpr()))
    lengths = [e.params.get("length") for e in found if e.primitive.name in loops]
    # In it the state goes through the chunks that are taken together: on a CPU that is one.
    assert lengths == [None, 1]
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert any(CHUNK in e.outvars[0].aval.shape for e in products)


def pool_accesses(jaxpr: Jaxpr, pools: set, known: set) -> Iterator[tuple[str, bool]]:
    """Primitives that read or write the pool, and whether what was given says where.

    `pools` are the variables that hold the pool, `known` those computed from the arguments that
    name slots or pages.
    """
    pools, known = set(pools), set(known)
    for e in jaxpr.eqns:
        taken = [not isinstance(x, Literal) and x in known for x in e.invars]
        holds = [not isinstance(x, Literal) and x in pools for x in e.invars]
        if any(taken):
            known.update(e.outvars)
        if not any(holds):
            continue
        if e.primitive.name == "jit":
            (sub,) = inner(e)
            yield from pool_accesses(
                sub, set(compress(sub.invars, holds)), set(compress(sub.invars, taken))
            )
        else:
            yield e.primitive.name, any(k for k, h in zip(taken, holds, strict=True) if not h)
        shape = e.invars[holds.index(True)].aval.shape
        pools.update(x for x in e.outvars if x.aval.shape == shape)


@pytest.mark.parametrize("name", ["prefill", "decode"])
@DTYPES
def test_r035_slots_come_from_the_caller(name, dtype):
    """The pool of states is read once and written once, both where `slots` says.

    No slot number stands in the program, slot 0's included, and nothing walks over the pool.
    """
    p = program(name, "xla", dtype)
    jaxpr = p.jaxpr()
    pool, slots = jaxpr.invars[0], jaxpr.invars[1]
    assert list(pool_accesses(jaxpr, {pool}, {slots})) == [("gather", True), ("scatter", True)]


@functools.cache
def memory(name: str, implementation: str, dtype: str):
    p = program(name, implementation, dtype)
    compiled = jax.jit(p.run, donate_argnums=0).lower(p.pool, p.where, p.rows).compile()
    return compiled.memory_analysis(), p.pool.size * p.pool.dtype.itemsize


@STATEFUL
@IMPLEMENTATIONS
@DTYPES
def test_a_donated_pool_is_updated_in_place(name, implementation, dtype):
    analysis, size = memory(name, implementation, dtype)
    assert analysis.alias_size_in_bytes >= size


@STATEFUL
def test_a_pool_is_not_copied(name):
    """Temporary memory is for the call's rows, whatever the pool holds.

    For float32: on a CPU, jaxlib 0.10 updates a bfloat16 pool by way of a float32 copy.
    """
    analysis, size = memory(name, "xla", "float32")
    assert analysis.temp_size_in_bytes < size / 2
