"""Models whose weights are made of parameters in special ways."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from per_example_models.entering import (
    CLASSES,
    LENGTH,
    WIDTH,
    Source,
    cross_entropy,
    dense,
    layer_norm,
    model,
)


def vectors(source: Source, examples: int) -> Any:
    return source.rows(examples, WIDTH), source.integers(examples, CLASSES)


@model
def hypernetwork(source: Source) -> Any:
    """Makes the weights of a network for each example."""
    params = {"embed": source.weight(3, 4), "make": source.dense(4, WIDTH * CLASSES + CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label, task = example
        made = dense(params["make"], jnp.tanh(params["embed"][task]))
        w, b = made[: WIDTH * CLASSES].reshape(WIDTH, CLASSES), made[WIDTH * CLASSES :]
        return cross_entropy(x @ w + b, label)

    return loss_fn, params, lambda n: (*vectors(source, n), source.integers(n, 3))


@model
def features_that_are_modulated(source: Source) -> Any:
    """As FiLM."""
    params = {
        "film": source.dense(WIDTH, 16),
        "in": source.dense(WIDTH, 8),
        "out": source.dense(8, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label, condition = example
        scale, shift = jnp.split(dense(params["film"], condition), 2)
        hidden = jax.nn.relu(layer_norm(dense(params["in"], x)) * (1 + scale) + shift)
        return cross_entropy(dense(params["out"], hidden), label)

    return loss_fn, params, lambda n: (*vectors(source, n), source.rows(n, WIDTH))


@model
def normalized_weights(source: Source) -> Any:
    params = {"v": source.weight(WIDTH, 8), "g": jnp.ones(8), "out": source.dense(8, CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        w = params["g"] * params["v"] / jnp.linalg.norm(params["v"], axis=0)
        return cross_entropy(dense(params["out"], jax.nn.relu(example[0] @ w)), example[1])

    return loss_fn, params, lambda n: vectors(source, n)


@model
def spectrally_normalized_weights(source: Source) -> Any:
    params = {"w": source.weight(WIDTH, 8), "out": source.dense(8, CLASSES)}
    start = source.weight(8)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        w, v = params["w"], start
        for _ in range(2):
            u = lax.stop_gradient(w @ v)
            u /= jnp.linalg.norm(u)
            v = lax.stop_gradient(w.T @ u)
            v /= jnp.linalg.norm(v)
        hidden = jax.nn.relu(example[0] @ (w / (u @ w @ v)))
        return cross_entropy(dense(params["out"], hidden), example[1])

    return loss_fn, params, lambda n: vectors(source, n)


@model
def low_rank_adapters_of_frozen_weights(source: Source) -> Any:
    frozen = {"one": source.weight(WIDTH, 8), "two": source.weight(8, CLASSES)}
    params = {
        name: {"a": source.weight(w.shape[0], 2), "b": source.weight(2, w.shape[1])}
        for name, w in frozen.items()
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def layer(name: str, x: jax.Array) -> jax.Array:
            return x @ frozen[name] + 2.0 * (x @ params[name]["a"]) @ params[name]["b"]

        return cross_entropy(layer("two", jax.nn.gelu(layer("one", example[0]))), example[1])

    return loss_fn, params, lambda n: vectors(source, n)


@model
def adapters_with_a_direction_of_their_own(source: Source) -> Any:
    """As DoRA: merged, then scaled to a learned length."""
    frozen = source.weight(WIDTH, CLASSES)
    params = {"a": source.weight(WIDTH, 2), "b": source.weight(2, CLASSES), "m": jnp.ones(CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        w = frozen + params["a"] @ params["b"]
        w = params["m"] * w / lax.stop_gradient(jnp.linalg.norm(w, axis=0))
        return cross_entropy(example[0] @ w, example[1])

    return loss_fn, params, lambda n: vectors(source, n)


@model
def parameters_in_one_vector(source: Source) -> Any:
    flat, unravel = ravel_pytree([source.dense(WIDTH, 6), source.dense(6, CLASSES)])

    def loss_fn(flat: jax.Array, example: Any) -> jax.Array:
        first, second = unravel(flat)
        return cross_entropy(dense(second, jnp.tanh(dense(first, example[0]))), example[1])

    return loss_fn, flat, lambda n: vectors(source, n)


@model
def python_loop_over_a_stack(source: Source) -> Any:
    params = {"w": source.weight(3, WIDTH, WIDTH), "b": source.weight(3, WIDTH)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = example[0]
        for layer in range(3):
            x = x + jnp.tanh(x @ params["w"][layer] + params["b"][layer])
        return cross_entropy(x, example[1])

    return loss_fn, params, lambda n: vectors(source, n)


@model
def ensemble_in_one_model(source: Source) -> Any:
    """Mapped over the first axis of all parameters."""
    params = {"w": source.weight(3, WIDTH, CLASSES), "b": source.weight(3, CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        logits = jax.vmap(lambda layer: dense(layer, example[0]))(params)
        return jnp.mean(jax.vmap(cross_entropy, (0, None))(logits, example[1]))

    return loss_fn, params, lambda n: vectors(source, n)


@model
def highway_network(source: Source) -> Any:
    params = {"layers": source.weight(3, 2, WIDTH, WIDTH), "gate": -jnp.ones(())}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def layer(x: jax.Array, pair: jax.Array) -> Any:
            gate = jax.nn.sigmoid(x @ pair[0] + params["gate"])
            return gate * jax.nn.relu(x @ pair[1]) + (1 - gate) * x, jnp.mean(gate)

        x, gates = lax.scan(layer, example[0], params["layers"])
        return cross_entropy(x, example[1]) + 0.01 * gates.sum()

    return loss_fn, params, lambda n: vectors(source, n)


@model
def branch_for_each_kind_of_example(source: Source) -> Any:
    """A depth and a head for each kind."""
    params = {"trunk": source.dense(WIDTH, WIDTH), "heads": source.weight(3, WIDTH, CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label, kind = example
        heads = [lambda x, head=head: x @ head for head in params["heads"]]
        deep = lax.cond(kind > 0, lambda x: jnp.tanh(dense(params["trunk"], x)), lambda x: x, x)
        return cross_entropy(lax.switch(kind, heads, deep), label)

    return loss_fn, params, lambda n: (*vectors(source, n), source.integers(n, 3))


@model
def tensor_network_of_pairs(source: Source) -> Any:
    params = {"t": source.weight(WIDTH, 3, WIDTH), "v": source.dense(2 * WIDTH, 3)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        one, other, label = example
        scores = jnp.einsum("i,ikj,j->k", one, params["t"], other)
        return cross_entropy(scores + dense(params["v"], jnp.concatenate([one, other])), label)

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), *vectors(source, n))


@model
def siamese_network(source: Source) -> Any:
    params = [source.dense(WIDTH, 8), source.dense(8, 3)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def embed(x: jax.Array) -> jax.Array:
            return dense(params[1], jnp.tanh(dense(params[0], x)))

        one, other, is_same = example
        distance = jnp.sum((embed(one) - embed(other)) ** 2)
        far = jax.nn.relu(2 - jnp.sqrt(distance + 1e-6)) ** 2
        return jnp.where(is_same == 1, distance, far)

    return (
        loss_fn,
        params,
        lambda n: (*(source.rows(n, WIDTH) for _ in "ab"), source.integers(n, 2)),
    )


@model
def contrast_of_pairs(source: Source) -> Any:
    """Several pairs an example, each of which has the others as negatives."""
    params = {
        "text": source.dense(WIDTH, 3),
        "image": source.dense(WIDTH, 3),
        "heat": jnp.ones(()),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def embed(layer: Any, x: jax.Array) -> jax.Array:
            y = dense(layer, x)
            return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

        text, image = embed(params["text"], example[0]), embed(params["image"], example[1])
        logits = jnp.exp(params["heat"]) * text @ image.T
        places = jnp.arange(LENGTH)
        return cross_entropy(logits, places) + cross_entropy(logits.T, places)

    return loss_fn, params, lambda n: tuple(source.rows(n, LENGTH, WIDTH) for _ in range(2))


@model
def policy_and_value(source: Source) -> Any:
    """The clipped objective of PPO, on the steps of one episode."""
    params = {
        "body": source.dense(WIDTH, 8),
        "policy": source.dense(8, CLASSES),
        "value": source.dense(8, 1),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        seen, actions, old, gains = example
        hidden = jnp.tanh(dense(params["body"], seen))
        logs = jax.nn.log_softmax(dense(params["policy"], hidden))
        ratio = jnp.exp(jnp.take_along_axis(logs, actions[:, None], 1)[:, 0] + 1 - jnp.abs(old))
        value = dense(params["value"], hidden)[:, 0]
        gain = gains - lax.stop_gradient(value)
        objective = jnp.minimum(ratio * gain, jnp.clip(ratio, 0.8, 1.2) * gain)
        entropy = -jnp.sum(jnp.exp(logs) * logs, -1)
        return jnp.mean(-objective + 0.5 * (value - gains) ** 2 - 0.01 * entropy)

    return (
        loss_fn,
        params,
        lambda n: (
            source.rows(n, LENGTH, WIDTH),
            source.integers(n, CLASSES, LENGTH),
            source.rows(n, LENGTH),
            source.rows(n, LENGTH),
        ),
    )
