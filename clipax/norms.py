"""The norm axis: one safe, wide norm, grouped by tree, leaf or unit.

A norm maps a tree of updates to a tree prefix of it: `global_norm` to one scalar,
`leaf_norm` and its relatives to one scalar a leaf, `unit_norm` to arrays that broadcast
against the leaves. Leaves that are not measured (None, integer, bool, float0) become
None. All norms are float32, or float64 where a leaf is, and are right for every finite
input whose norm is representable: neither float16 [300] nor float32 [1e20, 1e20]
overflows, nor does 1e-30 vanish.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _checks, _mapped, _paths, _reduction, _rules
from clipax._core._typing import Array, Axes, AxisName, LeafRule, Norms, Updates
from clipax.units import output_last


def global_norm(
    updates: Updates,
    ord: float = 2,
    *,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> Array:
    """Measures one p-norm over all leaves.

    `norm = (sum_i |u_i|^p)^(1/p)` over every entry `u_i` of every measured leaf.

    Args:
      updates: Any pytree. Leaves of any shape and floating or complex dtype are measured.
      ord: The order `p > 0` of the norm; `inf` gives the largest modulus.
      mask: Which leaves are measured: True, a tree prefix of booleans, or a function
        `(path, leaf) -> bool` with paths such as "encoder/kernel".
      axis_name: Which mapped axes shard the leaves, where the types do not say: under
        `pmap`, `vmap(axis_name=...)` and `shard_map(check_vma=False)`. One name, several,
        or a tree prefix of them. `()` sums over no mapped axis, because the leaves are
        replicated or hold whole gradients of different examples.

    Returns:
      A scalar, float32 or float64 (where a leaf is).

    Raises:
      ValueError: `ord` is not a number > 0, `axis_name` is not bound or does not fit, or
        the program is mapped and neither `axis_name` nor types show what is sharded.

    | updates | norm |
    |---|---|
    | no measured leaf | 0 |
    | a NaN entry | NaN |
    | an inf entry, no NaN | inf |

    Example:
      >>> global_norm({"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])})
      Array(13., dtype=float32)
      >>> global_norm({"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}, ord=1)
      Array(19., dtype=float32)
    """
    order = _checks.order(ord)
    _checks.static(mask=mask)
    wanted = _rules.wanted(updates, mask)
    leaves = _sharded_leaves(updates, axis_name, wanted, [None] * len(wanted))
    if not leaves:
        return jnp.zeros((), jnp.float32)
    layouts = tuple(
        _reduction.Layout(tuple(range(leaf.array.ndim)), leaf.shards) for leaf in leaves
    )
    return _reduction.total_norm([leaf.array for leaf in leaves], layouts, order)


def leaf_norm(
    updates: Updates,
    ord: float = 2,
    *,
    axes: LeafRule = None,
    stack_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> Norms:
    """Measures one p-norm per leaf, or one per slice of a leaf along chosen axes.

    Args:
      updates: Any pytree.
      ord: The order `p > 0` of the norm; `inf` gives the largest modulus.
      axes: The axes that are summed over, kept with size one, as in `tf.clip_by_norm`.
        None sums over all. One value for every leaf, a tree prefix of values, or a
        function `(path, leaf) -> axes` with paths such as "encoder/kernel". A tuple means
        several axes of one leaf, and is never a prefix.
      stack_axis: The axes along which layers are stacked, as by `scan`; each layer then
        has a norm of its own. It takes the forms of `axes`; None where nothing is stacked.
      mask: Which leaves are measured: True, a tree prefix of booleans, or a function
        `(path, leaf) -> bool`.
      axis_name: As in `global_norm`. Where only some axes of a sharded leaf are summed,
        it must say which mapped axes shard those.

    Returns:
      The tree of the updates with a scalar at each measured leaf, or an array with the
      leaf's rank where only some axes are summed; None at the other leaves.

    Raises:
      ValueError: As `global_norm`; an axis that a leaf does not have; a prefix that does
        not fit; both `axes` and `stack_axis` for one leaf.

    Example:
      >>> leaf_norm({"w": jnp.array([3.0, 4.0]), "n": jnp.array(7)})
      {'n': None, 'w': Array(5., dtype=float32)}
      >>> leaf_norm(jnp.array([[3.0, 4.0], [0.0, 2.0]]), stack_axis=0)
      Array([[5.],
             [2.]], dtype=float32)
    """
    _checks.static(axes=axes, stack_axis=stack_axis, mask=mask)
    wanted = _rules.wanted(updates, mask)
    rows = zip(
        jax.tree.leaves(updates),
        wanted,
        _rules.per_leaf(updates, axes=axes),
        _rules.per_leaf(updates, stack_axis=stack_axis),
        strict=True,
    )
    summed = [
        _summed_axes(leaf, leaf_axes, leaf_stack_axis) if is_wanted else None
        for leaf, is_wanted, leaf_axes, leaf_stack_axis in rows
    ]
    order = _checks.order(ord)
    return _leafwise(updates, wanted, summed, ord=order, axis_name=axis_name)


def unit_norm(
    updates: Updates,
    ord: float = 2,
    *,
    unit_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> Norms:
    """Measures one p-norm per output unit, the weights that feed one neuron.

    Args:
      updates: Any pytree.
      ord: The order `p > 0` of the norm; `inf` gives the largest modulus.
      unit_axis: The axes that count the units; all others are summed over. An axis, a
        tuple of axes (`(0, -1)`: stacked layers), a tree prefix, or a function
        `(path, leaf) -> axes | None`, where None makes the whole leaf one unit. Leaves
        of rank one or less are one unit, unless a function says otherwise. None is
        `output_last`; `clipax.units` also has `output_first`, `nfnets` and `whole_leaf`.
      mask: As in `leaf_norm`.
      axis_name: As in `global_norm`: the mapped axes that shard the summed axes. It is needed
        even where types show that a leaf varies, because they do not show whether its units
        or the entries within a unit are sharded.

    Returns:
      The tree of the updates with an array at each measured leaf that broadcasts
      against it, a scalar where the leaf is one unit; None at the other leaves.

    Raises:
      ValueError: As `leaf_norm`.

    Example:
      >>> unit_norm({"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])})
      {'kernel': Array([[5., 1.]], dtype=float32)}
    """
    _checks.static(unit_axis=unit_axis, mask=mask)
    rule = output_last if unit_axis is None else unit_axis
    wanted = _rules.wanted(updates, mask)
    units = _rules.per_leaf(updates, unit_axis=rule)
    summed: list[tuple[int, ...] | None] = []
    for leaf, is_wanted, unit in zip(jax.tree.leaves(updates), wanted, units, strict=True):
        is_split = is_wanted and unit is not None and (callable(rule) or jnp.ndim(leaf) > 1)
        summed.append(_other_axes(leaf, unit_axis=unit) if is_split else None)
    order = _checks.order(ord)
    return _leafwise(updates, wanted, summed, ord=order, axis_name=axis_name)


def block_rms(updates: Updates, *, axis_name: AxisName = None) -> Norms:
    """Measures each leaf's root mean square, `norm = sqrt(mean(|u|^2))`.

    Args:
      updates: Any pytree.
      axis_name: As in `global_norm`.

    Returns:
      The tree of the updates with a scalar at each measured leaf; None at the other leaves.

    Example:
      >>> block_rms(jnp.array([3.0, 4.0, 0.0, 0.0]))
      Array(2.5, dtype=float32)
    """
    return _leafwise(updates, size_power=1, axis_name=axis_name)


def average_norm(updates: Updates, *, axis_name: AxisName = None) -> Norms:
    """Measures each leaf's L2 norm over its number of entries, `norm = |u|_2 / n`.

    Args:
      updates: Any pytree.
      axis_name: As in `global_norm`.

    Returns:
      The tree of the updates with a scalar at each measured leaf; None at the other leaves.

    Example:
      >>> average_norm(jnp.array([3.0, 4.0]))
      Array(2.5, dtype=float32)
    """
    return _leafwise(updates, size_power=2, axis_name=axis_name)


def _mean_modulus(updates: Updates, *, axis_name: AxisName = None) -> Norms:
    return _leafwise(updates, ord=1, size_power=1, axis_name=axis_name)


class _Leaf(NamedTuple):
    position: int
    array: Array
    shards: tuple[Hashable, ...]
    """The mapped axes over which this leaf's sum continues."""


def _sharded_leaves(
    updates: Updates,
    axis_name: AxisName,
    wanted: Sequence[bool],
    summed: Sequence[tuple[int, ...] | None],
) -> list[_Leaf]:
    _checks.axis_name(axis_name=axis_name)
    names = _rules.per_leaf(updates, axis_name=axis_name)
    rows = zip(jax.tree.leaves(updates), names, wanted, summed, strict=True)
    return [
        _Leaf(position, array, _mapped.sharding_axes(array, name, axes))
        for position, (leaf, name, is_wanted, axes) in enumerate(rows)
        if is_wanted
        for array in [_mapped.reduced(jnp.asarray(leaf))]
    ]


def _leafwise(
    updates: Updates,
    wanted: Sequence[bool] | None = None,
    summed: Sequence[tuple[int, ...] | None] | None = None,
    *,
    ord: float = 2,
    size_power: int = 0,
    axis_name: AxisName,
) -> Norms:
    """Measures each wanted leaf over its summed axes; None means all axes."""
    every_leaf = jax.tree.leaves(updates)
    summed = summed or [None] * len(every_leaf)
    wanted = wanted or _rules.wanted(updates)
    leaves = _sharded_leaves(updates, axis_name, wanted, summed)
    layouts: list[_reduction.Layout] = []
    for leaf in leaves:
        axes = summed[leaf.position]
        size = leaf.array.size * math.prod(jax.lax.axis_size(axis) for axis in leaf.shards)
        reduced = tuple(range(leaf.array.ndim)) if axes is None else tuple(axes)
        divisor = _reduction.Divisor(max(size, 1), size_power)
        layouts.append(_reduction.Layout(reduced, leaf.shards, divisor))
    norms: list[Any] = [None] * len(every_leaf)
    if leaves:
        arrays = [leaf.array for leaf in leaves]
        measured = _reduction.separate_norms(arrays, tuple(layouts), ord)
        for leaf, norm in zip(leaves, measured, strict=True):
            norms[leaf.position] = norm
    return _paths.rebuilt(updates, norms)


def _summed_axes(leaf: Any, axes: Axes, stack_axis: Axes) -> tuple[int, ...] | None:
    if stack_axis is None:
        return None if axes is None else _rules.axis_tuple(leaf, axes=axes)
    if axes is not None:
        raise ValueError(
            f"Give a leaf either axes or stack_axis, got axes={axes!r} and"
            f" stack_axis={stack_axis!r} for the shape {jnp.shape(leaf)}."
        )
    return _other_axes(leaf, stack_axis=stack_axis)


def _other_axes(leaf: Any, **kept: Axes) -> tuple[int, ...]:
    axes = _rules.axis_tuple(leaf, **kept)
    return tuple(axis for axis in range(jnp.ndim(leaf)) if axis not in axes)
