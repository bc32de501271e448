"""Rules `(path, leaf) -> axes` for `unit_axis`, which say what counts as a unit."""

from typing import Any

import jax.numpy as jnp

from clipax._core import _mapped
from clipax._core._typing import Axes


def output_last(path: str, leaf: Any) -> Axes:
    """Counts units along the last axis, as in kernels of Flax and Haiku.

    A vector is one unit.
    """
    del path
    return None if jnp.ndim(leaf) <= 1 else -1


def output_first(path: str, leaf: Any) -> Axes:
    """Counts units along the first axis, as in weights of torch and timm.

    A vector is one unit.
    """
    del path
    return None if jnp.ndim(leaf) <= 1 else 0


def nfnets(path: str, leaf: Any) -> Axes:
    """Counts units as NFNets and optax do: matrix columns and output channels.

    A leaf with at most one axis longer than one is one unit. A leaf of rank 3 is read as
    attention, where all axes but the first count units. From rank 4 on, the last axis does.

    Raises:
      ValueError: The leaf may be a shard whose shape does not show that of the whole leaf.
    """
    shape = jnp.shape(leaf)
    if sum(size != 1 for size in shape) <= 1:
        axes = _mapped.may_divide(leaf)
        if len(shape) > 1 and axes:
            raise ValueError(
                f"The leaf {path!r} may be sharded over {axes}, and the shape {shape} of a shard"
                " does not show whether the whole leaf is one unit. Pass unit_axis= for it."
            )
        return None
    return (1, 2) if len(shape) == 3 else -1


def whole_leaf(path: str, leaf: Any) -> Axes:
    """Makes each leaf one unit, as in Dreamer's adaptive clipping."""
    del path, leaf
    return None
