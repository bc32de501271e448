"""Models of other libraries, where these are installed."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from per_example_models.entering import (
    CLASSES,
    LENGTH,
    TOKENS,
    WIDTH,
    Source,
    cross_entropy,
    model,
)


def library(name: str) -> Any:
    return pytest.importorskip(name, reason="this library is not installed")


def doubled(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def initialized(module: Any, *args: Any) -> Any:
    """Parameters of a Flax or Haiku module, for one example."""
    return doubled(module.init(jax.random.key(0), *args))


@model
def linen_transformer(source: Source) -> Any:
    linen = library("flax.linen")

    class Block(linen.Module):  # type: ignore[misc]
        @linen.compact
        def __call__(self, x: jax.Array, _: Any) -> Any:
            mask = linen.make_causal_mask(x[:, 0])
            y = linen.LayerNorm()(x)
            x = x + linen.MultiHeadDotProductAttention(num_heads=2)(y, mask=mask)
            y = linen.gelu(linen.Dense(8)(linen.LayerNorm()(x)))
            return x + linen.Dense(WIDTH)(y), None

    class Transformer(linen.Module):  # type: ignore[misc]
        @linen.compact
        def __call__(self, text: jax.Array) -> jax.Array:
            embed = linen.Embed(TOKENS, WIDTH)
            blocks = linen.scan(
                linen.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            x, _ = blocks()(embed(text), None)
            return embed.attend(linen.RMSNorm()(x))

    module = Transformer()

    def loss_fn(params: Any, text: jax.Array) -> jax.Array:
        return cross_entropy(module.apply(params, text[:-1]), text[1:])

    return loss_fn, initialized(module, source.texts(1)[0, :-1]), source.texts


@model
def linen_convolutional_network(source: Source) -> Any:
    linen = library("flax.linen")

    class Network(linen.Module):  # type: ignore[misc]
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.relu(linen.GroupNorm(2)(linen.Conv(4, (3, 3))(x)))
            x = linen.avg_pool(x, (2, 2), (2, 2))
            x = linen.ConvTranspose(2, (2, 2), (2, 2))(x) + linen.Conv(2, (1, 1))(x).mean()
            return linen.Dense(CLASSES)(linen.max_pool(x, (3, 3), (3, 3)).reshape(-1))

    module = Network()

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(module.apply(params, example[0]), example[1])

    return loss_fn, initialized(module, source.images(1)[0][0]), source.images


@model
def linen_recurrent_network(source: Source) -> Any:
    linen = library("flax.linen")

    class Network(linen.Module):  # type: ignore[misc]
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.RNN(linen.OptimizedLSTMCell(WIDTH, param_dtype=x.dtype))(x)
            x = linen.Bidirectional(
                *(linen.RNN(linen.GRUCell(3, param_dtype=x.dtype)) for _ in range(2))
            )(x)
            return linen.Dense(CLASSES)(x[-1])

    module = Network()

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(module.apply(params, example[0]), example[1])

    return loss_fn, initialized(module, source.sequences(1)[0][0]), source.sequences


@model
def linen_network_with_dropout(source: Source) -> Any:
    linen = library("flax.linen")

    class Network(linen.Module):  # type: ignore[misc]
        @linen.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = linen.Dropout(0.3, deterministic=not train)(linen.Dense(8)(x))
            x = linen.DenseGeneral((2, CLASSES))(linen.WeightNorm(linen.Dense(4))(linen.relu(x)))
            return x.mean((0, 1))

    module = Network()

    def loss_fn(params: Any, example: Any) -> jax.Array:
        (x, label), key = example
        logits = module.apply(params, x, train=True, rngs={"dropout": key})
        return cross_entropy(logits, label)

    params = doubled(module.init(jax.random.key(0), source.sequences(1)[0][0], train=False))
    return loss_fn, params, lambda n: (source.sequences(n), source.keys(n))


@model
def nnx_transformer(source: Source) -> Any:
    nnx = library("flax.nnx")

    class Block(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any):
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
            self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 8, rngs=rngs)
            self.down = nnx.Linear(8, WIDTH, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attend(self.norms[0](x), mask=nnx.make_causal_mask(x[:, 0]))
            return x + self.down(nnx.gelu(self.up(self.norms[1](x))))

    class Transformer(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any):
            self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])

        def __call__(self, text: jax.Array) -> jax.Array:
            x = self.embed(text)
            for block in self.blocks:
                x = block(x)
            return self.embed.attend(x)

    definition, params = nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params: Any, text: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(definition, params)(text[:-1]), text[1:])

    return loss_fn, doubled(params), source.texts


@model
def nnx_convolutional_network(source: Source) -> Any:
    nnx = library("flax.nnx")

    class Network(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any):
            self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
            self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
            self.norm = nnx.GroupNorm(4, 2, rngs=rngs)
            self.out = nnx.LinearGeneral((3, 3, 4), CLASSES, axis=(-3, -2, -1), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(nnx.relu(self.norm(self.depthwise(self.conv(x)))))

    definition, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(nnx.merge(definition, params)(example[0]), example[1])

    return loss_fn, doubled(params), source.images


@model
def nnx_recurrent_network(source: Source) -> Any:
    nnx = library("flax.nnx")

    class Network(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any):
            self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, 3, rngs=rngs))
            self.out = nnx.Linear(3, CLASSES, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            start = (jnp.zeros(3), jnp.zeros(3))
            return self.out(self.lstm(x, initial_carry=start)[-1])

    definition, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(nnx.merge(definition, params, rest)(example[0]), example[1])

    return loss_fn, doubled(params), source.sequences


@model
def nnx_layers_mapped_and_scanned(source: Source) -> Any:
    """Layers that `nnx.vmap` makes and `nnx.scan` runs."""
    nnx = library("flax.nnx")

    @nnx.split_rngs(splits=3)  # type: ignore[misc]
    @nnx.vmap(in_axes=(0,), out_axes=0)  # type: ignore[misc]
    def make(rngs: Any) -> Any:
        return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)  # type: ignore[misc]
    def run(x: jax.Array, layer: Any) -> jax.Array:
        return x + nnx.tanh(layer(x))

    definition, params = nnx.split(make(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(run(example[0], nnx.merge(definition, params)).mean(0), example[1])

    return loss_fn, doubled(params), source.sequences


@model
def nnx_network_with_dropout(source: Source) -> Any:
    nnx = library("flax.nnx")

    class Network(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any):
            self.one = nnx.LoRALinear(WIDTH, 8, lora_rank=2, rngs=rngs)
            self.dropout = nnx.Dropout(0.3)
            self.two = nnx.Linear(8, CLASSES, rngs=rngs)

        def __call__(self, x: jax.Array, rngs: Any) -> jax.Array:
            return self.two(self.dropout(nnx.relu(self.one(x)), rngs=rngs)).mean(0)

    definition, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        (x, label), key = example
        return cross_entropy(nnx.merge(definition, params)(x, nnx.Rngs(dropout=key)), label)

    return loss_fn, doubled(params), lambda n: (source.sequences(n), source.keys(n))


@model
def equinox_recurrent_network(source: Source) -> Any:
    equinox = library("equinox")
    keys = jax.random.split(jax.random.key(0), 2)
    network = {
        "cell": equinox.nn.GRUCell(WIDTH, 3, key=keys[0]),
        "out": equinox.nn.MLP(3, CLASSES, 4, 1, key=keys[1]),
    }
    params, static = equinox.partition(network, equinox.is_inexact_array)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        network = equinox.combine(params, static)
        step = lambda state, x: (network["cell"](x, state), None)  # noqa: E731
        last, _ = jax.lax.scan(step, jnp.zeros(3), example[0])
        return cross_entropy(network["out"](last), example[1])

    return loss_fn, doubled(params), source.sequences


@model
def equinox_convolutional_network(source: Source) -> Any:
    equinox = library("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    network = equinox.nn.Sequential(
        [
            equinox.nn.Conv2d(2, 4, 3, padding=1, key=keys[0]),
            equinox.nn.Lambda(jax.nn.relu),
            equinox.nn.MaxPool2d(2, 2),
            equinox.nn.Conv2d(4, 4, 2, groups=2, key=keys[1]),
            equinox.nn.Lambda(jnp.ravel),
            equinox.nn.LayerNorm(16),
            equinox.nn.Linear(16, CLASSES, key=keys[2]),
        ]
    )
    params, static = equinox.partition(network, equinox.is_inexact_array)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        image, label = example
        logits = equinox.combine(params, static)(image.transpose(2, 0, 1))
        return cross_entropy(logits, label)

    return loss_fn, doubled(params), source.images


@model
def haiku_transformer(source: Source) -> Any:
    haiku = library("haiku")

    def forward(text: jax.Array) -> jax.Array:
        x = haiku.Embed(TOKENS, WIDTH)(text)
        x += haiku.get_parameter(
            "places", (LENGTH, WIDTH), x.dtype, haiku.initializers.RandomNormal()
        )
        scale = haiku.initializers.VarianceScaling()
        y = haiku.LayerNorm(-1, True, True)(x)
        x += haiku.MultiHeadAttention(2, 3, w_init=scale, model_size=WIDTH)(y, y, y)
        return haiku.nets.MLP([8, TOKENS])(x)

    module = haiku.without_apply_rng(haiku.transform(forward))

    def loss_fn(params: Any, text: jax.Array) -> jax.Array:
        return cross_entropy(module.apply(params, text[:-1]), text[1:])

    return loss_fn, initialized(module, source.texts(1)[0, :-1]), source.texts


@model
def haiku_network_of_stacked_layers(source: Source) -> Any:
    haiku = library("haiku")

    def layer(x: jax.Array) -> jax.Array:
        return x + jnp.tanh(haiku.Linear(WIDTH)(x))

    def forward(x: jax.Array) -> jax.Array:
        x = haiku.layer_stack(2)(layer)(x)
        cell = haiku.VanillaRNN(WIDTH)
        x, _ = haiku.dynamic_unroll(cell, x, cell.initial_state(None))
        return haiku.Linear(CLASSES)(haiku.Conv1D(3, 2)(x).mean(0))

    module = haiku.without_apply_rng(haiku.transform(forward))

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return cross_entropy(module.apply(params, example[0]), example[1])

    return loss_fn, initialized(module, source.sequences(1)[0][0]), source.sequences
