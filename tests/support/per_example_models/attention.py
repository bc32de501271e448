"""Models with attention, and transformers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_models.entering import (
    CLASSES,
    LENGTH,
    TOKENS,
    WIDTH,
    Source,
    cross_entropy,
    dense,
    layer_norm,
    model,
)

HEADS, HEAD = 2, 4


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any = 0.0) -> jax.Array:
    scores = jnp.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5 + bias
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, -1), v)


def causal(length: int) -> jax.Array:
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -1e9)


@model
def grouped_queries_with_rotary_positions(source: Source) -> Any:
    params = {
        "q": source.weight(WIDTH, HEADS, HEAD),
        "kv": source.weight(2, WIDTH, 1, HEAD),
        "o": source.weight(HEADS, HEAD, CLASSES),
    }

    def rotated(x: jax.Array) -> jax.Array:
        angles = jnp.arange(len(x))[:, None, None] / 10.0 ** jnp.arange(HEAD // 2)
        one, other = jnp.split(x, 2, -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], -1)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        q = rotated(jnp.einsum("ti,ihd->thd", x, params["q"]))
        k, v = jnp.einsum("ti,nihd->nthd", x, params["kv"])
        k, v = jnp.repeat(rotated(k), HEADS, 1), jnp.repeat(v, HEADS, 1)
        y = attend(q, k, v, causal(LENGTH))
        return cross_entropy(jnp.einsum("thd,hdc->tc", y, params["o"]).mean(0), label)

    return loss_fn, params, source.sequences


@model
def attention_with_linear_biases(source: Source) -> Any:
    params = {
        "qkv": source.weight(WIDTH, 3, HEADS, HEAD),
        "slopes": source.weight(HEADS),
        "o": source.weight(HEADS * HEAD, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        q, k, v = jnp.moveaxis(jnp.einsum("ti,inhd->tnhd", example[0], params["qkv"]), 1, 0)
        distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
        bias = -jnp.exp(params["slopes"])[:, None, None] * distance + causal(LENGTH)
        y = attend(q, k, v, bias).reshape(LENGTH, -1)
        return cross_entropy(y[-1] @ params["o"], example[1])

    return loss_fn, params, source.sequences


@model
def attention_of_relative_positions(source: Source) -> Any:
    """As T5: a learned bias for each distance."""
    params = {
        "qkv": source.weight(WIDTH, 3, HEADS, HEAD),
        "bias": source.weight(2 * LENGTH - 1, HEADS),
        "o": source.weight(HEADS * HEAD, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        q, k, v = jnp.unstack(jnp.einsum("ti,inhd->tnhd", example[0], params["qkv"]), axis=1)
        distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH) + LENGTH - 1
        y = attend(q, k, v, params["bias"][distance].transpose(2, 0, 1))
        return cross_entropy(y.reshape(LENGTH, -1).max(0) @ params["o"], example[1])

    return loss_fn, params, source.sequences


@model
def attention_in_local_windows(source: Source) -> Any:
    params = {
        "qkv": source.weight(WIDTH, 3 * WIDTH),
        "places": source.weight(2, WIDTH),
        "out": source.weight(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        windows = example[0].reshape(-1, 2, WIDTH) + params["places"]

        def in_window(x: jax.Array) -> jax.Array:
            q, k, v = jnp.split(x @ params["qkv"], 3, -1)
            return jax.nn.softmax(q @ k.T, -1) @ v

        y = example[0] + jax.vmap(in_window)(windows).reshape(LENGTH, WIDTH)
        y = jnp.roll(y, 1, 0).reshape(-1, 2, WIDTH)
        y = jax.vmap(in_window)(y).mean((0, 1))
        return cross_entropy(y @ params["out"], example[1])

    return loss_fn, params, source.sequences


@model
def encoder_decoder_with_cross_attention(source: Source) -> Any:
    def projections() -> Any:
        return {name: source.weight(WIDTH, HEADS, HEAD) for name in "qkv"}

    params = {
        "embed": source.weight(TOKENS, WIDTH),
        "encoder": projections(),
        "self": projections(),
        "cross": projections(),
        "o": source.weight(3, HEADS, HEAD, WIDTH),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def layer(name: str, place: int, x: jax.Array, y: jax.Array, bias: Any = 0.0) -> Any:
            q, k, v = (
                jnp.einsum("ti,ihd->thd", of, params[name][each])
                for each, of in zip("qkv", (x, y, y), strict=True)
            )
            seen = attend(q, k, v, bias)
            return layer_norm(x + jnp.einsum("thd,hdi->ti", seen, params["o"][place]))

        text, other = (params["embed"][each] for each in (example[0], example[1][:-1]))
        memory = layer("encoder", 0, text, text)
        y = layer("self", 1, other, other, causal(LENGTH))
        y = layer("cross", 2, y, memory)
        return cross_entropy(y @ params["embed"].T, example[1][1:])

    return loss_fn, params, lambda examples: (source.texts(examples), source.texts(examples))


@model
def latents_that_read_a_sequence(source: Source) -> Any:
    """As Perceiver: the queries are parameters."""
    params = {
        "latents": source.weight(2, WIDTH),
        "kv": source.weight(WIDTH, 2 * WIDTH),
        "mix": source.weight(2, 3),
        "out": source.dense(3 * WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        k, v = jnp.split(example[0] @ params["kv"], 2, -1)
        read = params["latents"] + jax.nn.softmax(params["latents"] @ k.T, -1) @ v
        mixed = jax.nn.relu(read.T @ params["mix"]).ravel()
        return cross_entropy(dense(params["out"], mixed), example[1])

    return loss_fn, params, source.sequences


@model
def mixture_of_top_two_experts(source: Source) -> Any:
    params = {
        "router": source.weight(WIDTH, 3),
        "up": source.weight(3, WIDTH, 8),
        "down": source.weight(3, 8, WIDTH),
        "out": source.weight(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        shares = jax.nn.softmax(x @ params["router"])
        best, places = lax.top_k(shares, 2)
        gates = jax.nn.one_hot(places, 3) * (best / best.sum(-1, keepdims=True))[..., None]
        routed = jnp.einsum("tke,ti->eti", (gates > 0).astype(x.dtype), x)
        hidden = jax.nn.gelu(jnp.einsum("eti,eij->etj", routed, params["up"]))
        y = jnp.einsum("etj,eji,tke->ti", hidden, params["down"], gates)
        load = jnp.sum(gates.sum(1).mean(0) * shares.mean(0))
        return cross_entropy((x + y).mean(0) @ params["out"], label) + 0.1 * load

    return loss_fn, params, source.sequences


@model
def experts_chosen_by_gathering(source: Source) -> Any:
    """Each row takes the matrix of its expert."""
    params = {"router": source.weight(WIDTH, 3), "experts": source.weight(3, WIDTH, CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        shares = jax.nn.softmax(example[0] @ params["router"])
        chosen = jnp.argmax(shares, -1)
        logits = jnp.einsum("ti,tic->tc", example[0], params["experts"][chosen])
        gate = jnp.take_along_axis(shares, chosen[:, None], -1)
        return cross_entropy((gate * logits).sum(0), example[1])

    return loss_fn, params, source.sequences


@model
def language_model_of_scanned_layers(source: Source) -> Any:
    params = {
        "embed": source.weight(TOKENS, WIDTH),
        "places": source.weight(LENGTH, WIDTH),
        "layers": {
            "scales": 1.0 + 0.1 * source.weight(2, 2, WIDTH),
            "qkv": source.weight(2, WIDTH, 3, HEADS, HEAD),
            "o": source.weight(2, HEADS, HEAD, WIDTH),
            "up": source.weight(2, WIDTH, 16),
            "down": source.weight(2, 8, WIDTH),
        },
    }

    def loss_fn(params: Any, text: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, layer: Any) -> Any:
            y = layer_norm(x, layer["scales"][0])
            q, k, v = jnp.unstack(jnp.einsum("ti,inhd->tnhd", y, layer["qkv"]), axis=1)
            x += jnp.einsum("thd,hdi->ti", attend(q, k, v, causal(LENGTH)), layer["o"])
            gate, up = jnp.split(layer_norm(x, layer["scales"][1]) @ layer["up"], 2, -1)
            return x + (jax.nn.silu(gate) * up) @ layer["down"], None

        x, _ = lax.scan(layer, params["embed"][text[:-1]] + params["places"], params["layers"])
        return cross_entropy(layer_norm(x) @ params["embed"].T, text[1:])

    return loss_fn, params, source.texts


@model
def set_of_any_size(source: Source) -> Any:
    """As DeepSets."""
    params = {"each": source.dense(WIDTH, 8), "all": source.dense(16, CLASSES)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        rows, size, label = example
        is_there = jnp.arange(LENGTH)[:, None] < size
        hidden = jax.nn.relu(dense(params["each"], rows))
        mean = jnp.where(is_there, hidden, 0).sum(0) / size
        largest = jnp.where(is_there, hidden, -jnp.inf).max(0)
        return cross_entropy(dense(params["all"], jnp.concatenate([mean, largest])), label)

    def batch(examples: int) -> Any:
        rows, label = source.sequences(examples)
        return rows, 1 + source.integers(examples, LENGTH), label

    return loss_fn, params, batch
