"""Models in 16 bits.

Products and sums are rounded to 8 or 11 bits on the way, and in another order than by `vmap`, so
the tolerance is a few of these steps.
"""

from typing import Any

import jax
import jax.numpy as jnp

from per_example_zoo.models import GRAM, OUTER, Source, mean_square, model


def _narrow(source: Source, of_params: Any, of_compute: Any) -> Any:
    params = {"w": source.weight(32, 32), "v": source.weight(32, 8), "b": source.weight(8)}
    params = jax.tree.map(lambda leaf: leaf.astype(of_params), params)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        w, v, b = (params[name].astype(of_compute) for name in "wvb")
        x = jnp.tanh(x.astype(of_compute) @ w).sum(0) @ v + b
        return mean_square(x.astype(jnp.float32))

    return loss_fn, params, source.batch(3, 32)


@model(w=GRAM, v=OUTER, tolerance=0.02)
def bfloat16_compute(source: Source) -> Any:
    return _narrow(source, jnp.float32, jnp.bfloat16)


@model(w=GRAM, v=OUTER, tolerance=0.02)
def bfloat16_params(source: Source) -> Any:
    return _narrow(source, jnp.bfloat16, jnp.bfloat16)


@model(is_rare=True, w=GRAM, v=OUTER, tolerance=0.02)
def bfloat16_params_of_float32_compute(source: Source) -> Any:
    return _narrow(source, jnp.bfloat16, jnp.float32)


@model(is_rare=True, w=GRAM, v=OUTER, tolerance=0.003)
def float16_params(source: Source) -> Any:
    return _narrow(source, jnp.float16, jnp.float16)


@model(w=OUTER, tolerance=0.003)
def float16_of_scaled_weights(source: Source) -> Any:
    params = {"w": 1e6 * source.weight(12, 8)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        # What the gradient is multiplied by is too small for float16.
        w = (params["w"] * 1e-6).astype(jnp.float16)
        return mean_square((x.astype(jnp.float16) @ w).astype(jnp.float32))

    return loss_fn, params, source.batch(12)
