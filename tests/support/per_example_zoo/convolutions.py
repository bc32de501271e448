"""Models with convolutions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from per_example_zoo.models import EACH, GRAM, OUTER, Source, cross_entropy, mean_square, model


def convolution(
    source: Source,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    layout: tuple[str, str, str],
    padding: Any,
    **options: Any,
) -> Any:
    spatial = iter(size)
    channels = kernel[layout[1].index("I")] * options.get("feature_group_count", 1)
    shape = [
        1 if axis == "N" else channels if axis == "C" else next(spatial) for axis in layout[0]
    ]
    strides = options.pop("window_strides", (1,) * len(size))

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x, params["kernel"], strides, padding, dimension_numbers=layout, **options
        )
        return mean_square(jnp.tanh(y)) + mean_square(jnp.cos(y))

    return loss_fn, {"kernel": source.weight(*kernel)}, source.batch(*shape)


NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
NWC = ("NWC", "WIO", "NWC")


@model(is_rare=True, kernel=GRAM)
def conv_of_few_places(source: Source) -> Any:
    return convolution(source, (3, 3, 6, 8), (4, 4), NHWC, "VALID")


@model(is_rare=True, kernel=EACH)
def conv_of_many_places(source: Source) -> Any:
    return convolution(source, (3, 3, 2, 3), (8, 8), NHWC, "SAME")


@model(kernel=GRAM)
def conv_strided(source: Source) -> Any:
    options = {"window_strides": (2, 3)}
    return convolution(source, (3, 2, 8, 10), (5, 6), NHWC, "SAME", **options)


@model(is_rare=True, kernel=GRAM)
def conv_channels_first(source: Source) -> Any:
    padding = [(2, 0), (1, 3)]
    options = {"window_strides": (3, 2)}
    return convolution(source, (12, 8, 3, 3), (5, 4), NCHW, padding, **options)


@model(is_rare=True, kernel=GRAM)
def conv_dilated(source: Source) -> Any:
    return convolution(source, (3, 8, 8), (9,), NWC, "VALID", rhs_dilation=(3,))


@model(is_rare=True, kernel=GRAM)
def conv_transposed(source: Source) -> Any:
    return convolution(source, (3, 8, 8), (3,), NWC, [(1, 1)], lhs_dilation=(2,))


@model(is_rare=True)
def conv_groups(source: Source) -> Any:
    return convolution(source, (3, 3, 2, 8), (5, 5), NHWC, "SAME", feature_group_count=4)


@model()
def conv_depthwise(source: Source) -> Any:
    return convolution(source, (3, 3, 1, 6), (4, 5), NHWC, "SAME", feature_group_count=6)


@model(is_rare=True)
def conv_large_window(source: Source) -> Any:
    return convolution(source, (12, 12, 1, 2), (13, 12), NHWC, "VALID")


@model(kernel=OUTER)
def conv_of_one_place(source: Source) -> Any:
    return convolution(source, (3, 3, 2, 4), (3, 3), NHWC, "VALID")


@model(first=EACH, head=OUTER)
def small_conv_net(source: Source) -> Any:
    params = {
        "first": source.weight(3, 3, 1, 4),
        "second": source.weight(3, 3, 4, 8),
        "scale": jnp.ones(8),
        "bias": source.weight(8),
        "head": source.weight(8, 3),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x, label = example
        conv = functools.partial(lax.conv_general_dilated, padding="SAME", dimension_numbers=NHWC)
        x = jax.nn.relu(conv(x[None], params["first"], (1, 1)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = conv(x, params["second"], (2, 2)).reshape(-1, 4, 2)
        # A group norm of four groups.
        x = x - x.mean((0, 2), keepdims=True)
        x = (x * lax.rsqrt(jnp.mean(x * x, (0, 2), keepdims=True) + 1e-5)).reshape(-1, 8)
        x = jax.nn.relu(x * params["scale"][None] + params["bias"][None])
        return cross_entropy(x.mean(0) @ params["head"], label)

    return loss_fn, params, (source.batch(8, 8, 1), source.tokens(0, 3))
