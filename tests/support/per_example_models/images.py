"""Models of images."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_models.entering import (
    CLASSES,
    Source,
    cross_entropy,
    dense,
    layer_norm,
    model,
)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, **options: Any) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x[None], kernel, (stride, stride), "SAME", dimension_numbers=numbers, **options
    )[0]


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int = 2) -> jax.Array:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return layer_norm(parts, axis=(0, 1, 3)).reshape(x.shape) * scale + bias


@model
def residual_network_with_group_norm(source: Source) -> Any:
    def block() -> Any:
        norm = {"scale": 1.0 + 0.1 * source.weight(4), "bias": source.weight(4)}
        return {"kernel": source.weight(3, 3, 4, 4), "norm": norm}

    params = {
        "stem": source.weight(3, 3, 2, 4),
        "blocks": [block(), block()],
        "skip": source.weight(1, 1, 4, 4),
        "out": source.dense(4, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = conv(example[0], params["stem"])
        for stride, block in zip((1, 2), params["blocks"], strict=True):
            y = jax.nn.relu(group_norm(x, **block["norm"]))
            x = conv(y, block["kernel"], stride) + (
                x if stride == 1 else conv(y, params["skip"], 2)
            )
        return cross_entropy(dense(params["out"], x.mean((0, 1))), example[1])

    return loss_fn, params, source.images


@model
def squeeze_of_channels(source: Source) -> Any:
    """As squeeze-and-excitation."""
    params = {
        "conv": source.weight(3, 3, 2, 4),
        "squeeze": source.dense(4, 2),
        "excite": source.dense(2, 4),
        "out": source.dense(4, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = jax.nn.relu(conv(example[0], params["conv"], 2))
        gate = dense(params["excite"], jax.nn.relu(dense(params["squeeze"], x.mean((0, 1)))))
        x = x * jax.nn.sigmoid(gate)
        return cross_entropy(dense(params["out"], x.max((0, 1))), example[1])

    return loss_fn, params, source.images


@model
def convnext_block(source: Source) -> Any:
    params = {
        "patches": source.weight(2, 2, 2, 4),
        "depthwise": source.weight(3, 3, 1, 4),
        "norm": 1.0 + 0.1 * source.weight(4),
        "up": source.dense(4, 8),
        "down": source.dense(8, 4),
        "scale": 0.5 + 0.1 * source.weight(4),
        "out": source.dense(4, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = conv(example[0], params["patches"], 2)
        y = conv(x, params["depthwise"], feature_group_count=4)
        y = jax.nn.gelu(dense(params["up"], layer_norm(y, params["norm"])))
        x += params["scale"] * dense(params["down"], y)
        return cross_entropy(dense(params["out"], x.mean((0, 1))), example[1])

    return loss_fn, params, source.images


@model
def mixer_of_patches(source: Source) -> Any:
    params = {
        "patches": source.dense(8, 4),
        "places": [source.dense(9, 5), source.dense(5, 9)],
        "channels": [source.dense(4, 6), source.dense(6, 4)],
        "out": source.dense(4, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        def mlp(layers: Any, x: jax.Array) -> jax.Array:
            return dense(layers[1], jax.nn.gelu(dense(layers[0], x)))

        patches = example[0].reshape(3, 2, 3, 2, 2).swapaxes(1, 2).reshape(9, 8)
        x = dense(params["patches"], patches)
        x += mlp(params["places"], layer_norm(x).T).T
        x += mlp(params["channels"], layer_norm(x))
        return cross_entropy(dense(params["out"], x.mean(0)), example[1])

    return loss_fn, params, source.images


@model
def u_net(source: Source) -> Any:
    params = {
        "down": source.weight(3, 3, 2, 4),
        "low": source.weight(3, 3, 4, 4),
        "up": source.weight(2, 2, 4, 4),
        "join": source.weight(3, 3, 8, 2),
        "time": source.dense(4, 4),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        """Of a diffusion model, which says what noise was added."""
        image, noise, time = example
        waves = time * jnp.arange(1.0, 3.0)
        of_time = dense(params["time"], jnp.concatenate([jnp.sin(waves), jnp.cos(waves)]))
        high = jax.nn.silu(
            conv(jnp.sqrt(1 - time) * image + jnp.sqrt(time) * noise, params["down"])
        )
        low = lax.reduce_window(high, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
        low = jax.nn.silu(conv(low, params["low"]) + of_time)
        up = lax.conv_transpose(
            low[None], params["up"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]
        found = conv(jnp.concatenate([up, high], -1), params["join"])
        return jnp.mean((found - noise) ** 2)

    def batch(examples: int) -> Any:
        image, noise = source.rows(examples, 6, 6, 2), source.rows(examples, 6, 6, 2)
        return image, noise, jax.nn.sigmoid(source.rows(examples))

    return loss_fn, params, batch


@model
def vision_transformer(source: Source) -> Any:
    params = {
        "patches": source.weight(3, 3, 2, 4),
        "class": source.weight(1, 4),
        "places": source.weight(5, 4),
        "qkv": source.weight(4, 12),
        "out": source.dense(4, CLASSES),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = conv(example[0], params["patches"], 3).reshape(-1, 4)
        x = jnp.concatenate([params["class"], x]) + params["places"]
        q, k, v = jnp.split(layer_norm(x) @ params["qkv"], 3, -1)
        x += jax.nn.dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return cross_entropy(dense(params["out"], x[0]), example[1])

    return loss_fn, params, source.images


@model
def features_of_an_optical_network(source: Source) -> Any:
    """A filter in the space of frequencies, as in a Fourier neural operator."""
    params = {"filter": source.weight(2, 3, 2, 2, 2), "skip": source.dense(2, 2)}

    def loss_fn(params: Any, image: jax.Array) -> jax.Array:
        low = jnp.fft.rfft2(image, axes=(0, 1))[:3, :2]
        mixed = jnp.einsum("xyi,xyij->xyj", low, params["filter"][0] + 1j * params["filter"][1])
        padded = jnp.zeros((6, 4, 2), mixed.dtype).at[:3, :2].set(mixed)
        y = jnp.fft.irfft2(padded, (6, 6), axes=(0, 1)) + dense(params["skip"], image)
        return jnp.mean((jax.nn.gelu(y) - jnp.flip(image, 0)) ** 2)

    return loss_fn, params, lambda examples: source.rows(examples, 6, 6, 2)


@model
def neural_radiance_field(source: Source) -> Any:
    """The colour of a ray, from samples along it."""
    params = [source.dense(12, 8), source.dense(8, 4)]

    def loss_fn(params: Any, example: Any) -> jax.Array:
        origin, direction, colour = example
        depths = jnp.linspace(0.1, 1.0, 4)
        points = origin + depths[:, None] * direction
        waves = (points[:, None] * 2.0 ** jnp.arange(2)[:, None]).reshape(4, -1)
        hidden = jax.nn.relu(
            dense(params[0], jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], 1))
        )
        out = dense(params[1], hidden)
        opacity = 1 - jnp.exp(-jax.nn.softplus(out[:, 0]) * 0.3)
        through = jnp.concatenate([jnp.ones(1), jnp.cumprod(1 - opacity)[:-1]])
        found = (opacity * through) @ jax.nn.sigmoid(out[:, 1:])
        return jnp.sum((found - colour) ** 2)

    return loss_fn, params, lambda examples: tuple(source.rows(examples, 3) for _ in range(3))
