"""Models of dense layers."""

from typing import Any

import jax
import jax.numpy as jnp

from per_example_zoo.models import EACH, GRAM, OUTER, Source, cross_entropy, mean_square, model


@model(w0=OUTER, w1=OUTER, b0=EACH)
def mlp(source: Source) -> Any:
    params = {
        "w0": source.weight(12, 16),
        "b0": source.weight(16),
        "w1": source.weight(16, 5),
        "b1": source.weight(5),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        x = jnp.tanh(x @ params["w0"] + params["b0"])
        return cross_entropy(x @ params["w1"] + params["b1"], label)

    return loss_fn, params, (source.batch(12), source.tokens(0, 5))


@model(wide=GRAM, narrow=EACH)
def dense_over_time(source: Source) -> Any:
    params = {"wide": source.weight(32, 32), "narrow": source.weight(32, 2)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ params["wide"]) @ params["narrow"])

    return loss_fn, params, source.batch(4, 32)


@model(is_rare=True, short=GRAM, long=EACH)
def dense_over_two_axes(source: Source) -> Any:
    params = {"short": source.weight(24, 20), "long": source.weight(4, 3)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        return mean_square(x @ params["short"]) * (1 + mean_square(jnp.sin(y @ params["long"])))

    return loss_fn, params, (source.batch(2, 3, 24), source.batch(5, 6, 4))


@model(is_rare=True, into=GRAM, out=GRAM, back=GRAM, each=GRAM, inner=EACH)
def einsum_projections(source: Source) -> Any:
    params = {
        "into": source.weight(16, 3, 8),
        "out": source.weight(3, 8, 16),
        "back": source.weight(16, 3, 8),
        "each": source.weight(3, 16, 8),
        "inner": source.weight(3, 3),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        heads = jnp.tanh(jnp.einsum("td,dhk->thk", x, params["into"]))
        heads = jnp.tanh(jnp.einsum("thk,hg->tgk", heads, params["inner"]))
        x = jnp.einsum("thd,hdk->tk", heads, params["out"])
        y = jnp.tanh(jnp.einsum("thd,ehd->te", heads, params["back"]))
        z = jnp.einsum("td,hdk->htk", x * y, params["each"])
        return mean_square(z) + mean_square(x)

    return loss_fn, params, source.batch(4, 16)


@model(is_rare=True, scores=GRAM)
def bilinear(source: Source) -> Any:
    params = {"scores": source.weight(16, 16)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        return mean_square(jnp.einsum("td,de,se->ts", x, params["scores"], y))

    return loss_fn, params, (source.batch(3, 16), source.batch(4, 16))


@model(is_rare=True, heads=GRAM, lonely=OUTER)
def one_matrix_a_head(source: Source) -> Any:
    params = {"heads": source.weight(3, 16, 16), "lonely": source.weight(16, 4)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(jnp.einsum("htd,hdk->htk", x, params["heads"]))
        return mean_square(jnp.mean(x, (0, 1)) @ params["lonely"])

    return loss_fn, params, source.batch(3, 2, 16)
