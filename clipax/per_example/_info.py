"""The record of what happened to each example."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from clipax._core._typing import Array, Norms


class PerExampleInfo(NamedTuple):
    """What happened to each example.

    With `num_users`, `norms`, `coefficients`, `is_counted` and `clip_fraction` are of users.
    """

    losses: Array
    """The loss of each example, before clipping."""
    norms: Norms
    """The norm of each example's gradient; with a tree of bounds, a tree of them."""
    coefficients: Norms
    """What each gradient was multiplied by, in the structure of `norms`; 0 if left out."""
    is_counted: Array
    """Which examples are in the sum: neither masked out nor skipped."""
    clip_fraction: Norms
    """The share of the counted examples whose norm is above the bound."""
    max_norm: Norms
    """The bound, in the structure of `norms`."""
    aux: Any
    """What `loss_fn` returned besides the loss, stacked; None without `has_aux`."""


class OfExamples(NamedTuple):
    """The fields of `PerExampleInfo` that have the examples, or users, along their first axis."""

    losses: Array
    norms: Norms
    coefficients: Norms
    is_counted: Array
    aux: Any


class OfBatch(NamedTuple):
    """The fields of `PerExampleInfo` with one value for all examples."""

    clip_fraction: Norms
    max_norm: Norms


def number_counted(is_counted: Array, dtype: Any) -> Array:
    """The number of counted examples, or one if there are none."""
    return jnp.maximum(jnp.sum(is_counted), 1).astype(dtype)


def share_of_counted(is_counted: Array, holds: Array) -> Array:
    """The share of the counted examples for which something holds."""
    number = jnp.sum(holds & is_counted)
    return number.astype(jnp.float32) / number_counted(is_counted, jnp.float32)
