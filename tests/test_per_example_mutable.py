"""Losses that use mutable arrays."""

import functools
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
from per_example_programs import CHAIN_BATCH, normal

import clipax


def new_ref(value: jax.Array) -> Any:
    made: Callable[[jax.Array], Any] = jax.new_ref
    return made(value)


def accumulated(params: Any, x: jax.Array) -> jax.Array:
    total = new_ref(jnp.zeros(8))
    for row in x:
        total[...] = total[...] + jnp.tanh(row @ params["w"] + params["b"])
    return zoo.mean_square(total[...])


def accumulated_in_a_scan(params: Any, x: jax.Array) -> jax.Array:
    total = new_ref(jnp.zeros(8))

    def step(carry: Any, row: jax.Array) -> Any:
        total[...] = total[...] + jnp.tanh(row @ params["w"] + params["b"])
        return carry, None

    lax.scan(step, None, x)
    return zoo.mean_square(total[...])


def inside_of_a_call(params: Any, x: jax.Array) -> jax.Array:
    @jax.jit
    def project(w: jax.Array, x: jax.Array) -> jax.Array:
        made = new_ref(jnp.zeros((3, 8)))
        for index in range(3):
            made[index] = jnp.sin(x[index] @ w)
        return made[...]

    return zoo.mean_square(project(params["w"], x) + params["b"][None])


def made_of_parameters(params: Any, x: jax.Array) -> jax.Array:
    w = new_ref(params["w"])
    w[0] = 2 * x[0] * params["b"]
    return zoo.mean_square(jnp.tanh(x @ w[...])) + jnp.sum(params["w"] ** 2)


def counted(params: Any, x: jax.Array) -> jax.Array:
    seen = new_ref(jnp.zeros(()))

    def step(index: Any, carry: Any) -> Any:
        seen[...] = seen[...] + lax.stop_gradient(jnp.sum(x))
        return carry

    lax.fori_loop(0, 3, step, 0)
    return seen[...] * zoo.mean_square(x @ params["w"] + params["b"][None])


MUTABLE = [
    accumulated_in_a_scan,
    made_of_parameters,
    pytest.param(accumulated, marks=pytest.mark.slow),
    pytest.param(inside_of_a_call, marks=pytest.mark.slow),
    pytest.param(counted, marks=pytest.mark.slow),
]
needs_refs = pytest.mark.skipif(
    not hasattr(jax, "new_ref"), reason="this version of JAX has no mutable arrays"
)


@needs_refs
@pytest.mark.parametrize("loss_fn", MUTABLE)
def test_a_loss_can_write_to_arrays_of_its_own(loss_fn: Any) -> None:
    params = {"w": normal(8, 8) / 2, "b": normal(8, seed=1), "unused": normal(3)}
    oracle.assert_clipped(loss_fn, params, CHAIN_BATCH[0])


@needs_refs
def test_a_loss_can_return_what_it_wrote() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> Any:
        written = new_ref(jnp.zeros(()))
        written[...] = jnp.sum(x)
        return jnp.sum(w * x), {"written": written[...], "constant": 3}

    _, info = clipax.clipped_grad(loss_fn, 1.0, has_aux=True)(jnp.ones((3, 8)), CHAIN_BATCH[0])
    zoo.assert_near(info.aux["written"], np.sum(CHAIN_BATCH[0], (1, 2)))
    assert info.aux["constant"].tolist() == [3] * 4


@needs_refs
def test_a_loss_can_read_an_array_that_is_written_elsewhere() -> None:
    read = new_ref(2 * jnp.ones(8))

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return zoo.mean_square(jnp.tanh((x * read[...][None]) @ w))

    def without_reading(w: jax.Array, x: jax.Array) -> jax.Array:
        return zoo.mean_square(jnp.tanh(2 * x @ w))

    w, x = normal(8, 8), CHAIN_BATCH[0]
    wanted = oracle.clipped_leaf_by_leaf(without_reading, w, x)
    found = trees.quick_jit(functools.partial(oracle.clip_leaf_by_leaf, loss_fn))(w, x)
    zoo.assert_near(found, wanted)


@needs_refs
@pytest.mark.parametrize("is_jitted", [False, True])
def test_a_loss_that_writes_to_an_array_of_all_examples_is_refused(is_jitted: bool) -> None:
    written = new_ref(jnp.zeros(8))

    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        written[...] = x[0]
        return zoo.mean_square(x @ w)

    for function in (clipax.clipped_grad(loss_fn, 1.0), clipax.per_example_norms(loss_fn)):
        run = jax.jit(function) if is_jitted else function
        with pytest.raises(ValueError, match=r"loss_fn must use mutable arrays .* jax.new_ref"):
            run(normal(8, 8), CHAIN_BATCH[0])
