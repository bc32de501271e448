"""What differs between the versions of JAX, each with the version it belongs to."""

from collections.abc import Hashable
from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[Hashable]:
    """The manual mesh axes over which `x` varies, as far as its type says."""
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):  # jax >= 0.10
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))  # jax < 0.10


def is_typed(axis: Hashable) -> bool:
    """Whether types say what varies over `axis`: not in `pmap`, nor with the check off."""
    return axis in varying_axes(jax.lax.axis_index(axis))


def untyped_axes() -> tuple[Hashable, ...]:
    """The manual axes around us of which the types say nothing."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if not is_typed(axis))
