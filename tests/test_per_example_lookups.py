"""Rows of tables: at several indices, in several tables, in succession."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from per_example_programs import normal

import clipax

RNG = np.random.default_rng(11)
PAIRS = jnp.asarray(RNG.integers(-4, 9, (4, 5, 2)), jnp.int32)
"""Some are repeated, some are outside all rows, some count from the end."""
STARTS = jnp.asarray([[0, 3], [2, 2], [19, 4], [-3, 30]], jnp.int32)


def size(y: jax.Array) -> jax.Array:
    return zoo.mean_square(jnp.tanh(y) + jnp.cumsum(y, 0))


def with_mode(mode: str) -> Callable[..., jax.Array]:
    return lambda w, p: size(w.at[p[:, 0], p[:, 1]].get(mode=mode, fill_value=0.5))


def in_steps(w: jax.Array, p: jax.Array) -> jax.Array:
    def step(x: jax.Array, pair: jax.Array) -> Any:
        return jnp.tanh(x + w[pair[:1], pair[1:]][0]), None

    return zoo.mean_square(lax.scan(step, jnp.ones(4), p)[0])


def one_entry_in_steps(w: jax.Array, p: jax.Array) -> jax.Array:
    def step(x: jax.Array, pair: jax.Array) -> Any:
        return jnp.tanh(x + w[pair[0], pair[1]]), None

    return lax.scan(step, jnp.ones((), w.dtype), p)[0] ** 2


def stretches_in_steps(w: jax.Array, starts: jax.Array) -> jax.Array:
    def step(x: jax.Array, start: jax.Array) -> Any:
        return jnp.tanh(x + lax.dynamic_slice_in_dim(w, start, 3)), None

    return zoo.mean_square(lax.scan(step, jnp.ones((3, 4)), starts)[0])


# The losses of one example, the shape of the parameter, the batch, and what is printed.
CASES: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], jax.Array, str]] = {
    "two indices": (lambda w, p: size(w[p[:, 0], p[:, 1]]), (6, 7, 4), PAIRS, "5 x 5"),
    "two indices, clipped": (with_mode("clip"), (6, 7, 4), PAIRS, "5 x 5"),
    "two indices, filled": (with_mode("fill"), (6, 7, 4), abs(PAIRS), "5 x 5"),
    "two indices apart": (
        lambda w, p: size(w[p[:, 0], :, p[:, 1]]),
        (6, 4, 7),
        PAIRS,
        "5 x 5",
    ),
    "one entry each": (lambda w, p: size(w[p[:, 0], p[:, 1]]), (9, 12), PAIRS, "5 x 5"),
    "a range and an index": (
        lambda w, p: size(w[jnp.arange(5), p[:, 0]]),
        (5, 9, 4),
        PAIRS,
        "5 x 5",
    ),
    "narrow integers": (
        lambda w, p: size(w[p[:, 0], p[:, 1]]),
        (9, 200, 4),
        abs(PAIRS).astype(jnp.uint8),
        "5 x 5",
    ),
    "mapped indices": (
        lambda w, p: size(jax.vmap(lambda i: jnp.take(w, i, axis=0))(p[:, 0])),
        (9, 8),
        PAIRS,
        "5 x 5",
    ),
    "mapped tables": (
        lambda w, p: size(jax.vmap(lambda w, i: w[i])(w, p[:, 0])),
        (5, 9, 4),
        PAIRS,
        "norms of two vectors",
    ),
    "mapped tables, two rows of each": (
        lambda w, p: size(jax.vmap(lambda w, i: w[i])(w, p)),
        (5, 9, 4),
        PAIRS,
        "2 x 2",
    ),
    "entries along an axis": (
        lambda w, p: size(jnp.take_along_axis(w, p, 1, mode="clip")),
        (5, 30),
        PAIRS,
        "2 x 2",
    ),
    "columns": (lambda w, p: size(w[:, p[:, 0]]), (8, 12), PAIRS, "5 x 5"),
    "tables in a stack": (
        lambda w, p: size(w[0][p[:, 0]] * w[2][p[:, 1]]),
        (3, 12, 8),
        PAIRS,
        "2 parts: 5 x 5",
    ),
    "rows of parts that overlap": (
        lambda w, p: size(w[:8][p[:, 0] % 8] * w[4:][p[:, 1] % 6]),
        (16, 8),
        PAIRS,
        "made for each example",
    ),
    "in steps": (in_steps, (6, 7, 4), PAIRS, "5 x 5"),
    "rows in succession": (
        lambda w, starts: size(lax.dynamic_slice_in_dim(w, starts[0], 3)),
        (20, 4),
        STARTS,
        "norms of two vectors",
    ),
    "columns in succession": (
        lambda w, starts: size(lax.dynamic_slice_in_dim(w, starts[0], 3, 1)),
        (4, 20),
        STARTS,
        "norms of two vectors",
    ),
    "rows in succession twice": (
        lambda w, starts: (
            size(lax.dynamic_slice_in_dim(w, starts[0], 3))
            + size(lax.dynamic_slice_in_dim(w, starts[1], 3))
        ),
        (40, 4),
        STARTS,
        "6 x 6",
    ),
    "rows in succession in steps": (stretches_in_steps, (40, 4), STARTS, "6 x 6"),
    "rows in succession of a part": (
        lambda w, starts: size(lax.dynamic_slice_in_dim(w[3:], starts[0], 3) * w[1][None]),
        (20, 4),
        STARTS,
        "differs between parts",
    ),
    "a penalty beside": (
        lambda w, p: size(w[p[:, 0], p[:, 1]]) + 0.1 * jnp.sum(w**2),
        (6, 7, 4),
        PAIRS,
        "5 x 5",
    ),
    "one row at two places": (
        lambda w, p: size(w[p[0, 0], p[0, 1]][None]),
        (6, 7, 4),
        PAIRS,
        "norms of two vectors",
    ),
    "one entry": (lambda w, p: jnp.tanh(w[p[0, 0], p[1, 1]]), (6, 7), PAIRS, "two vectors"),
    "one entry of a cube": (
        lambda w, p: jnp.tanh(w[p[0, 0], p[1, 0], p[2, 0]]) ** 2,
        (6, 9, 7),
        PAIRS,
        "norms of two vectors",
    ),
    "two entries": (
        lambda w, p: jnp.tanh(w[p[0, 0], p[0, 1]] * w[p[1, 0], p[1, 1]]),
        (16, 17),
        PAIRS,
        "2 x 2",
    ),
    "one entry in each step": (one_entry_in_steps, (31, 30), PAIRS, "5 x 5"),
    "a block": (
        lambda w, starts: size(lax.dynamic_slice(w, (starts[0], starts[1]), (3, 2))),
        (20, 8),
        STARTS,
        "norms of two vectors",
    ),
}
COMMON = {
    "two indices",
    "one row at two places",
    "mapped tables, two rows of each",
    "rows in succession",
}


def arguments(name: str) -> Any:
    """In double precision."""
    return normal(*CASES[name][1]).astype(jnp.float64), CASES[name][2]


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("name", trees.mostly_slow(CASES, COMMON))
def test_gradients_of_tables_equal_those_made_one_by_one(name: str) -> None:
    with trees.double_precision(True):
        oracle.assert_the_same(CASES[name][0], *arguments(name))


@pytest.mark.parametrize("name", trees.mostly_slow(CASES, {"two indices"}))
def test_so_do_those_whose_factors_are_made_twice(name: str) -> None:
    with trees.double_precision(True):
        oracle.assert_the_same(CASES[name][0], *arguments(name), memory="twice")


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("name", sorted(COMMON))
def test_so_do_those_of_some_examples_after_others(name: str) -> None:
    with trees.double_precision(True):
        table, batch = arguments(name)
        oracle.assert_the_same(CASES[name][0], table, batch[1:], microbatch_size=1)


@pytest.mark.parametrize("name", CASES)
def test_the_way_of_tables_is_printed(name: str) -> None:
    loss_fn, shape, batch, wanted = CASES[name]
    assert wanted in zoo.explanation(loss_fn, jnp.zeros(shape), batch)


@pytest.mark.parametrize("name", ["two indices", "one row at two places"])
def test_no_table_with_two_indices_is_made_for_each_example(name: str) -> None:
    table = jnp.zeros((50, 40, 8))
    compiled = jax.jit(clipax.clipped_grad(CASES[name][0], 1.0))
    size_of_temporaries = compiled.lower(table, PAIRS).compile().memory_analysis()
    assert size_of_temporaries.temp_size_in_bytes < 3 * table.nbytes
