"""Losses and batches for what `clipped_grad` promises."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import per_example_zoo as zoo
import pytest
import trees

import clipax

EXAMPLES = 8
COEFFICIENTS: dict[str, tuple[Any, Callable[..., np.ndarray]]] = {
    "hard": (clipax.coefficients.hard, lambda n, c: np.minimum(1, c / n)),
    "unclipped": (clipax.coefficients.unclipped, lambda n, c: np.ones_like(n)),
    "rational": (clipax.coefficients.rational, lambda n, c: 1 / (1 + n / c)),
    "square_root": (clipax.coefficients.square_root, lambda n, c: 1 / np.sqrt(1 + (n / c) ** 2)),
    "tanh": (clipax.coefficients.tanh, lambda n, c: np.tanh(n / c) / (n / c)),
    "normalized": (clipax.coefficients.normalized, lambda n, c: c / n),
    "auto_s": (clipax.coefficients.auto_s(0.5), lambda n, c: c / (n + 0.5)),
    "psac": (clipax.coefficients.psac(0.2), lambda n, c: c / (n + 0.2 / (n + 0.2))),
    "of one's own": (lambda n, c: jnp.where(n > c, 0.0, 2.0), lambda n, c: 2.0 * (n <= c)),
}


def total(w: jax.Array, x: jax.Array) -> jax.Array:
    """Its gradient is the example."""
    return jnp.sum(w * x)


in_both_ways = pytest.mark.parametrize("memory", ["kept", "twice"])
PAIRS = jnp.array([[3.0, 4.0], [0.0, 0.5]])


@functools.cache
def every_way() -> tuple[Callable[..., jax.Array], Any, Any]:
    """Leaves of every way to a norm; the last part of an example is the size of its loss."""
    source = zoo.Source(7)
    params = {
        "each": source.weight(16),
        "gram": source.weight(16, 16),
        "outer": source.weight(16, 4),
        "table": source.weight(20, 16),
        "unused": source.weight(3),
    }
    rng = np.random.default_rng(3)
    batch = {
        "x": jnp.asarray(rng.normal(size=(EXAMPLES, 2, 16)), jnp.float32),
        "tokens": jnp.asarray(rng.integers(0, 20, (EXAMPLES, 2)), jnp.int32),
        "size": jnp.asarray(rng.lognormal(1.0, 1.0, EXAMPLES), jnp.float32),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = example["x"] + params["table"][example["tokens"]]
        x = jnp.tanh(x @ params["gram"] + params["each"][None])
        return example["size"] * zoo.mean_square(x.sum(0) @ params["outer"])

    return loss_fn, params, batch


@functools.cache
def clip(coefficient: str = "hard", **options: Any) -> Any:
    """Of every way, compiled; the bound is 0.1 or given at the call."""
    rule = COEFFICIENTS[coefficient][0]
    return trees.quick_jit(clipax.clipped_grad(every_way()[0], 0.1, coefficient=rule, **options))


def with_example(index: int, **values: Any) -> Any:
    batch = every_way()[2]
    return batch | {key: batch[key].at[index].set(value) for key, value in values.items()}
