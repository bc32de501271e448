"""Models that go through a sequence step by step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from per_example_models.entering import (
    CLASSES,
    LENGTH,
    TOKENS,
    WIDTH,
    Source,
    cross_entropy,
    dense,
    model,
)


@model
def elman_network(source: Source) -> Any:
    params = {
        "embed": source.weight(TOKENS, WIDTH),
        "cell": source.dense(2 * WIDTH, WIDTH),
        "out": source.dense(WIDTH, TOKENS),
    }

    def loss_fn(params: Any, text: jax.Array) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> Any:
            state = jnp.tanh(dense(params["cell"], jnp.concatenate([state, x])))
            return state, state

        _, states = lax.scan(step, jnp.zeros(WIDTH), params["embed"][text[:-1]])
        return cross_entropy(dense(params["out"], states), text[1:])

    return loss_fn, params, source.texts


@model
def gated_recurrent_unit(source: Source) -> Any:
    params = {
        "x": source.weight(WIDTH, 3 * WIDTH),
        "h": source.weight(WIDTH, 3 * WIDTH),
        "b": source.weight(3 * WIDTH),
        "out": source.dense(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> Any:
            ours, theirs = jnp.split(x @ params["x"] + params["b"], [2 * WIDTH])
            reset, update = jnp.split(jax.nn.sigmoid(ours + h @ params["h"][:, : 2 * WIDTH]), 2)
            new = jnp.tanh(theirs + (reset * h) @ params["h"][:, 2 * WIDTH :])
            return update * h + (1 - update) * new, None

        last, _ = lax.scan(step, jnp.zeros(WIDTH), example[0])
        return cross_entropy(dense(params["out"], last), example[1])

    return loss_fn, params, source.sequences


@model
def bidirectional_lstm_of_lengths(source: Source) -> Any:
    cell = {"x": source.weight(WIDTH, 4 * WIDTH), "h": source.weight(WIDTH, 4 * WIDTH)}
    params = {"there": cell, "back": jax.tree.map(jnp.sin, cell), "out": source.weight(8, CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        xs, length, label = example
        is_real = jnp.arange(LENGTH) < length

        def run(cell: Any, reverse: bool) -> jax.Array:
            def step(state: Any, row: Any) -> Any:
                h, c = state
                i, f, g, o = jnp.split(row[0] @ cell["x"] + h @ cell["h"], 4)
                c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                new = (jax.nn.sigmoid(o) * jnp.tanh(c), c)
                return jax.tree.map(lambda a, b: jnp.where(row[1], a, b), new, state), None

            zeros = jnp.zeros(WIDTH)
            return lax.scan(step, (zeros, zeros), (xs, is_real), reverse=reverse)[0][0]

        both = jnp.concatenate([run(params["there"], False), run(params["back"], True)])
        return cross_entropy(both @ params["out"], label)

    def batch(examples: int) -> Any:
        xs, label = source.sequences(examples)
        return xs, 1 + source.integers(examples, LENGTH), label

    return loss_fn, params, batch


@model
def stacked_lstm_rematerialized(source: Source) -> Any:
    params = {
        "layers": {"x": source.weight(2, WIDTH, 16), "h": source.weight(2, WIDTH, 16)},
        "out": source.dense(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def layer(xs: jax.Array, cell: Any) -> Any:
            @jax.checkpoint
            def step(state: Any, x: jax.Array) -> Any:
                h, c = state
                i, f, g, o = jnp.split(x @ cell["x"] + h @ cell["h"], 4)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            return lax.scan(step, (jnp.zeros(WIDTH), jnp.zeros(WIDTH)), xs)[1], None

        xs, _ = lax.scan(layer, example[0], params["layers"])
        return cross_entropy(dense(params["out"], xs[-1]), example[1])

    return loss_fn, params, source.sequences


@model
def selective_state_space(source: Source) -> Any:
    """As Mamba: what a step keeps depends on its input."""
    params = {
        "rate": jnp.log(jnp.arange(1.0, 4.0)) * jnp.ones((WIDTH, 1)),
        "step": source.dense(WIDTH, WIDTH),
        "of_input": source.weight(WIDTH, 6),
        "skip": source.weight(WIDTH),
        "gate": source.weight(WIDTH, WIDTH),
        "out": source.weight(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = example[0]
        step = jax.nn.softplus(dense(params["step"], x))
        write, read = jnp.split(x @ params["of_input"], 2, -1)
        keep = jnp.exp(-step[..., None] * jnp.exp(params["rate"]))
        new = (step * x)[..., None] * write[:, None]

        def combine(one: Any, other: Any) -> Any:
            return one[0] * other[0], other[0] * one[1] + other[1]

        _, states = lax.associative_scan(combine, (keep, new))
        y = jnp.einsum("tdn,tn->td", states, read) + params["skip"] * x
        y = y * jax.nn.silu(x @ params["gate"])
        return cross_entropy(y.mean(0) @ params["out"], example[1])

    return loss_fn, params, source.sequences


@model
def diagonal_state_space(source: Source) -> Any:
    """As S4D: a long convolution by FFT, whose kernel has few parameters."""
    params = {
        "real": source.weight(WIDTH, 3),
        "imaginary": source.weight(WIDTH, 3),
        "c": source.weight(WIDTH, 3, 2),
        "log_step": source.weight(WIDTH),
        "out": source.weight(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        poles = -jnp.exp(params["real"]) + 1j * params["imaginary"]
        moved = poles * jnp.exp(params["log_step"])[:, None]
        powers = jnp.exp(moved[..., None] * jnp.arange(LENGTH))
        c = (params["c"][..., 0] + 1j * params["c"][..., 1]) * (jnp.exp(moved) - 1) / poles
        kernel = 2 * jnp.einsum("dn,dnt->td", c, powers).real
        size = 2 * LENGTH
        y = jnp.fft.irfft(
            jnp.fft.rfft(example[0], size, 0) * jnp.fft.rfft(kernel, size, 0), size, 0
        )
        return cross_entropy(jax.nn.gelu(y[:LENGTH]).mean(0) @ params["out"], example[1])

    return loss_fn, params, source.sequences


@model
def linear_attention_as_a_recurrence(source: Source) -> Any:
    params = {"qkv": source.weight(WIDTH, 3 * WIDTH), "decay": source.weight(WIDTH)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(x @ params["qkv"], 3, -1)
        keep = jax.nn.sigmoid(params["decay"])

        def step(memory: jax.Array, row: Any) -> Any:
            q, k, v = row
            memory = keep[:, None] * memory + jnp.outer(jax.nn.elu(k) + 1, v)
            return memory, (jax.nn.elu(q) + 1) @ memory

        _, y = lax.scan(step, jnp.zeros((WIDTH, WIDTH)), (q, k, v))
        return jnp.mean((y[:-1] - x[1:]) ** 2)

    return loss_fn, params, lambda examples: source.rows(examples, LENGTH, WIDTH)


@model
def conditional_random_field(source: Source) -> Any:
    params = {
        "scores": source.dense(WIDTH, CLASSES),
        "moves": source.weight(CLASSES, CLASSES),
        "start": source.weight(CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, tags = example
        scores = dense(params["scores"], x)

        def step(alpha: jax.Array, row: jax.Array) -> Any:
            return jax.nn.logsumexp(alpha[:, None] + params["moves"], axis=0) + row, None

        alpha, _ = lax.scan(step, params["start"] + scores[0], scores[1:])
        path = params["start"][tags[0]] + params["moves"][tags[:-1], tags[1:]].sum()
        path += jnp.take_along_axis(scores, tags[:, None], 1).sum()
        return jax.nn.logsumexp(alpha) - path

    def batch(examples: int) -> Any:
        return source.rows(examples, LENGTH, WIDTH), source.integers(examples, CLASSES, LENGTH)

    return loss_fn, params, batch


@model
def connectionist_temporal_classification(source: Source) -> Any:
    params = {"kernel": source.weight(3, WIDTH, WIDTH), "out": source.dense(WIDTH, TOKENS)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, labels, length = example
        hidden = lax.conv_general_dilated(
            x[None], params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        logits = dense(params["out"], jax.nn.relu(hidden))
        is_padding = (jnp.arange(2) >= length)[None].astype(x.dtype)
        return optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels[None], is_padding)[0]

    def batch(examples: int) -> Any:
        labels = 1 + source.integers(examples, TOKENS - 1, 2)
        return source.rows(examples, 5, WIDTH), labels, 1 + source.integers(examples, 2)

    return loss_fn, params, batch


@model
def pointer_network(source: Source) -> Any:
    """Says in which order to visit the rows of an example."""
    params = {
        "encode": source.dense(WIDTH, WIDTH),
        "cell": source.dense(2 * WIDTH, WIDTH),
        "query": source.weight(WIDTH, WIDTH),
        "key": source.weight(WIDTH, WIDTH),
        "v": source.weight(WIDTH),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        rows, order = example
        memory = jnp.tanh(dense(params["encode"], rows))

        def step(state: Any, place: jax.Array) -> Any:
            h, last, is_left = state
            h = jnp.tanh(dense(params["cell"], jnp.concatenate([h, last])))
            scores = jnp.tanh(memory @ params["key"] + h @ params["query"]) @ params["v"]
            loss = -jax.nn.log_softmax(jnp.where(is_left, scores, -1e9))[place]
            return (h, memory[place], is_left.at[place].set(False)), loss

        start = (memory.mean(0), jnp.zeros(WIDTH), jnp.ones(LENGTH, bool))
        return lax.scan(step, start, order)[1].sum()

    def batch(examples: int) -> Any:
        rows = source.rows(examples, LENGTH, WIDTH)
        return rows, jnp.argsort(rows[..., 0], -1)

    return loss_fn, params, batch
