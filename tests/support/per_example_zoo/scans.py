"""Models with scans."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_zoo.models import EACH, GRAM, Source, cross_entropy, mean_square, model


@model(w=GRAM, b=EACH)
def layers_under_scan(source: Source) -> Any:
    params = {"w": source.stacked(3, 12, 12), "b": source.weight(3, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> Any:
            return jnp.tanh(x @ weights["w"] + weights["b"]), jnp.sum(x)

        x, sums = lax.scan(layer, x, params)
        return mean_square(x) + mean_square(sums)

    return loss_fn, params, source.batch(12)


@model(is_rare=True, w=GRAM)
def layers_under_scan_over_time(source: Source) -> Any:
    params = {"w": source.stacked(3, 16, 16), "v": source.stacked(3, 16, 4)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> Any:
            return jnp.tanh(x @ weights["w"]) @ weights["v"] @ weights["v"].T, None

        return mean_square(lax.scan(layer, x, params, reverse=True, unroll=2)[0])

    return loss_fn, params, source.batch(3, 16)


# Slices of different lengths are stacks of different lengths: these products do not compare.
@model(is_rare=True, one=GRAM, two=EACH)
def stack_sliced_for_scans(source: Source) -> Any:
    params = {"one": source.stacked(4, 16, 16), "two": source.stacked(5, 16, 16)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> Any:
            return jnp.tanh(x @ w), None

        for stack in (params["one"][1:3], params["two"][1:4], params["two"][3:]):
            x, _ = lax.scan(layer, x, stack)
        return mean_square(x)

    return loss_fn, params, source.batch(2, 16)


@model(is_rare=True, a=EACH, w=EACH)
def stack_concatenated_for_a_scan(source: Source) -> Any:
    params = {"a": source.stacked(2, 8, 8), "b": source.stacked(1, 8, 8), "w": source.weight(4, 8)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> Any:
            return x + jnp.tanh(x @ w), None

        padded = jnp.pad(params["w"][None], ((0, 1), (0, 4), (0, 0)))
        stack = jnp.concatenate([params["a"], params["b"], padded])
        return mean_square(lax.scan(layer, x, stack)[0] + 1.0)

    return loss_fn, params, source.batch(2, 8)


@model(is_rare=True)
def scaled_step_by_step(source: Source) -> Any:
    params = {"w": source.weight(16, 16), "stack": source.stacked(4, 16, 16)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, sizes = example

        def step(y: jax.Array, part: Any) -> Any:
            size, w = part
            return jnp.tanh(y + x @ (size * params["w"]) + x @ (size * w)), None

        return mean_square(lax.scan(step, x, (sizes, params["stack"]))[0])

    return loss_fn, params, (source.batch(16), source.batch(4))


@model(into=GRAM, w=GRAM)
def recurrent(source: Source) -> Any:
    params = {
        "into": source.weight(16, 24),
        "w": source.weight(24, 24),
        "b": source.weight(24),
    }

    def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> Any:
            state = jnp.tanh(x @ params["into"] + state @ params["w"] + params["b"])
            return state, state

        return mean_square(lax.scan(step, jnp.zeros(24), sequence)[1])

    return loss_fn, params, source.batch(4, 16)


@model(kernel=GRAM)
def long_short_term_memory(source: Source) -> Any:
    params = {"kernel": source.weight(8 + 12, 48), "bias": source.weight(48)}

    def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> Any:
            cell, hidden = carry
            gates = jnp.concatenate([x, hidden]) @ params["kernel"] + params["bias"]
            i, f, g, o = jnp.split(gates, 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (cell, hidden), None

        zeros = jnp.zeros(12)
        return mean_square(lax.scan(step, (zeros, zeros), sequence)[0][1])

    return loss_fn, params, source.batch(4, 8)


@model(is_rare=True, embedding=GRAM, w=GRAM)
def recurrent_with_look_ups(source: Source) -> Any:
    params = {"embedding": source.weight(40, 12), "w": source.weight(12, 12)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        def step(state: jax.Array, token: jax.Array) -> Any:
            state = jnp.tanh(params["embedding"][token] + state @ params["w"])
            return state, params["embedding"] @ state

        logits = lax.scan(step, jnp.zeros(12), tokens[:-1])[1]
        return cross_entropy(logits, tokens[1:])

    return loss_fn, params, source.tokens(0, 5, 4)


@model(is_rare=True, w=GRAM, deep=GRAM)
def scan_in_a_scan(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "deep": source.stacked(2, 24, 24)}

    def loss_fn(params: Any, sequence: jax.Array) -> jax.Array:
        def layer(x: jax.Array, deep: jax.Array) -> Any:
            return jnp.tanh(x @ deep + x @ params["w"]), None

        def step(state: jax.Array, x: jax.Array) -> Any:
            return lax.scan(layer, state + x, params["deep"])[0], None

        return mean_square(lax.scan(step, jnp.zeros(24), sequence)[0])

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def counted_loop(source: Source) -> Any:
    params = {"w": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = lax.fori_loop(0, 3, lambda index, x: jnp.tanh(x @ params["w"]), x)
        return mean_square(x)

    return loss_fn, params, source.batch(24)
