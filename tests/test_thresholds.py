"""Thresholds: fixed, scheduled, relative to parameters, and rules lifted over many norms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import clipax

NORMS = {"a": jnp.float32(3), "b": {"c": jnp.float32(4), "d": jnp.array([[1.0], [2.0]])}}
BAD = [-1.0, -1, float("nan"), True, None, "1", np.float32(-1), np.nan, 1j, [1.0, None], object()]


@pytest.mark.parametrize(
    "bound",
    [2.0, 2, np.float32(2), np.array(2.0), jnp.array(2.0), jnp.array(2), lambda count: 2.0],
)
def test_every_form_of_a_bound_reaches_every_norm(bound: Any) -> None:
    threshold = clipax.thresholds.fixed(bound)
    bounds, _ = threshold.update(NORMS, threshold.init(NORMS))
    trees.assert_close(bounds, jax.tree.map(lambda norm: np.full(norm.shape, 2.0), NORMS))
    trees.assert_same_type(bounds, NORMS)


def test_a_prefix_of_bounds_with_a_schedule_in_it() -> None:
    threshold = clipax.thresholds.fixed({"a": 1.0, "b": lambda count: 10 + count})
    state = threshold.init(NORMS)
    for step in range(3):
        bounds, state = jax.jit(threshold.update)(NORMS, state)
        assert float(bounds["a"]) == 1
        assert float(bounds["b"]["c"]) == 10 + step
    assert (int(state.step_count), state.step_count.dtype) == (3, jnp.int32)


def test_a_bound_for_each_layer_of_a_stack() -> None:
    threshold = clipax.thresholds.fixed({"a": 1.0, "b": {"c": 1.0, "d": np.array([[1.0], [2.0]])}})
    bounds, _ = threshold.update(NORMS, threshold.init(NORMS))
    trees.assert_close(bounds["b"]["d"], np.array([[1.0], [2.0]]))


def test_a_schedule_may_be_a_pytree() -> None:
    schedule = jax.tree_util.Partial(lambda slope, count: slope * count, 2)
    threshold = clipax.thresholds.fixed(schedule)
    bounds, state = threshold.update(NORMS, threshold.init(NORMS))
    bounds, _ = threshold.update(NORMS, state)
    assert float(bounds["a"]) == 2


def test_a_traced_negative_bound_counts_as_zero() -> None:
    bounds = jax.jit(
        lambda bound: clipax.thresholds.fixed(bound).update(NORMS, optax.EmptyState())[0]
    )(-1.0)
    assert float(bounds["a"]) == 0


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_bound_is_named_at_once(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"max_norm.* must be a number >= 0, got"):
        clipax.thresholds.fixed(bad)
    with pytest.raises(ValueError, match=r"max_norm\['a'\].* must be a number >= 0"):
        clipax.thresholds.fixed({"a": bad})


@pytest.mark.parametrize("bad", [{"x": 1.0}, {"a": 1.0}, [1.0], {"a": {"b": 1.0}, "b": 1.0}])
def test_a_prefix_that_does_not_fit_is_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be one value or a tree prefix"):
        clipax.thresholds.fixed(bad).init(NORMS)


def test_a_bound_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"max_norm of shape \(3,\) does not fit"):
        clipax.thresholds.fixed(np.ones(3)).init(NORMS)


def test_relative_to_params() -> None:
    threshold = clipax.thresholds.relative_to_params(
        {"a": 0.5, "b": lambda count: (1 + count).astype(jnp.float32) / 10}, eps=2.0
    )
    params = {"a": jnp.float32(8), "b": {"c": jnp.float32(0), "d": jnp.array([[1.0], [5.0]])}}
    _, state = threshold.update(NORMS, threshold.init(NORMS), params)
    bounds, _ = threshold.update(NORMS, state, params)
    expected = {"a": 4.0, "b": {"c": 0.4, "d": np.array([[0.4], [1.0]])}}
    trees.assert_close(bounds, jax.tree.map(np.float32, expected))


@pytest.mark.parametrize("bad", [0.0, *BAD])
def test_a_bad_ratio_is_named(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"ratio.* must be a number > 0"):
        clipax.thresholds.relative_to_params(bad)


def test_params_are_asked_for() -> None:
    threshold = clipax.thresholds.relative_to_params(0.1)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        threshold.update(NORMS, threshold.init(NORMS))


def ema_oracle(norms: list[float], decay: float = 0.9) -> list[float]:
    """Bias-corrected mean of the finite norms, times 1.5; the last one stands at a bad norm."""
    average, count, bounds, last = 0.0, 0, [], 0.0
    for norm in norms:
        if np.isfinite(norm):
            average, count = decay * average + (1 - decay) * norm, count + 1
            last = 1.5 * average / (1 - decay**count)
        bounds.append(last)
    return bounds


def test_a_rule_from_optax_has_a_history_for_each_norm() -> None:
    threshold = clipax.thresholds.per_norm(optax.chain(optax.ema(0.9), optax.scale(1.5)))
    rng = np.random.default_rng(0)
    a, c = rng.lognormal(size=(2, 20)).astype(np.float32)
    d = rng.lognormal(size=(20, 2)).astype(np.float32)
    a[3], c[7], d[5, 1] = np.nan, np.inf, np.nan
    state, seen, last = threshold.init(NORMS), [], None
    for step in range(20):
        norms = {"a": a[step], "b": {"c": c[step], "d": d[step][:, None]}}
        norms = jax.tree.map(jnp.asarray, norms)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes its counter
            last, state = threshold.update(norms, state, max_norm=last or norms)
        seen.append(last)
    np.testing.assert_allclose([x["a"] for x in seen], ema_oracle(a), rtol=1e-5)
    np.testing.assert_allclose([x["b"]["c"] for x in seen], ema_oracle(c), rtol=1e-5)
    for row in range(2):
        expected = ema_oracle(d[:, row])
        np.testing.assert_allclose([x["b"]["d"][row, 0] for x in seen], expected, rtol=1e-5)


def test_a_rule_sees_the_norm_of_its_own_parameters() -> None:
    rule = optax.stateless(lambda norm, param_norm: norm + 10 * param_norm)
    threshold = clipax.thresholds.per_norm(rule)
    params = jax.tree.map(lambda norm: 2 * norm, NORMS)
    bounds, _ = threshold.update(NORMS, threshold.init(NORMS), params)
    trees.assert_close(bounds, jax.tree.map(lambda norm: 21 * norm, NORMS))
