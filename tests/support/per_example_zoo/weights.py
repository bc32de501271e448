"""Models whose weights are shared, or changed before they are used."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_zoo.models import EACH, EXAMPLES, GRAM, OUTER, ZERO, Source, mean_square, model


@model(is_rare=True, w=GRAM)
def shared_and_transposed(source: Source) -> Any:
    params = {"w": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["w"])
        x = jnp.tanh(x @ params["w"].T + x)
        return mean_square(x @ params["w"])

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def unrolled(source: Source) -> Any:
    params = {"w": source.weight(64, 64)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        for _ in range(20):
            x = jnp.tanh(x @ params["w"])
        return mean_square(x)

    return loss_fn, params, source.batch(64)


@model(is_rare=True, w=GRAM)
def two_towers(source: Source) -> Any:
    params = {"w": source.weight(32, 16)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        one, other = (jnp.tanh(each @ params["w"]) for each in example)
        return jnp.sum(one * other) + mean_square(one - other)

    return loss_fn, params, (source.batch(32), source.batch(32))


@model(is_rare=True, a=OUTER, b=OUTER, frozen=ZERO)
def low_rank_adapters(source: Source) -> Any:
    params = {
        "a": source.weight(16, 2),
        "b": source.weight(2, 12),
        "frozen": source.weight(16, 12),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        frozen = lax.stop_gradient(params["frozen"])
        return mean_square(jnp.tanh(x @ frozen + 0.5 * (x @ params["a"]) @ params["b"]))

    return loss_fn, params, source.batch(16)


@model(is_rare=True)
def low_rank_sum(source: Source) -> Any:
    params = {"a": source.weight(16, 2), "b": source.weight(2, 12), "w": source.weight(16, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ (params["w"] + params["a"] @ params["b"])))

    return loss_fn, params, source.batch(2, 16)


@model(left=OUTER, right=OUTER)
def concatenated(source: Source) -> Any:
    params = {"left": source.weight(12, 8), "right": source.weight(12, 6)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ jnp.concatenate([params["left"], params["right"]], 1)))

    return loss_fn, params, source.batch(12)


@model(w=GRAM)
def sliced(source: Source) -> Any:
    params = {"w": source.weight(24, 24)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        y = jnp.tanh(x[:, :10] @ params["w"][:10]) + jnp.sin(x[:, 8:] @ params["w"][8:])
        even, odd = (lax.slice_in_dim(params["w"], start, 24, 2, axis=1) for start in (0, 1))
        return mean_square(y[:, :12] @ even[:12] + y[:, 12:] @ odd[12:])

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True)
def split(source: Source) -> Any:
    params = {"qkv": source.weight(12, 36)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(params["qkv"], 3, 1)
        return mean_square(jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v))

    return loss_fn, params, source.batch(2, 12)


@model(w=GRAM, v=OUTER)
def padded(source: Source) -> Any:
    params = {"w": source.weight(20, 18), "v": source.weight(18, 6)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ jnp.pad(params["w"], ((1, 3), (2, 0))))
        zero = jnp.zeros(())
        return mean_square(x.sum(0) @ lax.pad(params["v"], zero, [(1, 1, 0), (0, 1, 1)]))

    return loss_fn, params, source.batch(2, 24)


@model(is_rare=True, w=GRAM)
def transposed_and_reshaped(source: Source) -> Any:
    params = {"w": source.weight(4, 16, 6)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"].transpose(1, 0, 2).reshape(16, 24)
        return mean_square(jnp.tanh(x @ w))

    return loss_fn, params, source.batch(3, 16)


@model(is_rare=True, flat=GRAM, reversed=GRAM)
def flat_and_reversed(source: Source) -> Any:
    params = {"flat": source.weight(16 * 12), "reversed": source.weight(12, 12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["flat"].reshape(16, 12))
        return mean_square(x @ jnp.flip(params["reversed"], (0, 1)))

    return loss_fn, params, source.batch(2, 16)


@model(w=EACH)
def masked(source: Source) -> Any:
    params = {"w": source.weight(12, 12)}
    is_kept = jnp.tri(12, dtype=bool)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return mean_square(jnp.tanh(x @ jnp.where(is_kept, params["w"], 0.0)))

    return loss_fn, params, source.batch(12)


@model(is_rare=True, w=GRAM, v=OUTER)
def scaled_by_scalars(source: Source) -> Any:
    params = {"w": source.weight(16, 16), "v": source.weight(16, 4), "by": jnp.asarray(0.7)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, size = example
        x = jnp.tanh(x @ (-3.0 * params["by"] * params["w"] * size)) @ (params["w"] / params["by"])
        return mean_square(x.sum(0) @ (params["v"] / size))

    return loss_fn, params, (source.batch(2, 16), jnp.linspace(-2.0, 3.0, EXAMPLES))


@model(is_rare=True, v=EACH, g=EACH)
def weight_normalized(source: Source) -> Any:
    params = {"v": source.weight(12, 12), "g": source.weight(12)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        lengths = jnp.linalg.norm(params["v"], axis=0, keepdims=True)
        return mean_square(x @ (params["v"] / lengths * params["g"][None])) + mean_square(
            x @ params["v"]
        )

    return loss_fn, params, source.batch(12)


@model(w=GRAM, b=EACH, table=GRAM)
def weight_decay(source: Source) -> Any:
    params = {"w": source.weight(24, 24), "b": source.weight(24), "table": source.weight(24, 8)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, tokens = example
        loss = mean_square(jnp.tanh(x @ params["w"] + params["b"][None]))
        loss = loss + mean_square(jnp.tanh(params["table"][tokens]))
        return loss + 0.1 * sum(jnp.sum(leaf**2) for leaf in params.values())

    return loss_fn, params, (source.batch(2, 24), source.tokens(-2, 30, 4))
