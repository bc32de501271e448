"""Models of graphs, with one graph an example."""

from typing import Any

import jax
import jax.numpy as jnp

from per_example_models.entering import CLASSES, WIDTH, Source, cross_entropy, dense, model

NODES, EDGES = 5, 8


def graphs(source: Source, examples: int) -> Any:
    """Rows of nodes, two ends of each edge, which may be padding, and a label."""
    ends = source.integers(examples, NODES + 1, 2, EDGES)
    return source.rows(examples, NODES, WIDTH), ends, source.integers(examples, CLASSES)


@model
def graph_convolution(source: Source) -> Any:
    params = [source.dense(WIDTH, WIDTH), source.dense(WIDTH, CLASSES)]

    def loss_fn(params: Any, graph: Any) -> jax.Array:
        nodes, (senders, receivers), label = graph
        # Edges of the padding have an end that is no node, and are dropped.
        degree = 1 + jax.ops.segment_sum(jnp.ones(EDGES), receivers, NODES)

        def propagate(x: jax.Array) -> jax.Array:
            rows = jnp.take(x / jnp.sqrt(degree)[:, None], senders, 0, mode="fill", fill_value=0)
            return x + jax.ops.segment_sum(rows, receivers, NODES) / jnp.sqrt(degree)[:, None]

        x = jax.nn.relu(propagate(dense(params[0], nodes)))
        return cross_entropy(propagate(dense(params[1], x)).mean(0), label)

    return loss_fn, params, lambda examples: graphs(source, examples)


@model
def graph_attention(source: Source) -> Any:
    params = {
        "w": source.weight(WIDTH, WIDTH),
        "sender": source.weight(WIDTH),
        "receiver": source.weight(WIDTH),
        "out": source.dense(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, graph: Any) -> jax.Array:
        nodes, ends, label = graph
        senders, receivers = ends % NODES
        x = nodes @ params["w"]
        scores = (x @ params["sender"])[senders] + (x @ params["receiver"])[receivers]
        scores = jax.nn.leaky_relu(scores)
        largest = jax.ops.segment_max(scores, receivers, NODES)
        shares = jnp.exp(scores - largest[receivers])
        shares /= jax.ops.segment_sum(shares, receivers, NODES)[receivers]
        x = jax.ops.segment_sum(shares[:, None] * x[senders], receivers, NODES)
        return cross_entropy(dense(params["out"], jax.nn.elu(x).sum(0)), label)

    return loss_fn, params, lambda examples: graphs(source, examples)


@model
def messages_along_edges(source: Source) -> Any:
    """One network for all edges, one for all nodes, and as many rounds as one likes."""
    params = {
        "edge": source.dense(2 * WIDTH, WIDTH),
        "node": source.dense(2 * WIDTH, WIDTH),
        "out": source.dense(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, graph: Any) -> jax.Array:
        x, ends, label = graph
        senders, receivers = ends % NODES
        for _ in range(2):
            pairs = jnp.concatenate([x[senders], x[receivers]], -1)
            messages = jax.nn.relu(dense(params["edge"], pairs))
            heard = jax.ops.segment_sum(messages, receivers, NODES)
            x = jnp.tanh(dense(params["node"], jnp.concatenate([x, heard], -1)))
        return cross_entropy(dense(params["out"], x).mean(0), label)

    return loss_fn, params, lambda examples: graphs(source, examples)


@model
def matrix_factorization(source: Source) -> Any:
    """Says how a user likes an item."""
    params = {
        "users": source.weight(6, WIDTH),
        "items": source.weight(7, WIDTH),
        "bias": {"users": source.weight(6), "items": source.weight(7), "all": jnp.zeros(())},
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        user, item, stars = example
        bias = params["bias"]
        found = params["users"][user] @ params["items"][item]
        found += bias["users"][user] + bias["items"][item] + bias["all"]
        return (found - stars) ** 2

    def batch(examples: int) -> Any:
        users, items = source.integers(examples, 6), source.integers(examples, 7)
        return users, items, source.rows(examples)

    return loss_fn, params, batch


@model
def factorization_machine(source: Source) -> Any:
    """Of several categories in one table, each at its offset."""
    params = {"table": source.weight(9, WIDTH), "linear": source.weight(9), "bias": jnp.ones(())}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        places = example[0] + 3 * jnp.arange(3)
        rows = params["table"][places]
        pairs = 0.5 * jnp.sum(rows.sum(0) ** 2 - (rows**2).sum(0))
        logit = params["bias"] + params["linear"][places].sum() + pairs
        return jax.nn.softplus(-logit) + example[1] * logit

    def batch(examples: int) -> Any:
        return source.integers(examples, 3, 3), jax.nn.sigmoid(source.rows(examples))

    return loss_fn, params, batch
