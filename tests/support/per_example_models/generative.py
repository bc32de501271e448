"""Models of what data looks like."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_models.entering import CLASSES, LENGTH, TOKENS, WIDTH, Source, dense, model


@model
def variational_autoencoder(source: Source) -> Any:
    params = {
        "encode": source.dense(WIDTH, 4),
        "decode": [source.dense(2, 6), source.dense(6, WIDTH)],
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, key = example
        mean, log_std = jnp.split(dense(params["encode"], x), 2)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        found = dense(params["decode"][1], jnp.tanh(dense(params["decode"][0], z)))
        divergence = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std)
        return jnp.sum((found - x) ** 2) + divergence

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), source.keys(n))


@model
def quantized_autoencoder(source: Source) -> Any:
    """As VQ-VAE: the gradient goes straight through the choice of a code."""
    params = {
        "encode": source.dense(WIDTH, 3),
        "codes": source.weight(5, 3),
        "decode": source.dense(3, WIDTH),
    }

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        z = dense(params["encode"], x)
        distances = jnp.sum((z[:, None] - params["codes"]) ** 2, -1)
        code = params["codes"][jnp.argmin(distances, -1)]
        through = z + lax.stop_gradient(code - z)
        commit = jnp.sum((z - lax.stop_gradient(code)) ** 2)
        learn = jnp.sum((lax.stop_gradient(z) - code) ** 2)
        return jnp.sum((dense(params["decode"], through) - x) ** 2) + learn + 0.25 * commit

    return loss_fn, params, lambda n: source.rows(n, LENGTH, WIDTH)


@model
def flow_of_couplings(source: Source) -> Any:
    """As RealNVP."""
    params = [[source.dense(2, 6), source.dense(6, 4)] for _ in range(3)]

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        log_volume = jnp.zeros(())
        for first, second in params:
            kept, changed = jnp.split(x, 2)
            scale, shift = jnp.split(dense(second, jnp.tanh(dense(first, kept))), 2)
            x = jnp.concatenate([changed * jnp.exp(jnp.tanh(scale)) + shift, kept])
            log_volume += jnp.tanh(scale).sum()
        return 0.5 * jnp.sum(x**2) - log_volume

    return loss_fn, params, lambda n: source.rows(n, WIDTH)


@model
def flow_of_triangular_matrices(source: Source) -> Any:
    """As Glow's invertible convolutions, with a determinant."""
    params = {"w": jnp.eye(WIDTH) + 0.1 * source.weight(WIDTH, WIDTH), "lower": source.weight(6)}

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        lower = jnp.eye(WIDTH).at[jnp.tril_indices(WIDTH, -1)].set(params["lower"])
        z = jax.scipy.linalg.solve_triangular(lower, params["w"] @ x, lower=True)
        return 0.5 * jnp.sum(z**2) - jnp.linalg.slogdet(params["w"])[1]

    return loss_fn, params, lambda n: source.rows(n, WIDTH)


@model
def mixture_density(source: Source) -> Any:
    params = [source.dense(1, 8), source.dense(8, 3 * CLASSES)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        out = dense(params[1], jnp.tanh(dense(params[0], example[0])))
        weight, mean, log_std = jnp.split(out, 3)
        z = (example[1] - mean) * jnp.exp(-log_std)
        return -jax.nn.logsumexp(jax.nn.log_softmax(weight) - 0.5 * z**2 - log_std)

    return loss_fn, params, lambda n: (source.rows(n, 1), source.rows(n))


@model
def masked_autoregression(source: Source) -> Any:
    """As MADE: masks keep each number from seeing those after it."""
    params = [source.dense(WIDTH, WIDTH), source.dense(WIDTH, WIDTH)]

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        order = jnp.arange(WIDTH)
        masks = (order[:, None] <= order, order[:, None] < order)
        first, second = (layer["w"] * mask for layer, mask in zip(params, masks, strict=True))
        hidden = jax.nn.relu(x @ first + params[0]["b"])
        return jnp.sum((hidden @ second + params[1]["b"] - x) ** 2)

    return loss_fn, params, lambda n: source.rows(n, WIDTH)


@model
def score_matching(source: Source) -> Any:
    """With the trace of a Jacobian, from products with vectors."""
    params = [source.dense(WIDTH, 8), source.dense(8, WIDTH)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, direction = example

        def score(x: jax.Array) -> jax.Array:
            return dense(params[1], jax.nn.softplus(dense(params[0], x)))

        found, change = jax.jvp(score, (x,), (direction,))
        return direction @ change + 0.5 * jnp.sum(found**2)

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), source.rows(n, WIDTH))


@model
def energy_of_two_samples(source: Source) -> Any:
    """A critic with a penalty on its gradient, as in WGAN-GP."""
    params = [source.dense(WIDTH, 8), source.dense(8, 1)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        real, made, share = example

        def critic(x: jax.Array) -> jax.Array:
            return dense(params[1], jnp.tanh(dense(params[0], x)))[0]

        between = share * real + (1 - share) * made
        slope = jnp.sqrt(jnp.sum(jax.grad(critic)(between) ** 2) + 1e-6)
        return critic(made) - critic(real) + (slope - 1) ** 2

    return (
        loss_fn,
        params,
        lambda n: (
            source.rows(n, WIDTH),
            source.rows(n, WIDTH),
            jax.nn.sigmoid(source.rows(n)),
        ),
    )


@model
def skip_grams(source: Source) -> Any:
    """As word2vec with negative samples."""
    params = {"inside": source.weight(TOKENS, WIDTH), "outside": source.weight(TOKENS, WIDTH)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        word, context, others = example
        v = params["inside"][word]
        right = jax.nn.log_sigmoid(params["outside"][context] @ v)
        return -right - jax.nn.log_sigmoid(-params["outside"][others] @ v).sum()

    return (
        loss_fn,
        params,
        lambda n: (
            source.integers(n, TOKENS),
            source.integers(n, TOKENS),
            source.integers(n, TOKENS, 3),
        ),
    )
