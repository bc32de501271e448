"""What counts as a unit: rules `(path, leaf) -> axes` for `unit_axis`."""

from typing import Any

import jax.numpy as jnp

from clipax._core import _mapped
from clipax._core._typing import Axes


def output_last(path: str, leaf: Any) -> Axes:
    """Units along the last axis, as Flax and Haiku lay out kernels; vectors are one."""
    del path
    return None if jnp.ndim(leaf) <= 1 else -1


def output_first(path: str, leaf: Any) -> Axes:
    """Units along the first axis, as torch lays out weights (timm); vectors are one."""
    del path
    return None if jnp.ndim(leaf) <= 1 else 0


def nfnets(path: str, leaf: Any) -> Axes:
    """The units of NFNets and optax: a matrix's columns, a kernel's output channels.

    With one axis longer than one, or none, the leaf is one unit. Rank 3 is read as
    attention: all but the first axis count units. Rank 4 and above: the last axis does.

    Raises:
      ValueError: The leaf may be a shard, and its shape does not tell that of the whole.
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
    """Each leaf is one unit, as in Dreamer's adaptive clipping."""
    del path, leaf
    return None
