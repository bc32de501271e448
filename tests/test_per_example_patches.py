"""Kernels of convolutions whose windows do not overlap, as in a model of patches."""

from typing import Any

import jax
import jax.numpy as jnp
import per_example_oracle as oracle
import per_example_zoo as zoo
import pytest
import trees
from jax import lax
from per_example_programs import normal

import clipax

NHWC, NCHW, NWC = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NWC", "WIO", "NWC")
# The image, the kernel, the strides, the padding, the layout, other options, and what is printed.
CASES: dict[str, tuple[Any, ...]] = {
    "patches": ((1, 8, 12, 3), (4, 4, 3, 20), (4, 4), "VALID", NHWC, {}, "6 x 6"),
    "large patches": ((1, 32, 16, 2), (16, 16, 2, 8), (16, 16), "VALID", NHWC, {}, "2 x 2"),
    "what is left over": ((1, 9, 11, 3), (4, 4, 3, 20), (4, 4), "VALID", NHWC, {}, "4 x 4"),
    "gaps": ((1, 11, 12, 3), (3, 2, 3, 20), (4, 5), "VALID", NHWC, {}, "9 x 9"),
    "padding": ((1, 9, 9, 3), (4, 3, 3, 20), (4, 3), [(2, 1), (0, 3)], NHWC, {}, "12 x 12"),
    "negative padding": (
        (1, 11, 9, 3),
        (4, 4, 3, 20),
        (4, 4),
        [(-2, 1), (-1, 0)],
        NHWC,
        {},
        "4 x 4",
    ),
    "channels first": ((1, 3, 8, 8), (20, 3, 4, 4), (4, 4), "SAME", NCHW, {}, "4 x 4"),
    "sequence": ((1, 12, 4), (4, 4, 20), (4,), "VALID", NWC, {}, "3 x 3"),
    "several images": ((2, 12, 8), (4, 8, 20), (4,), "VALID", NWC, {}, "6 x 6"),
    "apart on one axis": ((1, 8, 6, 8), (4, 3, 8, 20), (4, 1), "VALID", NHWC, {}, "8 x 8"),
    "spread image": (
        (1, 6, 8),
        (4, 8, 20),
        (4,),
        [(0, 0)],
        NWC,
        {"lhs_dilation": (2,)},
        "2 x 2",
    ),
    "spread kernel": (
        (1, 20, 8),
        (3, 8, 20),
        (6,),
        "VALID",
        NWC,
        {"rhs_dilation": (2,)},
        "3 x 3",
    ),
}
COMMON = {"large patches", "what is left over"}


def loss_of(name: str) -> Any:
    _, _, strides, padding, layout, options, _ = CASES[name]

    def loss_fn(kernel: jax.Array, image: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            image, kernel, strides, padding, dimension_numbers=layout, **options
        )
        return zoo.mean_square(jnp.tanh(y))

    return loss_fn


def arguments(name: str) -> Any:
    image, kernel, *_ = CASES[name]
    return normal(*kernel) / 4, normal(4, *image, seed=1)


@pytest.mark.parametrize("name", trees.mostly_slow(CASES, COMMON))
def test_gradients_of_kernels_equal_those_made_one_by_one(name: str) -> None:
    kernel, images = arguments(name)
    with trees.double_precision(True):
        kernel, images = kernel.astype(jnp.float64), images.astype(jnp.float64)
        oracle.assert_the_same(loss_of(name), kernel, images)


@pytest.mark.parametrize("name", CASES)
def test_the_way_of_patches_is_printed(name: str) -> None:
    assert CASES[name][-1] in zoo.explanation(loss_of(name), *arguments(name))


def test_no_kernel_of_large_patches_is_made_for_each_example() -> None:
    kernel, image = jnp.zeros((16, 16, 3, 32)), jnp.zeros((16, 1, 32, 32, 3))
    compiled = jax.jit(clipax.clipped_grad(loss_of("large patches"), 1.0)).lower(kernel, image)
    temporary = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporary < len(image) * kernel.nbytes / 2
