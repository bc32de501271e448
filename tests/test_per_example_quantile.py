"""The bound of `track_quantile` follows a quantile of the norms."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from per_example_cases import PAIRS, total

import clipax


def test_the_bound_moves_as_by_hand() -> None:
    info = clipax.clipped_grad(total, 1.0)(jnp.zeros(2), PAIRS)[1]
    options = {"quantile": 0.9, "learning_rate": 0.5}
    # A half of them are at or under a bound of one, and of one half too.
    for bound in (1.0, 0.5):
        moved = clipax.track_quantile(jnp.asarray(bound), info, **options)
        zoo.assert_near(moved, np.asarray(bound * math.exp(0.5 * 0.4)))
    moved = clipax.track_quantile(jnp.asarray(5.0, jnp.bfloat16), info, **options)
    assert moved.dtype == jnp.bfloat16
    zoo.assert_near(moved, np.asarray(5 * math.exp(-0.05)), tolerance=1 / 256)


@pytest.mark.parametrize("bound", [0.5, {"a": 0.5, "b": 2.0}])
def test_the_bound_does_not_move_without_examples(bound: Any) -> None:
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    bound = jax.tree.map(jnp.asarray, bound)
    grad_fn = clipax.clipped_grad(lambda p, x: total(p["a"], x) + total(p["b"], x), bound)
    _, info = grad_fn(params, PAIRS, mask=jnp.zeros(2, bool))
    trees.assert_bitwise(clipax.track_quantile(bound, info), bound)


@functools.cache
def follow() -> Any:
    """A hundred steps with one bound and with a bound for each of two leaves."""

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return total(params["a"], x) + total(params["b"], 100 * x)

    def run(start: Any, quantile: Any) -> Any:
        def step(bound: Any, key: jax.Array) -> Any:
            batch = jnp.exp(jax.random.normal(key, (64, 1)))
            _, info = grad_fn(params, batch, max_norm=bound)
            return clipax.track_quantile(bound, info, quantile=quantile), info.clip_fraction

        grad_fn = clipax.clipped_grad(loss_fn, 1.0)
        params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        return lax.scan(step, start, jax.random.split(jax.random.key(1), 100))

    return jax.jit(run)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_bound_reaches_the_quantile(quantile: float) -> None:
    one, of_one = follow()(20.0, quantile)
    each, of_each = follow()({"a": 0.2, "b": 20.0}, quantile)
    for fractions in (of_one, of_each["a"], of_each["b"]):
        assert abs(np.mean(fractions[50:]) - (1 - quantile)) < 0.05
    # The leaf that is a hundred times as large has a bound a hundred times as large.
    assert each["b"] / each["a"] == pytest.approx(100, rel=0.05)
    assert one == pytest.approx(math.hypot(each["a"], each["b"]), rel=0.05)
