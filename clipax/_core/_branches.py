"""Branches that a whole ensemble takes together, where one of its members needs them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from clipax._core._typing import Array


def where_any(where: Array, if_any: Callable[[], Any], if_none: Callable[[], Any]) -> Any:
    """The result of the first function if the condition holds anywhere, else of the second."""
    is_needed = _in_any(jnp.any(where))
    if isinstance(is_needed, jax.core.Tracer):
        return jax.lax.cond(is_needed, if_any, if_none)
    # Outside of a program, each new condition would be compiled.
    return (if_any if is_needed else if_none)()


# Under `vmap`, a condition that differs between members would become a selection, and both of its
# branches would be computed. So one answer serves all members.
@custom_vmap
def _in_any(is_needed: Array) -> Array:
    return is_needed


@_in_any.def_vmap
def _in_any_member(axis_size: int, is_batched: Any, is_needed: Array) -> tuple[Array, bool]:
    del axis_size, is_batched
    return _in_any(jnp.any(is_needed, axis=0)), False
