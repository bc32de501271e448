"""Rules `(path, leaf) -> axes` for `unit_axis`, which say what counts as a unit."""

from typing import Any

import jax.numpy as jnp

from clipax._core import _mapped
from clipax._core._typing import Axes


def output_last(path: str, leaf: Any) -> Axes:
    """Counts units along the last axis, as in kernels of Flax and Haiku.

    Args:
      path: The path of the leaf, such as "encoder/kernel"; not used.
      leaf: An array of any shape.

    Returns:
      -1; None for a vector or a scalar, which is one unit.

    Example:
      >>> output_last("kernel", jnp.ones((3, 5)))
      -1
    """
    del path
    return None if jnp.ndim(leaf) <= 1 else -1


def output_first(path: str, leaf: Any) -> Axes:
    """Counts units along the first axis, as in weights of torch and timm.

    Args:
      path: The path of the leaf, such as "encoder/weight"; not used.
      leaf: An array of any shape.

    Returns:
      0; None for a vector or a scalar, which is one unit.

    Example:
      >>> output_first("weight", jnp.ones((3, 5)))
      0
    """
    del path
    return None if jnp.ndim(leaf) <= 1 else 0


def nfnets(path: str, leaf: Any) -> Axes:
    """Counts units as NFNets and optax do: matrix columns and output channels.

    Args:
      path: The path of the leaf, which errors name.
      leaf: An array of any shape.

    Returns:
      -1; `(1, 2)` for a leaf of rank 3, which is read as attention; None for a leaf with at most
      one axis longer than one, which is one unit.

    Raises:
      ValueError: The leaf may be a shard whose shape does not show that of the whole leaf.

    Example:
      >>> nfnets("conv", jnp.ones((3, 3, 8, 16))), nfnets("scale", jnp.ones((1, 1, 1, 16)))
      (-1, None)
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
    """Makes each leaf one unit, as in Dreamer's adaptive clipping.

    Args:
      path: The path of the leaf; not used.
      leaf: An array of any shape; not used.

    Returns:
      None.

    Example:
      >>> whole_leaf("kernel", jnp.ones((3, 5)))
    """
    del path, leaf
    return None
