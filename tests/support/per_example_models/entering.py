"""How a model is entered, of what arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LENGTH, WIDTH, CLASSES, TOKENS = 4, 4, 3, 7


class Model(NamedTuple):
    """A loss of one example."""

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Callable[[int], Any]
    """Makes so many examples."""


MODELS: dict[str, Callable[[], Model]] = {}


def model(build: Callable[["Source"], Any]) -> Callable[["Source"], Any]:
    """Enters a function that makes a loss, parameters, and a function that makes examples."""
    MODELS[build.__name__] = lambda: Model(*build(Source(len(build.__name__))))
    return build


class Source:
    """Random arrays in double precision, the same at every run."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def weight(self, *shape: int) -> jax.Array:
        fan_in = max(1, int(np.prod(shape[:-1]))) if len(shape) > 1 else 1
        return jnp.asarray(self._rng.normal(size=shape) / np.sqrt(fan_in))

    def dense(self, rows: int, columns: int) -> dict[str, jax.Array]:
        return {"w": self.weight(rows, columns), "b": 0.1 * self.weight(columns)}

    def rows(self, examples: int, *shape: int) -> jax.Array:
        """Numbers for each example, of different sizes."""
        sizes = 0.5 * self._rng.lognormal(size=(examples, *[1] * len(shape)))
        return jnp.asarray(self._rng.normal(size=(examples, *shape)) * sizes)

    def integers(self, examples: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(0, high, size=(examples, *shape)), jnp.int32)

    def keys(self, examples: int) -> jax.Array:
        return jax.random.split(jax.random.key(3), examples)

    def sequences(self, examples: int) -> Any:
        """Sequences of vectors, with a label."""
        return self.rows(examples, LENGTH, WIDTH), self.integers(examples, CLASSES)

    def texts(self, examples: int) -> jax.Array:
        return self.integers(examples, TOKENS, LENGTH + 1)

    def images(self, examples: int) -> Any:
        return self.rows(examples, 6, 6, 2), self.integers(examples, CLASSES)


def dense(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], -1)
    return -jnp.mean(chosen)


def layer_norm(x: jax.Array, scale: Any = 1.0, axis: Any = -1) -> jax.Array:
    centred = x - x.mean(axis, keepdims=True)
    return scale * centred / jnp.sqrt(centred.var(axis, keepdims=True) + 1e-5)
