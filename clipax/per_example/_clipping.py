"""Clips measured gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves, _paths
from clipax._core._scaling import in_two
from clipax._core._typing import Array, Coefficient
from clipax.per_example import _mapped
from clipax.per_example._again import Group, weighted_sums
from clipax.per_example._calls import Call
from clipax.per_example._info import OfExamples
from clipax.per_example._measured import Measured, measure, traced
from clipax.per_example._memory import Memory, second_pass
from clipax.per_example._sums import Weights, weighted_sum


class Options(NamedTuple):
    """The options of `clipped_grad`."""

    coefficient: Coefficient
    mean: bool
    normalize_by: jax.typing.ArrayLike | None
    dtype: Any
    num_users: int | None
    user_mean: bool
    skip_nonfinite: bool
    microbatch_size: int | None
    memory: Memory = "kept"

    def dtype_of(self, leaf: Any) -> Any:
        """The dtype of the gradient of a parameter."""
        if self.dtype is not None:
            return np.result_type(self.dtype, np.complex64) if _is_complex(leaf) else self.dtype
        is_mean = self.mean and self.normalize_by is None
        # Noise is added to a sum, and rounding the sum first would undo the bound of each example.
        return leaf.dtype if is_mean else _leaves.widened_dtype(leaf.dtype)


def clip(call: Call, mask: Array | None, bound: Any, options: Options) -> tuple[Any, OfExamples]:
    """The sums of the clipped gradients, in the width of norms, with a record of each example."""
    known = traced(call)
    gradients = jax.tree.leaves(known.program.gradient)
    widens = any(options.dtype_of(leaf).itemsize > leaf.dtype.itemsize for leaf in gradients)
    bounds = len(jax.tree.leaves(bound))
    again = second_pass(options.memory, call, known, bounds, widens=widens)
    measured = measure(call, known, again is not None, mask)
    return clip_measured(again or call, measured, mask, bound, options)


def clip_measured(
    call: Call, measured: Measured, mask: Array | None, bound: Any, options: Options
) -> tuple[Any, OfExamples]:
    """The same for gradients that are measured."""
    _mapped.refuse_different_weights(measured.shards, mask=mask, max_norm=bound)
    values, structure = jax.tree.flatten(bound)
    covered = _paths.covered(bound, measured.gradient, name="max_norm")
    norms = [measured.norms_over(places) for places in covered]
    is_counted = jnp.ones(measured.leaf_norms[0].shape, bool) if mask is None else mask
    if options.skip_nonfinite:
        is_counted = jnp.all(jnp.stack([is_counted, *map(jnp.isfinite, norms)]), 0)
    weights, coefficients = _weighed(norms, values, is_counted, options.coefficient)
    is_left_out = None if mask is None and not options.skip_nonfinite else ~is_counted
    if measured.leaves is None:
        sums = weighted_sums(call, list(map(Group, covered, norms, weights)), is_left_out)
    else:
        of_leaves = {
            place: pair for places, pair in zip(covered, weights, strict=True) for place in places
        }
        rows = zip(measured.leaves, jax.tree.leaves(measured.gradient), strict=True)
        sums = [
            weighted_sum(leaf, of_leaves[place], is_left_out, options.dtype_of(gradient))
            for place, (leaf, gradient) in enumerate(rows)
        ]
    like_bound = functools.partial(jax.tree.unflatten, structure)
    return jax.tree.unflatten(jax.tree.structure(measured.gradient), sums), OfExamples(
        losses=measured.losses,
        norms=like_bound(norms),
        coefficients=like_bound(coefficients),
        is_counted=is_counted,
        aux=measured.aux,
    )


def _weighed(
    norms: list[Array], values: list[Any], is_counted: Array, coefficient: Coefficient
) -> tuple[list[Weights], list[Array]]:
    """The weights and coefficients under each bound. They are zero for uncounted examples."""
    rows = zip(norms, values, strict=True)
    bounds = [jnp.broadcast_to(as_bound(value, norm), norm.shape) for norm, value in rows]
    pair = in_two(coefficient, norms, bounds)
    second = [jnp.where(is_counted, each, 0) for each in pair.second]
    coefficients = pair._replace(second=second).product
    return list(zip(pair.first, second, strict=True)), coefficients


def _is_complex(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, np.complexfloating)


def as_bound(value: Any, norms: Array) -> Array:
    """A bound in the dtype of the norms that it applies to."""
    return jnp.asarray(value).astype(norms.dtype)
