"""Models with calls, branches or loops inside."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_zoo.models import GRAM, OUTER, Source, mean_square, model


@model(w0=GRAM, w1=GRAM)
def rematerialized(source: Source) -> Any:
    params = {"w0": source.weight(24, 24), "w1": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def block(x: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.tanh(jnp.sin(x @ w) @ w.T)

        x = block(block(x, params["w0"]), params["w1"])
        return mean_square(x)

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def rematerialized_in_a_scan(source: Source) -> Any:
    params = {"w": source.stacked(3, 16, 16)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
        )
        def layer(x: jax.Array, w: jax.Array) -> Any:
            return jnp.tanh(jnp.sin(x @ w)), None

        return mean_square(lax.scan(layer, x, params["w"])[0])

    return loss_fn, params, source.batch(2, 16)


@model(is_rare=True, w=OUTER, v=OUTER)
def custom_derivatives(source: Source) -> Any:
    params = {"w": source.weight(12, 12), "v": source.weight(12, 12), "u": source.weight(12, 4)}

    @jax.custom_jvp
    def square(x: jax.Array) -> jax.Array:
        return x * x

    square.defjvp(lambda primals, tangents: (square(*primals), 3.0 * primals[0] * tangents[0]))

    @jax.custom_vjp
    def project(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    def backward(kept: Any, ct: jax.Array) -> Any:
        x, w = kept
        return w @ jnp.clip(ct, -0.1, 0.1), x[:, None] * ct[None]

    project.defvjp(lambda x, w: (x @ w, (x, w)), backward)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = square(x @ params["w"]) @ params["v"]
        return mean_square(project(jax.nn.relu(x), params["u"]))

    return loss_fn, params, source.batch(12)


@model(w=GRAM, v=OUTER)
def nested_jit(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "v": source.weight(24, 4)}

    @jax.jit
    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w)

    @jax.jit
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return dense(dense(x, w), w)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(dense(twice(x, params["w"]), params["v"]))

    return loss_fn, params, source.batch(24)


@model(is_rare=True, w=OUTER, inside=GRAM)
def branches(source: Source) -> Any:
    params = {"w": source.weight(12, 12), "inside": source.weight(12, 12)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, which = example
        x = x @ params["w"]
        x = lax.cond(x[0] > 0, lambda x: jnp.tanh(x @ params["inside"]), lambda x: x, x)
        x = lax.switch(which, [jnp.sin, lambda x: 2 * (x @ params["inside"]), jnp.cos], x)
        return mean_square(x)

    return loss_fn, params, (source.batch(12), source.tokens(0, 3))


@model(is_rare=True, w=OUTER)
def while_loop_of_constants(source: Source) -> Any:
    params = {"w": source.weight(12, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        length = lax.while_loop(
            lambda size: size > 1.0, lambda size: size / 2, lax.stop_gradient(jnp.sum(x * x))
        )
        return mean_square(jnp.tanh(x @ params["w"])) * length

    return loss_fn, params, source.batch(12)


@model(is_rare=True, w=GRAM, v=OUTER)
def mapped_inside(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "v": source.stacked(2, 24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.vmap(lambda row: jnp.tanh(params["w"] @ row))(x)
        x = jax.vmap(lambda row, v: jnp.tanh(v @ row), (None, 0))(x[0], params["v"]) + x
        return mean_square(x) + mean_square(lax.map(lambda row: params["w"] @ row, x))

    return loss_fn, params, source.batch(2, 24)


@model(gate=GRAM, experts=GRAM)
def mixture_of_experts(source: Source) -> Any:
    params = {"gate": source.weight(16, 3), "experts": source.stacked(3, 16, 16)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ params["gate"])
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 3)
        inside = jnp.einsum("te,td->etd", chosen, x)
        outside = jnp.tanh(jnp.einsum("etd,edk->etk", inside, params["experts"]))
        return mean_square(jnp.einsum("te,etk->tk", gates * chosen, outside))

    return loss_fn, params, source.batch(2, 16)
