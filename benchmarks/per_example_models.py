"""The models whose examples are clipped: a loss for one example, parameters, and a batch."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any
Example = tuple[jax.Array, jax.Array]


class Model(NamedTuple):
    name: str
    loss_fn: Callable[[Params, Example], jax.Array]
    params: Params
    batch: Example

    @property
    def examples(self) -> int:
        return len(self.batch[1])

    def __str__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        numbers = sum(leaf.size for leaf in leaves) / 1e6
        return f"{self.name}, {len(leaves)} leaves, {numbers:.3g} million, batch {self.examples}"


def mlp(is_quick: bool) -> Model:
    widths, examples = ((12, 16, 10), 8) if is_quick else ((784, 1024, 1024, 1024, 10), 256)
    draw = _Draw()
    params = [
        {"kernel": draw(rows, columns), "bias": jnp.zeros(columns)}
        for rows, columns in itertools.pairwise(widths)
    ]

    def loss_fn(params: Params, example: Example) -> jax.Array:
        hidden, label = example
        for layer in params[:-1]:
            hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
        return _cross_entropy(hidden @ params[-1]["kernel"] + params[-1]["bias"], label)

    batch = draw(examples, widths[0], scale=1.0), draw.integers(10, examples)
    return Model(f"MLP {'-'.join(map(str, widths))}", loss_fn, params, batch)


class _Sizes(NamedTuple):
    layers: int
    width: int
    heads: int
    length: int
    words: int
    examples: int


def transformer(is_quick: bool) -> Model:
    """Decoder blocks, normalised before; the output has weights of its own."""
    return _transformer(
        _Sizes(1, 16, 2, 8, 32, 4) if is_quick else _Sizes(6, 512, 8, 128, 8192, 16)
    )


def decoder(is_quick: bool) -> Model:
    """The same of more layers that are smaller, scanned and rematerialised."""
    sizes = _Sizes(2, 16, 2, 8, 32, 4) if is_quick else _Sizes(12, 256, 4, 128, 1024, 8)
    return _transformer(sizes, is_scanned=True)


def _transformer(of: _Sizes, is_scanned: bool = False) -> Model:
    draw, width = _Draw(), of.width

    def norm() -> Params:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def dense(rows: int, columns: int) -> Params:
        return {"kernel": draw(rows, columns), "bias": jnp.zeros(columns)}

    params = {
        "embedding": draw(of.words, width, scale=0.02),
        "positions": draw(of.length, width, scale=0.02),
        "blocks": [
            {
                "norm_1": norm(),
                "qkv": dense(width, 3 * width),
                "out": dense(width, width),
                "norm_2": norm(),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width),
            }
            for _ in range(of.layers)
        ],
        "norm": norm(),
        "head": draw(width, of.words),
    }

    if is_scanned:
        params["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])

    def layer(stream: jax.Array, block: Params) -> jax.Array:
        stream += _attention(block, _layer_norm(block["norm_1"], stream), of.heads)
        hidden = jax.nn.gelu(_dense(block["up"], _layer_norm(block["norm_2"], stream)))
        return stream + _dense(block["down"], hidden)

    def step(stream: jax.Array, block: Params) -> tuple[jax.Array, None]:
        return jax.checkpoint(layer)(stream, block), None

    def loss_fn(params: Params, example: Example) -> jax.Array:
        words, following = example
        stream = params["embedding"][words] + params["positions"]
        if is_scanned:
            stream, _ = jax.lax.scan(step, stream, params["blocks"])
        else:
            for block in params["blocks"]:
                stream = layer(stream, block)
        logits = _layer_norm(params["norm"], stream) @ params["head"]
        return _cross_entropy(logits, following).mean()

    text = draw.integers(of.words, of.examples, of.length + 1)
    kind = "scanned, rematerialised" if is_scanned else "transformer"
    name = f"{of.layers} {kind} layers, d {width}, T {of.length}, vocabulary {of.words}"
    return Model(name, loss_fn, params, (text[:, :-1], text[:, 1:]))


def _attention(block: Params, stream: jax.Array, heads: int) -> jax.Array:
    length, width = stream.shape
    qkv = _dense(block["qkv"], stream).reshape(length, 3, heads, width // heads)
    queries, keys, values = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    scores = jnp.einsum("thd,shd->hts", queries, keys) / (width // heads) ** 0.5
    is_past = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(is_past, scores, -jnp.inf))
    return _dense(block["out"], jnp.einsum("hts,shd->thd", weights, values).reshape(stream.shape))


def resnet(is_quick: bool) -> Model:
    """A convolution, and blocks of two with a group norm before each and a way around."""
    widths, side, examples = ((8, 16), 8, 4) if is_quick else ((32, 32, 64, 128), 32, 32)
    draw = _Draw()

    def conv(size: int, inputs: int, outputs: int) -> jax.Array:
        return draw(size, size, inputs, outputs, scale=(2 / (size * size * inputs)) ** 0.5)

    def norm(channels: int) -> Params:
        return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}

    def block(inputs: int, outputs: int) -> Params:
        convs = {"conv_1": conv(3, inputs, outputs), "conv_2": conv(3, outputs, outputs)}
        around = {} if inputs == outputs else {"around": conv(1, inputs, outputs)}
        return {"norm_1": norm(inputs), "norm_2": norm(outputs)} | convs | around

    params = {
        "first": conv(3, 3, widths[0]),
        "blocks": [block(*each) for each in itertools.pairwise(widths)],
        "norm": norm(widths[-1]),
        "head": {"kernel": draw(widths[-1], 10), "bias": jnp.zeros(10)},
    }

    def loss_fn(params: Params, example: Example) -> jax.Array:
        image, label = example
        image = _conv(params["first"], image, 1)
        for each in params["blocks"]:
            stride = 2 if "around" in each else 1
            hidden = jax.nn.relu(_group_norm(each["norm_1"], image))
            around = _conv(each["around"], hidden, stride) if "around" in each else image
            hidden = _conv(each["conv_1"], hidden, stride)
            hidden = jax.nn.relu(_group_norm(each["norm_2"], hidden))
            image = around + _conv(each["conv_2"], hidden, 1)
        features = jax.nn.relu(_group_norm(params["norm"], image)).mean((0, 1))
        return _cross_entropy(_dense(params["head"], features), label)

    batch = draw(examples, side, side, 3, scale=1.0), draw.integers(10, examples)
    convolutions = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(params))
    name = f"ResNet of {convolutions} convolutions, {side}x{side}x3"
    return Model(name, loss_fn, params, batch)


def _conv(kernel: jax.Array, image: jax.Array, stride: int) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        image[None], kernel, strides, "SAME", dimension_numbers=layout
    )[0]


def _group_norm(norm: Params, image: jax.Array, groups: int = 8) -> jax.Array:
    grouped = image.reshape(*image.shape[:2], groups, -1)
    made = _standardized(grouped, (0, 1, 3)).reshape(image.shape)
    return made * norm["scale"] + norm["bias"]


def _layer_norm(norm: Params, stream: jax.Array) -> jax.Array:
    return _standardized(stream, (-1,)) * norm["scale"] + norm["bias"]


def _standardized(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    centred = array - array.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-5)


def _dense(layer: Params, inputs: jax.Array) -> jax.Array:
    return inputs @ layer["kernel"] + layer["bias"]


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


class _Draw:
    """Normal numbers, by default of the size of weights, and integers."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, *shape: int, scale: float | None = None) -> jax.Array:
        scale = shape[0] ** -0.5 if scale is None else scale
        return jnp.array(scale * self._rng.standard_normal(shape), jnp.float32)

    def integers(self, bound: int, *shape: int) -> jax.Array:
        return jnp.array(self._rng.integers(0, bound, shape), jnp.int32)


MODELS = {"mlp": mlp, "transformer": transformer, "decoder": decoder, "resnet": resnet}
