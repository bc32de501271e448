"""Each row of the table of edge cases of `clipped_grad`, with norms of any size."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from per_example_cases import (
    COEFFICIENTS,
    EXAMPLES,
    PAIRS,
    clip,
    every_way,
    in_both_ways,
    total,
    with_example,
)

import clipax


def test_two_examples_are_clipped_as_by_hand() -> None:
    grads, info = clipax.clipped_grad(total, 1.0, mean=False)(jnp.zeros(2), PAIRS)
    zoo.assert_near(grads, np.array([0.6, 1.3]))
    zoo.assert_near(info.norms, np.array([5.0, 0.5]))
    zoo.assert_near(info.coefficients, np.array([0.2, 1.0]))
    zoo.assert_near(info.losses, np.zeros(2))
    assert info.clip_fraction == 0.5
    assert info.max_norm == 1.0
    assert info.is_counted.tolist() == [True, True]
    assert info.aux is None


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("bound", [1e6, math.inf])
@in_both_ways
def test_examples_under_the_bound_are_not_changed(bound: float, memory: str) -> None:
    loss_fn, params, batch = every_way()
    grads, info = clip(memory=memory)(params, batch, max_norm=bound)
    assert info.coefficients.tolist() == [1.0] * EXAMPLES
    assert info.clip_fraction == 0
    assert info.max_norm == bound
    zoo.assert_near(
        grads,
        oracle.weighted_sum(
            oracle.gradients(loss_fn, params, batch), np.full(EXAMPLES, 1 / EXAMPLES)
        ),
    )


@pytest.mark.slow_but(5)
@pytest.mark.parametrize("name", COEFFICIENTS)
@in_both_ways
def test_every_coefficient_weights_the_gradients(name: str, memory: str) -> None:
    loss_fn, params, batch = every_way()
    each = oracle.gradients(loss_fn, params, batch)
    norms = oracle.norms(each)
    bound = float(np.median(norms))
    weights = COEFFICIENTS[name][1](norms, bound)
    grads, info = clip(name, memory=memory)(params, batch, max_norm=bound)
    zoo.assert_near(info.coefficients, weights)
    zoo.assert_near(grads, oracle.weighted_sum(each, weights / EXAMPLES))


@pytest.mark.slow_but(9)
@pytest.mark.parametrize("name", COEFFICIENTS)
@in_both_ways
def test_zero_gradients_stay_zero(name: str, memory: str) -> None:
    _, params, batch = every_way()
    silent = batch | {"size": jnp.zeros(EXAMPLES)}
    grads, info = clip(name, memory=memory)(params, silent, max_norm=0.1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not np.any(info.norms)
    assert np.all(np.isfinite(info.coefficients))


@pytest.mark.parametrize("name", sorted(set(COEFFICIENTS) - {"unclipped", "of one's own"}))
@in_both_ways
def test_a_bound_of_zero_gives_zeros(name: str, memory: str) -> None:
    _, params, batch = every_way()
    grads, info = clip(name, memory=memory)(params, batch, max_norm=0.0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not np.any(info.coefficients)
    assert info.clip_fraction == 1


BAD = {
    "a NaN in the loss": {"size": math.nan},
    "an infinite loss": {"size": -math.inf},
    "a NaN in what goes in": {"x": math.nan},
    "inf in what goes in": {"x": math.inf},
}


@pytest.mark.parametrize("bad", BAD)
@in_both_ways
def test_nan_and_inf_make_the_gradients_nan(bad: str, memory: str) -> None:
    grads, info = clip(memory=memory)(every_way()[1], with_example(3, **BAD[bad]))
    is_finite = np.isfinite(info.norms)
    assert not is_finite[3]
    assert is_finite.sum() == EXAMPLES - 1
    assert np.all(info.is_counted)
    assert np.any(np.isnan(grads["gram"]))


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("bad", BAD)
@in_both_ways
def test_skipped_examples_count_as_if_they_were_not_there(bad: str, memory: str) -> None:
    _, params, batch = every_way()
    skipped, info = clip(skip_nonfinite=True, memory=memory)(params, with_example(3, **BAD[bad]))
    is_counted = np.arange(EXAMPLES) != 3
    masked, of_masked = clip(memory=memory)(params, batch, mask=is_counted)
    # The others have the same entries, bit for bit, as beside an example that is masked out.
    trees.assert_bitwise(skipped, masked)
    assert info.is_counted.tolist() == is_counted.tolist()
    assert info.coefficients.tolist() == of_masked.coefficients.tolist()
    assert info.norms[is_counted].tolist() == of_masked.norms[is_counted].tolist()
    assert info.clip_fraction == of_masked.clip_fraction
    assert not np.isfinite(info.norms[3])


def test_an_infinite_gradient_of_a_finite_loss_is_skipped() -> None:
    def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sqrt(w * x)) + jnp.sum(w)

    batch = jnp.array([[1.0, 4.0], [1.0, 1.0]])
    params = jnp.array([0.0, 1.0])
    grads, info = clipax.clipped_grad(loss_fn, 1.0, skip_nonfinite=True)(params, batch)
    assert np.all(np.isfinite(info.losses))
    assert info.is_counted.tolist() == [False, False]
    assert grads.tolist() == [0.0, 0.0]


def test_an_example_is_skipped_if_one_part_is_not_finite() -> None:
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    batch = {"a": PAIRS, "b": PAIRS.at[0, 0].set(math.nan)}
    grad_fn = clipax.clipped_grad(
        lambda params, x: total(params["a"], x["a"]) + total(params["b"], x["b"]),
        {"a": 1.0, "b": 1.0},
        skip_nonfinite=True,
    )
    grads, info = grad_fn(params, batch)
    assert info.is_counted.tolist() == [False, True]
    assert jax.tree.map(lambda leaf: leaf.tolist(), grads) == {"a": [0, 0.5], "b": [0, 0.5]}


@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf])
@in_both_ways
def test_masked_examples_count_as_if_they_were_not_there(padding: float, memory: str) -> None:
    _, params, batch = every_way()
    is_kept = np.arange(EXAMPLES) < 5
    there = jax.tree.map(lambda leaf: leaf[:5], batch)
    padded = batch | {key: np.array(batch[key]) for key in ("x", "size")}
    for key in ("x", "size"):
        padded[key][5:] = padding
    grads, info = clip(memory=memory)(params, padded, mask=is_kept)
    wanted, of_wanted = clip(memory=memory)(params, there)
    zoo.assert_near(grads, wanted)
    zoo.assert_near(info.norms[:5], of_wanted.norms)
    assert info.coefficients[5:].tolist() == [0, 0, 0]
    zoo.assert_near(info.clip_fraction, of_wanted.clip_fraction)
    assert info.is_counted.tolist() == is_kept.tolist()


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("options", [{}, {"mean": False}, {"skip_nonfinite": True}])
@in_both_ways
def test_the_sum_of_no_examples_is_zero(options: Any, memory: str) -> None:
    _, params, batch = every_way()
    grads, info = clip(**options, memory=memory)(params, batch, mask=np.zeros(EXAMPLES, bool))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert info.clip_fraction == 0
    assert np.all(np.isfinite(info.norms))


def test_float64_is_measured_in_float64() -> None:
    with trees.double_precision(True):
        wide, narrow = jnp.zeros(2, jnp.float64), jnp.zeros(2, jnp.float32)
        batch = jnp.array([[1.0, 1e-9], [1.0, 0.0]], jnp.float64)
        grads, info = clipax.clipped_grad(total, 1.0)(wide, batch)
        assert info.norms.dtype == grads.dtype == jnp.float64
        grads, info = clipax.clipped_grad(total, 1.0)(narrow, batch.astype(jnp.float32))
        assert info.norms.dtype == grads.dtype == jnp.float32


def product(w: jax.Array, example: Any) -> jax.Array:
    """Its gradient is the outer product of two vectors, or a sum of a few."""
    x, y = example
    return jnp.vdot(x @ w, y)


@functools.cache
def normalize_products(memory: Any) -> Any:
    rule = clipax.coefficients.normalized
    return trees.quick_jit(clipax.clipped_grad(product, 1.0, coefficient=rule, memory=memory))


@pytest.mark.slow_but(20)
@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("size", [1e25, 1e12, 1.0, 1e-12, 1e-25])
@pytest.mark.parametrize("left", [1.0, 1e6, 1e-6])
@in_both_ways
def test_norms_of_any_size_are_right(
    size: float, left: float, rows: tuple[int, ...], memory: str
) -> None:
    rng = np.random.default_rng(0)
    x = (left * rng.normal(size=(3, *rows, 32))).astype(np.float32)
    y = (size / left * rng.normal(size=(3, *rows, 32))).astype(np.float32)
    axes = "btx,bty->bxy" if rows else "bx,by->bxy"
    each = np.einsum(axes, x.astype(np.float64), y.astype(np.float64))
    grads, info = normalize_products(memory)(jnp.zeros((32, 32)), (x, y))
    norms = oracle.norms(each)
    zoo.assert_near(info.norms / size, norms / size)
    zoo.assert_near(grads, oracle.weighted_sum(each, 1 / norms / 3))
