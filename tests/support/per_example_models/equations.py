"""Models that solve an equation, or are made to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from per_example_models.entering import CLASSES, WIDTH, Source, cross_entropy, dense, model


@model
def neural_differential_equation(source: Source) -> Any:
    """By Runge and Kutta, with fixed steps."""
    params = [source.dense(WIDTH + 1, 8), source.dense(8, WIDTH)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def slope(x: jax.Array, time: Any) -> jax.Array:
            seen = jnp.append(x, time)
            return dense(params[1], jnp.tanh(dense(params[0], seen)))

        def step(x: jax.Array, time: jax.Array) -> Any:
            h = 0.25
            a = slope(x, time)
            b = slope(x + h / 2 * a, time + h / 2)
            c = slope(x + h / 2 * b, time + h / 2)
            d = slope(x + h * c, time + h)
            return x + h / 6 * (a + 2 * b + 2 * c + d), None

        end, _ = lax.scan(step, example[0], jnp.arange(4) / 4)
        return jnp.sum((end - example[1]) ** 2)

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), source.rows(n, WIDTH))


@model
def stochastic_differential_equation(source: Source) -> Any:
    params = {"drift": source.dense(WIDTH, WIDTH), "noise": source.dense(WIDTH, WIDTH)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, key = example

        def step(place: Any, state: Any) -> Any:
            x, key = state
            key, now = jax.random.split(key)
            spread = jax.nn.softplus(dense(params["noise"], x))
            x += 0.3 * jnp.tanh(dense(params["drift"], x))
            return x + 0.1 * spread * jax.random.normal(now, x.shape), key

        end, _ = lax.fori_loop(0, 3, step, (x, key))
        return jnp.sum(end**2)

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), source.keys(n))


@model
def layer_at_a_fixed_point(source: Source) -> Any:
    """A deep equilibrium model, with the derivative of an implicit function."""
    params = {
        "w": 0.3 * source.weight(WIDTH, WIDTH),
        "x": source.weight(WIDTH, WIDTH),
        "out": source.dense(WIDTH, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def excess(z: jax.Array) -> jax.Array:
            return z - jnp.tanh(z @ params["w"] + example[0] @ params["x"])

        def solve(excess: Any, start: jax.Array) -> jax.Array:
            return lax.fori_loop(0, 50, lambda _, z: z - excess(z), start)

        def solve_linear(linear: Any, y: jax.Array) -> jax.Array:
            return jnp.linalg.solve(jax.jacobian(linear)(y), y)

        z = lax.custom_root(excess, jnp.zeros(WIDTH), solve, solve_linear)
        return cross_entropy(dense(params["out"], z), example[1])

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), source.integers(n, CLASSES))


@model
def least_squares_in_a_layer(source: Source) -> Any:
    """A ridge regression on learned features, as in some kinds of meta-learning."""
    params = {"features": source.dense(WIDTH, 3), "log_ridge": jnp.zeros(())}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example
        features = jnp.tanh(dense(params["features"], x))
        seen, new = features[:3], features[3:]
        gram = seen.T @ seen + jnp.exp(params["log_ridge"]) * jnp.eye(3)
        weights = jax.scipy.linalg.solve(gram, seen.T @ y[:3], assume_a="pos")
        return jnp.sum((new @ weights - y[3:]) ** 2)

    return loss_fn, params, lambda n: (source.rows(n, 5, WIDTH), source.rows(n, 5))


@model
def physics_informed_network(source: Source) -> Any:
    """Of the heat equation, with second derivatives."""
    params = [source.dense(2, 8), source.dense(8, 8), source.dense(8, 1)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        point, edge = example

        def heat(point: jax.Array) -> jax.Array:
            x = point
            for layer in params[:-1]:
                x = jnp.tanh(dense(layer, x))
            return dense(params[-1], x)[0]

        change, curvature = jax.grad(heat)(point)[0], jax.hessian(heat)(point)[1, 1]
        start = heat(jnp.array([0.0, 1.0]) * edge) - jnp.sin(edge[1])
        return (change - 0.1 * curvature) ** 2 + start**2

    return loss_fn, params, lambda n: (source.rows(n, 2), source.rows(n, 2))


@model
def hamiltonian_network(source: Source) -> Any:
    params = [source.dense(4, 8), source.dense(8, 1)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def energy(q: jax.Array, p: jax.Array) -> jax.Array:
            return dense(params[1], jnp.tanh(dense(params[0], jnp.concatenate([q, p]))))[0]

        q, p, dq, dp = example
        of_q, of_p = jax.grad(energy, (0, 1))(q, p)
        return jnp.sum((of_p - dq) ** 2) + jnp.sum((of_q + dp) ** 2)

    return loss_fn, params, lambda n: tuple(source.rows(n, 2) for _ in range(4))


@model
def learned_gradient_descent(source: Source) -> Any:
    """A step on the first rows, and a loss on the others, as MAML."""
    params = {"layers": [source.dense(WIDTH, 4), source.dense(4, 1)], "rate": jnp.asarray(0.1)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, y = example

        def error(layers: Any, rows: slice) -> jax.Array:
            hidden = jnp.tanh(dense(layers[0], x[rows]))
            return jnp.mean((dense(layers[1], hidden)[:, 0] - y[rows]) ** 2)

        slopes = jax.grad(error)(params["layers"], slice(3))
        moved = jax.tree.map(lambda w, slope: w - params["rate"] * slope, params["layers"], slopes)
        return error(moved, slice(3, None))

    return loss_fn, params, lambda n: (source.rows(n, 5, WIDTH), source.rows(n, 5))


@model
def splines_on_edges(source: Source) -> Any:
    """As a Kolmogorov-Arnold network."""
    params = {"one": source.weight(WIDTH, 5, 3), "two": source.weight(3, 5, 1)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def layer(x: jax.Array, weights: jax.Array) -> jax.Array:
            hats = jax.nn.relu(1 - jnp.abs(x[:, None] * 2 - jnp.arange(-2, 3)))
            return jnp.einsum("ik,iko->o", hats, weights) + x.sum()

        return (layer(layer(example[0], params["one"]), params["two"])[0] - example[1]) ** 2

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), source.rows(n))


@model
def sinusoidal_representation(source: Source) -> Any:
    """As SIREN, on fixed random frequencies."""
    frequencies = np.random.default_rng(0).normal(size=(2, 4))
    params = [source.dense(8, 6), source.dense(6, 3)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        waves = example[0] @ frequencies
        x = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)])
        return jnp.sum((dense(params[1], jnp.sin(3 * dense(params[0], x))) - example[1]) ** 2)

    return loss_fn, params, lambda n: (source.rows(n, 2), source.rows(n, 3))


@model
def rounded_weights(source: Source) -> Any:
    """Quantized in the forward pass, with a derivative of its own."""
    params = [source.dense(WIDTH, 8), source.dense(8, CLASSES)]

    @jax.custom_jvp
    def rounded(w: jax.Array) -> jax.Array:
        return jnp.round(4 * w) / 4

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))

    def loss_fn(params: Any, example: Any) -> jax.Array:
        first, second = jax.tree.map(rounded, params)
        return cross_entropy(dense(second, jax.nn.relu(dense(first, example[0]))), example[1])

    return loss_fn, params, lambda n: (source.rows(n, WIDTH), source.integers(n, CLASSES))


@model
def reversed_gradient(source: Source) -> Any:
    """Domain-adversarial training, by a `custom_vjp`."""
    params = {name: source.dense(WIDTH, WIDTH) for name in ("features", "label", "domain")}

    @jax.custom_vjp
    def reverse(x: jax.Array) -> jax.Array:
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, slope: (-0.5 * slope,))

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label, domain = example
        features = jnp.tanh(dense(params["features"], x))
        of_domain = cross_entropy(dense(params["domain"], reverse(features)), domain)
        return cross_entropy(dense(params["label"], features), label) + of_domain

    return (
        loss_fn,
        params,
        lambda n: (
            source.rows(n, WIDTH),
            source.integers(n, CLASSES),
            source.integers(n, CLASSES),
        ),
    )
