"""Reading a leaf as a matrix or a stack of matrices."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from clipax._core import _compat, _leaves, _mapped, _rules
from clipax._core._powers import root
from clipax._core._typing import Array, Axes, AxisName, LeafRule, Updates
from clipax.units import output_last

# JAX gives `PartitionSpec` no types.
_spec: Callable[..., PartitionSpec] = PartitionSpec


class MatrixView(NamedTuple):
    """The axes of a leaf that count its matrices, rows and columns."""

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def matrices(self, leaf: Any) -> Array:
        """The matrices in the dtype of norms, transposed if they have fewer rows than columns."""
        whole = _leaves.widened(_whole(jnp.asarray(leaf), self.stack))
        x = jnp.transpose(whole, self.stack + self.rows + self.columns)
        x = x.reshape(*x.shape[: len(self.stack)], -1, _size(whole, self.columns))
        return jnp.swapaxes(x, -2, -1) if _is_less(x.shape[-2], x.shape[-1]) else x

    def leaf(self, x: Array, like: Any) -> Array:
        """Undoes `matrices`."""
        like, order = jnp.asarray(like), self.stack + self.rows + self.columns
        if _is_less(_size(like, self.rows), _size(like, self.columns)):
            x = jnp.swapaxes(x, -2, -1)
        x = x.reshape([like.shape[axis] for axis in order])
        return _sharded_as(
            jnp.transpose(x, [order.index(axis) for axis in range(len(order))]).astype(like.dtype),
            like,
        )

    def as_norm(self, values: Array) -> Array:
        """Brings one value per matrix into the shape of the leaf's norms."""
        return jnp.expand_dims(values, self.rows + self.columns) if self.stack else values

    def per_matrix(self, norms: Array) -> Array:
        """Undoes `as_norm`."""
        return jnp.squeeze(norms, self.rows + self.columns) if self.stack else norms

    def length(self, x: Array) -> Array:
        """The root of the sum of squares of each matrix, in the shape of the leaf's norms."""
        axes = self.rows + self.columns
        return root(jnp.sum(_leaves.squared_modulus(x), axes, keepdims=bool(self.stack)), 2)


def matrix_views(
    updates: Updates,
    wanted: list[bool],
    unit_axis: LeafRule,
    stack_axis: LeafRule,
    axis_name: AxisName,
) -> dict[int, MatrixView]:
    """The views of all leaves that hold matrices, by their position in `jax.tree.leaves`."""
    rule = output_last if unit_axis is None else unit_axis
    columns = zip(
        jax.tree.leaves(updates),
        wanted,
        _rules.per_leaf(updates, unit_axis=rule),
        _rules.per_leaf(updates, stack_axis=stack_axis),
        _rules.per_leaf(updates, axis_name=axis_name),
        strict=True,
    )
    views = {}
    for row, (leaf, is_wanted, unit, stack, name) in enumerate(columns):
        view = _view(leaf, unit, stack) if is_wanted else None
        if view is None or jnp.size(leaf) == 0:
            continue
        # Checked before the size, because a shard of a matrix can be a single row.
        _require_whole(leaf, name)
        sizes = [_size(leaf, axes) for axes in (view.rows, view.columns)]
        if not any(_leaves.is_known(size) and size == 1 for size in sizes):
            views[row] = view
    return views


def _view(leaf: Any, unit: Axes, stack: Axes) -> MatrixView | None:
    """The view of a leaf, or None if the leaf is a vector or `unit_axis` makes it one."""
    if unit is None or jnp.ndim(leaf) <= 1:
        return None
    layers = () if stack is None else _rules.axis_tuple(leaf, stack_axis=stack)
    columns = _rules.axis_tuple(leaf, unit_axis=unit)
    if set(layers) & set(columns):
        raise ValueError(
            f"unit_axis={unit!r} and stack_axis={stack!r} must name different axes of a leaf,"
            f" here of shape {jnp.shape(leaf)}."
        )
    rows = tuple(axis for axis in range(jnp.ndim(leaf)) if axis not in layers + columns)
    return MatrixView(layers, rows, columns)


def _size(leaf: Any, axes: tuple[int, ...]) -> int:
    return math.prod(jnp.shape(leaf)[axis] for axis in axes)


def _is_less(size: Any, other: Any) -> bool:
    return _leaves.is_known(size) and _leaves.is_known(other) and bool(size < other)


def _require_whole(leaf: Any, name: Any) -> None:
    axes = _mapped.may_divide(leaf) if name is None else list(_rules.names_of(name))
    if axes:
        raise ValueError(
            f"A matrix in a leaf of shape {jnp.shape(leaf)} may be sharded over {axes!r}, and the"
            " singular values of a shard are not those of the matrix. Pass axis_name=() for this"
            " leaf if each of its matrices is whole, or clip outside of the mapped program."
        )


def _whole(leaf: Array, stack: tuple[int, ...]) -> Array:
    """Gathers all axes except those of the stack, if the type of the array shows its sharding."""
    sharding = jax.typeof(leaf).sharding
    kept = [part if axis in stack else None for axis, part in enumerate(sharding.spec)]
    if tuple(kept) == tuple(sharding.spec):
        return leaf
    return _compat.reshard(leaf, NamedSharding(sharding.mesh, _spec(*kept)))


def _sharded_as(x: Array, like: Array) -> Array:
    sharding = jax.typeof(like).sharding
    if tuple(jax.typeof(x).sharding.spec) == tuple(sharding.spec):
        return x
    return _compat.reshard(x, sharding)
