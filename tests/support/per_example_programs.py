"""Losses as programs, and a look at what is made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
from jax import lax

from clipax.per_example import _plans, _walk


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(4, 3, 16, seed=1) * jnp.asarray([0.3, 1.0, 2.0, 5.0]).reshape(4, 1, 1)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(-3, 14, (4, 3)), jnp.int32)
IMAGES = normal(4, 1, 5, 5, 8, seed=3)
CHAIN_BATCH = (normal(4, 3, 8, seed=5), jnp.asarray([0.999, 1.0, 1.001, 1.002]))


def dense(matrix: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return lambda w, x: zoo.mean_square(jnp.tanh(x @ matrix(w)))


def conv(w: jax.Array, x: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=numbers)
    return zoo.mean_square(jnp.tanh(y))


def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
    return zoo.mean_square(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])


class Seen(NamedTuple):
    plans: list[Any]
    recipes: list[Any]


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Records the plans that are made, with the equations that are read for them."""
    found = Seen([], [])
    plan, recipe = _plans.plan, _walk._recipe

    def plan_seen(*args: Any) -> Any:
        found.plans.append(plan(*args))
        return found.plans[-1]

    def recipe_seen(*args: Any) -> Any:
        found.recipes.append(args)
        return recipe(*args)

    monkeypatch.setattr(_plans, "plan", plan_seen)
    monkeypatch.setattr(_walk, "_recipe", recipe_seen)
    return found
