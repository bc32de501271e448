"""The weighted sums of gradients, over all examples."""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example._factors import weighted_product
from clipax.per_example._gradients import LeafGradients

Weights: TypeAlias = tuple[Array, Array]
"""The weight of each example as a product, because one float cannot hold a very small one."""


@functools.partial(jax.jit, static_argnames="dtype")
def weighted_sum(
    leaf: LeafGradients, weights: Weights, is_left_out: Array | None, dtype: Any
) -> Array:
    """The weighted sum of one leaf's gradients, in the width of norms.

    An example that is left out can be NaN, so a weight of zero would not be enough. `dtype` is
    that of the result: products in bfloat16 are exact enough only for a result in bfloat16.
    """
    kind = leaf.kind
    wide = _leaves.widened_dtype(kind.dtype)

    def without(array: Array) -> Array:
        if is_left_out is None:
            return array
        return jnp.where(is_left_out.reshape(-1, *[1] * (array.ndim - 1)), 0, array)

    first, second = (weight.astype(wide) for weight in weights)
    total = _compat.varying_like(jnp.zeros(kind.shape, wide), second)
    if leaf.each is not None:
        each = without(leaf.each).astype(wide)
        each *= first.reshape(-1, *[1] * (each.ndim - 1))
        total += jnp.tensordot(second, each, 1)
    for parts in leaf.products:
        lhs = parts.lhs if parts.is_one_hot else without(parts.lhs)
        parts = parts.with_arrays(lhs, without(parts.rhs))
        if parts.rhs.dtype == jnp.bfloat16 != dtype:
            parts = parts.widened(wide)
        total += parts.assembly.assembled(weighted_product(parts, weights)).astype(wide)
    if leaf.constant is not None:
        constant = leaf.constant.astype(wide)
        if is_left_out is not None:
            constant = jnp.where(jnp.all(is_left_out), 0, constant)
        # A large constant gives every example a small weight, so the sum could underflow.
        largest = jnp.max(first)
        total += jnp.sum(first / largest * second) * (largest * constant)
    for box, part in zip(kind.boxes, leaf.parts, strict=True):
        total = box.replaced(total, weighted_sum(part, weights, is_left_out, dtype))
    return total
