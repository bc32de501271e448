"""Models with unusual leaves: scalars, empty ones, unused ones, complex numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_zoo.models import EACH, GRAM, OUTER, ZERO, Source, mean_square, model


@model(w=OUTER, scalar=EACH, one=EACH)
def scalars(source: Source) -> Any:
    params = {"w": source.weight(12, 4), "scalar": jnp.asarray(0.3), "one": source.weight(1, 1)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        y = jnp.exp(params["scalar"]) * (x @ params["w"]) + params["one"][0]
        return mean_square(jnp.tanh(y))

    return loss_fn, params, source.batch(12)


@model(w=OUTER, unused=ZERO, alike=EACH)
def unused_empty_and_alike(source: Source) -> Any:
    params = {
        "w": source.weight(12, 4),
        "unused": source.weight(3, 3),
        "empty": jnp.zeros((0, 4)),
        "alike": source.weight(5),
        "nothing": None,
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        # The gradient of `alike` is the same for all examples.
        x = jnp.concatenate([x @ params["w"], jnp.sum(params["empty"], 0)])
        return mean_square(x) + jnp.sum(params["alike"])

    return loss_fn, params, source.batch(12)


@model(is_rare=True, no_rows=GRAM, w=OUTER)
def nothing_summed(source: Source) -> Any:
    params = {"w": source.weight(6, 4), "no_rows": source.weight(6, 4)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, empty = example
        return mean_square(x @ params["w"]) + jnp.sum(empty @ params["no_rows"])

    return loss_fn, params, (source.batch(6), source.batch(0, 6))


@model(is_rare=True)
def complex_numbers(source: Source) -> Any:
    params = {
        "w": lax.complex(source.weight(8, 6), source.weight(8, 6)),
        "v": source.weight(6, 4),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.abs(x.astype(jnp.complex64) @ params["w"]) @ params["v"]
        return mean_square(jnp.abs(jnp.fft.rfft(x)))

    return loss_fn, params, source.batch(2, 8)


@model(is_rare=True)
def linear_algebra(source: Source) -> Any:
    params = {"w": source.weight(4, 4), "v": source.weight(4, 4)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        positive = params["w"] @ params["w"].T + 2 * jnp.eye(4)
        x = jnp.linalg.solve(positive, x)
        x = jnp.sort(jnp.cumsum(x @ params["v"]))
        return mean_square(lax.associative_scan(jnp.add, x)) + jnp.linalg.slogdet(positive)[1]

    return loss_fn, params, source.batch(4)
