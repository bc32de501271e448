"""The types in signatures."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import optax

Array: TypeAlias = jax.Array
Updates: TypeAlias = Any
"""A pytree of arrays: gradients, or whatever an optimizer makes of them."""

Norms: TypeAlias = Any
"""A tree prefix of the updates; each leaf broadcasts against what it measures."""

Norm: TypeAlias = Callable[..., Norms]
"""`(updates) -> norms`; it must take `axis_name=` too to work in `pmap`."""

Coefficient: TypeAlias = Callable[[Array, Array], Array]
"""`(norm, max_norm) -> factor`, element by element: in [0, 1] where it clips."""

Bound: TypeAlias = jax.typing.ArrayLike | optax.Schedule | Any
"""A number, a scalar array, a schedule `count -> value`, or a tree prefix of them."""

Axes: TypeAlias = int | tuple[int, ...] | None
LeafRule: TypeAlias = Any
"""One value for every leaf, a tree prefix of values, or `(path, leaf) -> value`."""

AxisName: TypeAlias = Hashable | Sequence[Hashable] | Any
"""Names of mapped mesh axes: one, several, or a tree prefix of them."""
