"""Models with attention or embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from per_example_zoo.models import (
    EACH,
    GRAM,
    OUTER,
    Source,
    cross_entropy,
    layer_norm,
    mean_square,
    model,
)


def attention(params: Any, x: jax.Array, groups: int = 1) -> jax.Array:
    """Causal, of several heads; some of them may share their keys and values."""
    q = jnp.einsum("td,dhk->htk", x, params["q"])
    k = jnp.repeat(jnp.einsum("td,dhk->htk", x, params["k"]), groups, 0)
    v = jnp.repeat(jnp.einsum("td,dhk->htk", x, params["v"]), groups, 0)
    scores = jnp.einsum("htk,hsk->hts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    time = jnp.arange(x.shape[0])
    is_seen = (time[:, None] >= time[None])[None]
    scores = jax.nn.softmax(jnp.where(is_seen, scores, -1e9), -1)
    return jnp.einsum("hts,hsk,hkd->td", scores, v, params["o"])


@model(embedding=GRAM, position=EACH, q=GRAM, k=GRAM, v=GRAM, o=GRAM, up=GRAM, scale=EACH)
def transformer_block(source: Source) -> Any:
    params = {
        "embedding": source.weight(20, 16),
        "position": source.weight(8, 16),
        **{name: source.weight(16, 2, 8) for name in "qkv"},
        "o": source.weight(2, 8, 16),
        "scale": jnp.ones(16),
        "bias": source.weight(16),
        "up": source.weight(16, 32),
        "down": source.weight(32, 20),
    }

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"][tokens[:-1]] + params["position"][: len(tokens) - 1]
        x = x + attention(params, layer_norm(x, params["scale"], params["bias"]))
        x = jax.nn.gelu(layer_norm(x, params["scale"], params["bias"]) @ params["up"])
        return cross_entropy(x @ params["down"], tokens[1:])

    return loss_fn, params, source.tokens(0, 20, 6)


@model(is_rare=True, q=GRAM, k=GRAM, v=GRAM, o=GRAM)
def grouped_query_attention(source: Source) -> Any:
    params = {
        "q": source.weight(16, 4, 6),
        "k": source.weight(16, 2, 6),
        "v": source.weight(16, 2, 6),
        "o": source.weight(4, 6, 16),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(attention(params, x, groups=2))

    return loss_fn, params, source.batch(4, 16)


@model(embedding=GRAM, mix=GRAM)
def tied_embedding(source: Source) -> Any:
    params = {"embedding": source.weight(40, 16), "mix": source.weight(16, 16)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(params["embedding"][tokens[:-1]] @ params["mix"])
        return cross_entropy(x @ params["embedding"].T, tokens[1:])

    return loss_fn, params, source.tokens(0, 6, 5)


@model(table=GRAM, rows=GRAM, one=OUTER, small=EACH)
def look_ups(source: Source) -> Any:
    params = {
        "table": source.weight(30, 4),
        "rows": source.weight(30, 4),
        "one": source.weight(30, 4),
        "small": source.weight(2, 4),
    }

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        # Repeated, negative and far outside, on both sides.
        x = params["table"][tokens] * jnp.cos(params["rows"].at[tokens].get(mode="clip"))
        x = x + jnp.take(params["rows"], tokens, axis=0, mode="wrap")
        x = x + params["table"].at[tokens].get(mode="fill", fill_value=0.0)
        x = x + params["small"][tokens % 2]
        return mean_square(x) + mean_square(params["one"][tokens[0]])

    return loss_fn, params, source.tokens(-40, 40, 6).at[:, 1].set(3).at[:, 4].set(3)


@model(is_rare=True, table=GRAM)
def look_up_of_columns_and_grids(source: Source) -> Any:
    params = {"table": source.weight(40, 6), "columns": source.weight(5, 12)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(params["table"][tokens]).sum((0, 1))
        y = params["columns"][:, tokens[0]]
        return (
            mean_square(x) + mean_square(y @ y.T) + params["columns"][tokens[0, 0], tokens[0, 1]]
        )

    return loss_fn, params, source.tokens(0, 5, 2, 3)


@model(is_rare=True, table=GRAM)
def one_hot_look_up(source: Source) -> Any:
    params = {"table": source.weight(16, 16)}

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(jax.nn.one_hot(tokens, 16) @ params["table"]))

    return loss_fn, params, source.tokens(0, 5, 4)
