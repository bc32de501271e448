"""Losses drawn at random, clipped in double precision as `vmap` and `grad` differentiate them."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import one_by_one
import per_example_exact as exact
import pytest
import random_losses
import trees

EXAMPLES, PROGRAMS, BLOCK = 3, 2000, 50


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with trees.double_precision(True):
        yield


def check(seed: int) -> None:
    """One loss in one kind of memory, with one bound or with one for each leaf."""
    drawn = random_losses.loss(seed)
    memories = [exact.BOTH[seed // 2 % 2]]
    clip = functools.partial(exact.clip, drawn.loss_fn, is_tree=seed % 2 > 0, memories=memories)
    try:
        arrays = random_losses.params(seed), random_losses.batch(seed, EXAMPLES)
        exact.assert_exact(one_by_one.run(clip, *arrays))
    except Exception as error:
        error.add_note("\n".join([f"The loss of seed {seed} is a sum of", *drawn.terms]))
        raise


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("seed", range(8))
def test_random_losses_are_clipped_as_they_are_differentiated(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, PROGRAMS, BLOCK))
def test_many_random_losses_are_clipped_as_they_are_differentiated(first: int) -> None:
    for seed in range(first, first + BLOCK):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, PROGRAMS, 200))
def test_random_losses_are_clipped_in_a_compiled_loop_over_steps(seed: int) -> None:
    loss_fn = random_losses.loss(seed).loss_fn

    @trees.quick_jit
    def run(params: Any, batches: Any) -> Any:
        def step(params: Any, batch: Any) -> Any:
            found = exact.clip(loss_fn, params, batch)
            return jax.tree.map(lambda w, g: w - 0.01 * g, params, found.clipped["kept"][0]), found

        return jax.lax.scan(step, params, batches)[1]

    batches = [random_losses.batch(seed + step, EXAMPLES) for step in range(2)]
    stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *batches)
    exact.assert_all_exact(run(random_losses.params(seed), stacked), 2)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [1, 1000])
@pytest.mark.parametrize("seed", range(1, PROGRAMS, 200))
def test_random_losses_are_clipped_in_batches_of_every_size(seed: int, examples: int) -> None:
    clip = functools.partial(exact.clip, random_losses.loss(seed).loss_fn)
    arrays = random_losses.params(seed), random_losses.batch(seed, examples)
    exact.assert_exact(trees.quick_jit(clip)(*arrays))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, PROGRAMS, 200))
def test_random_losses_are_clipped_in_an_ensemble(seed: int) -> None:
    clip = functools.partial(exact.clip, random_losses.loss(seed).loss_fn)
    members = [random_losses.params(seed + member) for member in range(2)]
    stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *members)
    run = trees.quick_jit(jax.vmap(clip, (0, None)))
    exact.assert_all_exact(run(stacked, random_losses.batch(seed, EXAMPLES)), 2)
