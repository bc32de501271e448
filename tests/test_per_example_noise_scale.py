"""The noise scale of the gradient, against NumPy in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from per_example_cases import EXAMPLES, PAIRS, every_way, total

import clipax
from clipax.per_example import noise_scale


def wanted(each: Any, weights: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    """The scale, the trace of the covariance, and the squared norm without its bias."""
    rows = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(each)], axis=1)
    rows = (weights[:, None] * rows)[is_counted]
    variance = np.var(rows, axis=0, ddof=1).sum()
    square_norm = (rows.mean(0) ** 2).sum() - variance / len(rows)
    return np.array([variance / square_norm, variance, square_norm])


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("bound", [math.inf, 0.05])
def test_it_equals_numpy_with_a_mask(bound: float) -> None:
    loss_fn, params, batch = every_way()
    # Examples that agree well enough for a mean to be seen in eight of them.
    batch = jax.tree.map(
        lambda leaf: jnp.where(
            jnp.arange(leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1)) < 4, leaf, leaf[:1]
        ),
        batch,
    )
    mask = np.arange(EXAMPLES) != 2
    each = oracle.gradients(loss_fn, params, batch)

    @trees.quick_jit
    def run(params: Any, batch: Any) -> Any:
        return noise_scale(*clipax.clipped_grad(loss_fn, bound)(params, batch, mask=mask))

    expected = wanted(each, oracle.hard(oracle.norms(each), bound), mask)
    assert expected[0] > 0
    np.testing.assert_allclose(run(params, batch), expected, rtol=1e-4)


@pytest.mark.slow
def test_it_equals_numpy_in_float64_with_bounds_of_leaves_and_a_nan() -> None:
    with trees.double_precision(True):
        source = zoo.Source(3)
        params = {"a": jnp.zeros(4, jnp.float64), "b": jnp.zeros(4, jnp.float64)}
        batch = jax.tree.map(
            lambda leaf: jnp.asarray(1 + 0.1 * source.batch(4), jnp.float64), params
        )
        grad_fn = clipax.clipped_grad(
            lambda params, x: total(params["a"], x["a"]) + total(params["b"], x["b"]),
            {"a": 1.9, "b": math.inf},
            skip_nonfinite=True,
        )
        each = jax.tree.map(np.asarray, batch)
        clipped = each | {
            "a": each["a"] * oracle.hard(np.linalg.norm(each["a"], axis=1), 1.9)[:, None]
        }
        is_counted = np.arange(zoo.EXAMPLES) != 1
        found = noise_scale(*grad_fn(params, batch | {"b": batch["b"].at[1, 0].set(math.nan)}))
        expected = wanted(clipped, np.ones(zoo.EXAMPLES), is_counted)
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_its_parts_have_no_bias() -> None:
    # Gradients around (3, 4) with a standard deviation of 5 in each of the two entries.
    rng = np.random.default_rng(0)
    batches = jnp.asarray(rng.normal([3, 4], 5, size=(20_000, 4, 2)), jnp.float32)
    grad_fn = clipax.clipped_grad(total, math.inf)
    found = jax.jit(jax.vmap(lambda batch: noise_scale(*grad_fn(jnp.zeros(2), batch))))(batches)
    assert abs(np.mean(found.variance) / 50 - 1) < 0.02
    assert abs(np.mean(found.square_norm) / 25 - 1) < 0.02


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e25])
def test_norms_of_any_size_have_a_scale(size: float) -> None:
    batch = size * jnp.array([[3.0], [5.0]])
    found = noise_scale(*clipax.clipped_grad(total, math.inf)(jnp.zeros(1), batch))
    np.testing.assert_allclose(found.scale, 2 / 15, rtol=1e-5)


def test_equal_gradients_have_no_noise() -> None:
    found = noise_scale(*clipax.clipped_grad(total, math.inf)(jnp.zeros(2), jnp.ones((4, 2))))
    np.testing.assert_allclose(found, [0, 0, 2], atol=1e-6)


def test_a_mean_that_chance_explains_has_an_infinite_scale() -> None:
    batch = jnp.array([[1.0, 0.0], [-1.0, 0.5]])
    found = noise_scale(*clipax.clipped_grad(total, math.inf)(jnp.zeros(2), batch))
    assert found.square_norm < 0
    assert found.scale == math.inf


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_examples_show_no_noise(number: int) -> None:
    grad_fn = clipax.clipped_grad(total, math.inf)
    for batch, mask in ((PAIRS, np.arange(2) < number), (PAIRS[:number], np.ones(number, bool))):
        found = noise_scale(*grad_fn(jnp.zeros(2), batch, mask=mask))
        assert [float(part) for part in found] == [math.inf, 0, 0]


def test_it_needs_the_record_of_clipped_grad() -> None:
    with pytest.raises(ValueError, match=r"info must be the PerExampleInfo of .*, got \[1.0\]"):
        noise_scale(PAIRS[0], [1.0])  # type: ignore[arg-type]
