"""Parameters whose parts are used apart: layers of a stack in a loop, fused ones, raveled ones."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax.flatten_util import ravel_pytree
from per_example_programs import TOKENS, X, dense, normal

import clipax
from clipax.per_example import _boxes

TREE = {"b": jnp.zeros(12), "v": jnp.zeros((12, 8)), "w": jnp.zeros((16, 12))}
UNRAVEL = ravel_pytree(TREE)[1]


def layers(weights: Callable[[jax.Array], Any]) -> Callable[..., jax.Array]:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        for each in weights(w):
            x = jnp.tanh(x[:, : len(each)] @ each)
        return zoo.mean_square(x)

    return loss_fn


def attend(w: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ each for each in w)
    return zoo.mean_square(jax.nn.softmax(q @ k.T) @ v)


def raveled(w: jax.Array, x: jax.Array) -> jax.Array:
    tree = UNRAVEL(w)
    return zoo.mean_square(jnp.tanh(x @ tree["w"] + tree["b"][None]) @ tree["v"])


def embedded(w: jax.Array, tokens: jax.Array) -> jax.Array:
    return zoo.mean_square(jnp.tanh(w[0][tokens] @ w[1, :16] + w[2][tokens]))


def penalized(w: jax.Array, x: jax.Array) -> jax.Array:
    weights = list(w)
    return layers(lambda w: weights)(w, x) + 0.1 * sum(jnp.sum(each**2) for each in weights)


# The losses of one example, the shape of the parameter, the batch, and what is printed.
CASES: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], jax.Array, str]] = {
    "indexed": (layers(lambda w: [w[0], w[1], w[2]]), (3, 16, 16), X, "3 parts: 3 x 3"),
    "iterated": (layers(list), (3, 16, 16), X, "3 parts: 3 x 3"),
    "split": (layers(lambda w: jnp.split(w, 2)), (32, 16), X, "2 parts: 3 x 3"),
    "unstacked": (layers(jnp.unstack), (3, 16, 16), X, "3 parts: 3 x 3"),
    "unstacked on the last axis": (
        layers(lambda w: jnp.unstack(w, axis=2)),
        (16, 16, 2),
        X,
        "2 parts: 3 x 3",
    ),
    "fused": (attend, (3, 16, 12), X, "3 parts: 3 x 3"),
    "fused columns": (
        lambda w, x: attend(jnp.split(w, 3, 1), x),
        (16, 36),
        X,
        "3 parts: 3 x 3",
    ),
    "raveled": (
        raveled,
        (300,),
        X,
        "differs between parts 3 parts: comes from reduce_sum; 3 x 3",
    ),
    "reshaped before": (
        layers(lambda w: list(w.reshape(2, 16, 16))),
        (32, 16),
        X,
        "2 parts: 3 x 3",
    ),
    "heads": (
        lambda w, x: attend(jnp.moveaxis(w.reshape(16, 3, 12), 1, 0), x),
        (16, 36),
        X,
        " x ",
    ),
    "transposed and flipped": (
        layers(lambda w: [jnp.flip(w.T)[i] for i in (0, 2)]),
        (16, 16, 3),
        X,
        "2 parts: 3 x 3",
    ),
    "scaled before": (
        layers(lambda w: list(0.5 * w)),
        (2, 16, 16),
        X,
        "2 parts: 3 x 3",
    ),
    "blocks on a diagonal": (
        layers(lambda w: [w[:16, :16], w[16:, 16:]]),
        (32, 32),
        X,
        "2 parts: 3 x 3",
    ),
    "overlapping": (layers(lambda w: [w[:16], w[4:20]]), (24, 16), X, "a part: 6 x 6"),
    "a chain of overlaps": (
        layers(lambda w: [w[:16, :16], w[8:24, 8:24], w[16:, 16:]]),
        (32, 32),
        X,
        "9 x 9",
    ),
    "one used twice": (
        layers(lambda w: [w[1], w[0], w[1]]),
        (3, 16, 16),
        X,
        "2 parts: 3 x 3; 6 x 6",
    ),
    "one used twice, once transposed": (
        layers(lambda w: [w[1], w[0], w[1].T]),
        (3, 16, 16),
        X,
        "2 parts: 3 x 3; 6 x 6",
    ),
    "one used twice, once in another shape": (
        lambda w, x: layers(list)(w[:2], x) + dense(lambda w: w[0].reshape(16, 12))(w, x),
        (5, 12, 16),
        X,
        "differs between parts",
    ),
    "slices of slices": (
        layers(lambda w: [w[1:][0][4:, :16], w[1:][1][2:18, 1:17], w[0][:16, :16]]),
        (3, 20, 18),
        X,
        "3 parts: 3 x 3",
    ),
    "used whole and in part": (
        lambda w, x: layers(list)(w, x) + dense(lambda w: w.reshape(16, 32))(w, x),
        (2, 16, 16),
        X,
        "made for each example",
    ),
    "rows of whole and part": (
        lambda w, x: dense(lambda w: w[:, 4:])(w, x) + dense(lambda w: w)(w, x),
        (16, 24),
        X,
        "Gram matrices",
    ),
    "one that nobody knows": (
        layers(lambda w: [w[0], jnp.sort(w[1])]),
        (4, 16, 16),
        X,
        "differs between parts",
    ),
    "a long table": (
        lambda w, x: zoo.mean_square(jnp.tanh(x + w[:3])),
        (40, 16),
        X,
        "a part: comes from",
    ),
    "overlapping rows of a table": (
        lambda w, x: zoo.mean_square(jnp.tanh(x + w[:3]) * w[2:5] + w[30][None]),
        (40, 16),
        X,
        "2 parts: comes from",
    ),
    "biases": (
        lambda w, x: zoo.mean_square(jnp.tanh(x + w[0][None]) * w[1][None]),
        (2, 16),
        X,
        "comes from",
    ),
    "tables": (embedded, (3, 20, 16), TOKENS, "3 parts: 3 x 3"),
    "with a penalty": (penalized, (3, 16, 16), X, "3 parts: 3 x 3"),
    "a part with a penalty": (
        lambda w, x: penalized(w[1:], x),
        (4, 16, 16),
        X,
        "3 parts: 3 x 3",
    ),
    "a penalty of its own": (
        lambda w, x: layers(list)(w, x) + 0.1 * sum(jnp.sum(each**2) for each in w),
        (3, 16, 16),
        X,
        "(3, 16, 16)",
    ),
    "all with a penalty": (
        lambda w, x: layers(lambda w: [w[0], w[2]])(w, x) + 0.1 * jnp.sum(w**2),
        (4, 16, 16),
        X,
        "2 parts: 3 x 3",
    ),
    "recomputed": (
        lambda w, x: jax.checkpoint(layers(list))(w, x),
        (2, 16, 16),
        X,
        "2 parts: 3 x 3",
    ),
}
COMMON = {"indexed", "raveled", "overlapping", "one that nobody knows", "a part with a penalty"}
in_common_cases = pytest.mark.parametrize("name", sorted(COMMON))


def arguments(name: str) -> Any:
    """In double precision."""
    _, shape, batch, _ = CASES[name]
    is_float = jnp.issubdtype(batch.dtype, jnp.floating)
    batch = batch.astype(jnp.float64) if is_float else batch
    return 0.5 * normal(*shape).astype(jnp.float64), batch


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("name", trees.mostly_slow(CASES, COMMON))
def test_gradients_in_parts_equal_those_made_one_by_one(name: str) -> None:
    with trees.double_precision(True):
        oracle.assert_the_same(CASES[name][0], *arguments(name))


@pytest.mark.parametrize("name", trees.mostly_slow(CASES, {"indexed", "a part with a penalty"}))
def test_so_do_those_whose_factors_are_made_twice(name: str) -> None:
    with trees.double_precision(True):
        oracle.assert_the_same(CASES[name][0], *arguments(name), memory="twice")


@pytest.mark.slow_but(2)
@in_common_cases
def test_so_do_those_of_some_examples_after_others(name: str) -> None:
    with trees.double_precision(True):
        oracle.assert_the_same(CASES[name][0], *arguments(name), microbatch_size=2)


@pytest.mark.slow_but(2)
@in_common_cases
def test_so_does_that_of_one_example(name: str) -> None:
    with trees.double_precision(True):
        w, batch = arguments(name)
        oracle.assert_the_same(CASES[name][0], w, batch[1:2])


@pytest.mark.parametrize("name", CASES)
def test_the_way_of_parts_is_printed(name: str) -> None:
    loss_fn, shape, batch, wanted = CASES[name]
    assert wanted in zoo.explanation(loss_fn, jnp.zeros(shape), batch)


def test_gradients_of_users_are_added_up_from_parts() -> None:
    with trees.double_precision(True):
        loss_fn, (w, batch) = raveled, arguments("raveled")
        ids = jnp.asarray([0, 1, 1, 0])
        clip = clipax.clipped_grad(loss_fn, 0.1, mean=False, num_users=2, user_mean=False)
        grads, info = trees.quick_jit(clip)(w, batch, user_ids=ids)
        each = oracle.gradients(loss_fn, w, batch)
        of_users = np.stack([each[[0, 3]].sum(0), each[[1, 2]].sum(0)])
        norms = oracle.norms(of_users)
        zoo.assert_near(info.norms, norms, 1e-6)
        zoo.assert_near(grads, oracle.weighted_sum(of_users, oracle.hard(norms, 0.1)), 1e-6)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_part_that_is_not_finite_is_loud_or_skipped(bad: float) -> None:
    loss_fn, w = layers(lambda w: [w[0], w[2]]), normal(3, 16, 16) / 4
    batch = X.at[2].set(bad)
    _, info = trees.quick_jit(clipax.clipped_grad(loss_fn, 0.1))(w, batch)
    assert [*np.isfinite(info.norms)] == [True, True, False, True]
    skip = clipax.clipped_grad(loss_fn, 0.1, mean=False, skip_nonfinite=True)
    grads, _ = trees.quick_jit(skip)(w, batch)
    zoo.assert_near(grads, trees.quick_jit(skip)(w, X[np.array([0, 1, 3])])[0])


def test_no_layer_of_a_stack_is_made_for_each_example() -> None:
    w, batch = jnp.zeros((4, 64, 64)), jnp.zeros((16, 2, 64))
    compiled = jax.jit(clipax.clipped_grad(layers(list), 1.0)).lower(w, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < len(batch) * w[0].nbytes


SHAPES = [(24,), (4, 6), (6, 4), (2, 3, 4), (4, 1, 6), (1, 24), (2, 12, 1), (3, 2, 2, 2)]


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_is_found_again_in_another_shape(shape: tuple[int, ...]) -> None:
    array = np.arange(24).reshape(shape)
    slices = itertools.product(*(itertools.combinations(range(size + 1), 2) for size in shape))
    for ends, other in itertools.product(slices, SHAPES):
        entries = array[tuple(slice(*each) for each in ends)]
        starts, sizes = tuple(start for start, _ in ends), entries.shape
        found = _boxes.Box(starts, sizes, shape).reshaped(other)
        places = np.argwhere(np.isin(array, entries).reshape(other))
        bounds = np.ptp(places, 0) + 1
        assert (found is not None) == (np.prod(bounds) == entries.size)
        if found is not None:
            assert found.shape == other
            rows = zip(found.starts, found.limits, strict=True)
            again = array.reshape(other)[tuple(slice(*each) for each in rows)]
            np.testing.assert_array_equal(again, entries.reshape(found.sizes))
