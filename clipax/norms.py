"""The norm axis: one safe, wide norm, grouped by tree, leaf or unit.

A norm maps a tree of updates to a tree prefix of it: `global_norm` to one scalar,
`leaf_norm` and its relatives to one scalar a leaf, `unit_norm` to arrays that broadcast
against the leaves. Leaves that are not measured (None, integer, bool, float0) become
None. All norms are float32, or float64 where a leaf is, and are right for every finite
input whose norm is representable: neither float16 [300] nor float32 [1e20, 1e20]
overflows, nor does 1e-30 vanish.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax import _checks, _compat, _leaves
from clipax._typing import Array, Axes, AxisName, LeafRule, Norms, Updates

# Alike leaves up to this many elements share one reduction: a tree of a thousand small
# leaves then compiles a handful of kernels, and what is copied to stack them is small.
_SMALL = 2**14


def global_norm(
    updates: Updates, ord: float | None = None, *, axis_name: AxisName = None
) -> Array:
    """Measures one p-norm over all leaves.

    `norm = (sum_i |u_i|^p)^(1/p)` over every entry `u_i` of every measured leaf.

    Args:
      updates: Any pytree. Leaves of any shape and floating or complex dtype are measured.
      ord: The order `p > 0` of the norm; `inf` gives the largest modulus. None is 2.
      axis_name: Which mapped axes shard the leaves, where the types do not say: under
        `pmap`, `vmap(axis_name=...)` and `shard_map(check_vma=False)`. One name, several,
        or a tree prefix of them; `()` says that the leaves are replicated.

    Returns:
      A scalar, float32 or float64 (where a leaf is).

    Raises:
      ValueError: `ord` is not a number > 0, `axis_name` is not bound or does not fit, or
        the leaves lie in a mapped program and nothing says over which axes.

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
    leaves = _measured_leaves(updates, axis_name)
    if not leaves:
        return jnp.zeros((), jnp.float32)
    arrays, shards = zip(*((leaf.array, leaf.shards) for leaf in leaves), strict=True)
    every_axis = tuple(tuple(range(array.ndim)) for array in arrays)
    return _norms(arrays, every_axis, shards, (1.0,) * len(arrays), _checks.order(ord), True)[0]


def leaf_norm(
    updates: Updates,
    ord: float | None = None,
    *,
    axes: LeafRule = None,
    stack_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> Norms:
    """Measures one p-norm a leaf, or a leaf's slices along chosen axes.

    Args:
      updates: Any pytree.
      ord: The order `p > 0` of the norm; `inf` gives the largest modulus. None is 2.
      axes: The axes that are summed over, kept with size one, as in `tf.clip_by_norm`.
        None is all of them. One value for every leaf, a tree prefix of values, or a
        function `(path, leaf) -> axes` with paths such as "encoder/kernel".
      stack_axis: The axes along which layers are stacked, as by `scan`; each layer then
        has a norm of its own. Same forms as `axes`; None where nothing is stacked.
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
    summed = [
        _summed_axes(leaf, leaf_axes, leaf_stack_axis)
        for leaf, leaf_axes, leaf_stack_axis in zip(
            jax.tree.leaves(updates),
            _leaves.per_leaf(updates, axes=axes),
            _leaves.per_leaf(updates, stack_axis=stack_axis),
            strict=True,
        )
    ]
    return _leafwise(updates, summed, mask, axis_name, _checks.order(ord))


def unit_norm(
    updates: Updates,
    ord: float | None = None,
    *,
    unit_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> Norms:
    """Measures one p-norm an output unit: the weights that feed one neuron.

    Args:
      updates: Any pytree.
      ord: The order `p > 0` of the norm; `inf` gives the largest modulus. None is 2.
      unit_axis: The axes that count the units; all others are summed over. An axis, a
        tuple of axes (`(0, -1)`: stacked layers), a tree prefix, or a function
        `(path, leaf) -> axes | None`, where None makes the whole leaf one unit. Leaves
        of rank one or less are one unit, unless a function says otherwise. None is
        `output_last`; the others at hand are `output_first`, `nfnets` and `whole_leaf`.
      mask: As in `leaf_norm`.
      axis_name: As in `leaf_norm`.

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
    units = _leaves.per_leaf(updates, unit_axis=rule)
    summed: list[Axes] = []
    for leaf, unit in zip(jax.tree.leaves(updates), units, strict=True):
        one_unit = unit is None or (not callable(rule) and jnp.ndim(leaf) <= 1)
        summed.append(None if one_unit else _other_axes(leaf, unit))
    return _leafwise(updates, summed, mask, axis_name, _checks.order(ord))


def block_rms(updates: Updates, *, axis_name: AxisName = None) -> Norms:
    """Measures each leaf's root mean square, `norm = sqrt(mean(|u|^2))`.

    Example:
      >>> block_rms(jnp.array([3.0, 4.0, 0.0, 0.0]))
      Array(2.5, dtype=float32)
    """
    return _leafwise(updates, None, True, axis_name, 2.0, lambda size: size**-0.5)


def average_norm(updates: Updates, *, axis_name: AxisName = None) -> Norms:
    """Measures each leaf's L2 norm over its number of entries, `norm = |u|_2 / n`.

    Example:
      >>> average_norm(jnp.array([3.0, 4.0]))
      Array(2.5, dtype=float32)
    """
    return _leafwise(updates, None, True, axis_name, 2.0, lambda size: 1.0 / size)


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
    """
    del path
    shape = jnp.shape(leaf)
    if sum(size != 1 for size in shape) <= 1:
        return None
    return (1, 2) if len(shape) == 3 else -1


def whole_leaf(path: str, leaf: Any) -> Axes:
    """Each leaf is one unit, as in Dreamer's adaptive clipping."""
    del path, leaf
    return None


class _Leaf(NamedTuple):
    position: int
    array: Array
    shards: tuple[Any, ...]
    """The mapped axes over which this leaf's reduction goes on."""


def _measured_leaves(
    updates: Updates, axis_name: AxisName, partial: Sequence[bool] | None = None
) -> list[_Leaf]:
    leaves = jax.tree.leaves(updates)
    names = _leaves.per_leaf(updates, axis_name=axis_name)
    partial = partial or [False] * len(leaves)
    return [
        _Leaf(index, array, _sharding_axes(array, name, is_partial))
        for index, (leaf, name, is_partial) in enumerate(zip(leaves, names, partial, strict=True))
        if _leaves.is_measured(leaf)
        for array in [jnp.asarray(leaf)]
    ]


def _sharding_axes(array: Array, name: Any, is_partial: bool) -> tuple[Any, ...]:
    named = () if name is None else name if isinstance(name, tuple) else (name,)
    for axis in named:
        try:
            jax.lax.axis_index(axis)
        except NameError as error:
            raise ValueError(f"axis_name {axis!r} is not bound here: {error}") from error
    if name is None and (untyped := _compat.untyped_axes()):
        raise ValueError(
            f"Inside a program mapped over {untyped} without types that say over which"
            " axes a leaf is sharded, the norm cannot be known. Pass axis_name= with the"
            " names that shard the leaves, or axis_name=() if they are replicated."
        )
    varying = _compat.varying_axes(array)
    if is_partial:
        if varying and name is None:
            raise ValueError(
                f"A leaf of shape {array.shape} varies over {sorted(map(str, varying))}, and"
                " only some of its axes are summed. Pass axis_name= with the names that"
                " shard the summed ones, or axis_name=() if none does."
            )
        return named
    untyped_named = {axis for axis in named if not _compat.is_typed(axis)}
    return tuple(sorted(varying | untyped_named, key=str))


def _leafwise(
    updates: Updates,
    summed: Sequence[Axes] | None,
    mask: LeafRule,
    axis_name: AxisName,
    ord: float,
    weight: Callable[[int], float] = lambda _: 1.0,
) -> Norms:
    """Measures each unmasked leaf over its summed axes, None being all of them."""
    every_leaf, treedef = jax.tree.flatten(updates)
    summed = summed or [None] * len(every_leaf)
    wanted = _leaves.per_leaf(updates, mask=mask)
    leaves = [
        leaf
        for leaf in _measured_leaves(updates, axis_name, [axes is not None for axes in summed])
        if wanted[leaf.position]
    ]
    reduced = tuple(
        tuple(range(leaf.array.ndim)) if (axes := summed[leaf.position]) is None else axes
        for leaf in leaves
    )
    weights = tuple(weight(max(leaf.array.size * _shard_count(leaf), 1)) for leaf in leaves)
    arrays, shards = [leaf.array for leaf in leaves], tuple(leaf.shards for leaf in leaves)
    norms: list[Any] = [None] * len(every_leaf)
    for leaf, norm in zip(
        leaves, _norms(arrays, reduced, shards, weights, ord, False), strict=True
    ):
        # Sizes of one are kept where only some axes are summed; a whole leaf is a scalar.
        norms[leaf.position] = norm if summed[leaf.position] is not None else norm.reshape(())
    return jax.tree.unflatten(treedef, norms)


def _shard_count(leaf: _Leaf) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in leaf.shards)


def _summed_axes(leaf: Any, axes: Axes, stack_axis: Axes) -> Axes:
    if stack_axis is None:
        return None if axes is None else _axis_tuple(leaf, axes)
    if axes is not None:
        raise ValueError(
            f"Give a leaf either axes or stack_axis, got axes={axes!r} and"
            f" stack_axis={stack_axis!r} for the shape {jnp.shape(leaf)}."
        )
    return _other_axes(leaf, stack_axis)


def _axis_tuple(leaf: Any, axes: Axes) -> tuple[int, ...]:
    rank = jnp.ndim(leaf)
    given: tuple[Any, ...] = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    for axis in given:
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise ValueError(f"An axis must be an integer, got {axis!r} in {axes!r}.")
        if not -rank <= axis < rank:
            raise ValueError(
                f"A leaf of shape {jnp.shape(leaf)} has no axis {axis}. Give the axes leaf"
                " by leaf, as a tree prefix or a function (path, leaf) -> axes."
            )
    return tuple(sorted({int(axis) % rank for axis in given}))


def _other_axes(leaf: Any, axes: Axes) -> tuple[int, ...]:
    kept = _axis_tuple(leaf, axes)
    return tuple(axis for axis in range(jnp.ndim(leaf)) if axis not in kept)


class _Group(NamedTuple):
    """Leaves that are reduced as one stacked array."""

    members: tuple[int, ...]
    axes: tuple[int, ...]
    shards: tuple[Any, ...]


_Operation = tuple[Callable[..., Array], Callable[..., Any]]
_SUM: _Operation = (jnp.sum, jax.lax.psum)
_MAX: _Operation = (functools.partial(jnp.max, initial=0.0), jax.lax.pmax)


class _Range(NamedTuple):
    """Where sums of squares are trusted, and the units that bring the others there."""

    lowest_sum: float
    unit_of_huge: float
    unit_of_tiny: float


_RANGES = {
    jnp.dtype(np.float32): _Range(2.0**-64, 2.0**90, 2.0**-70),
    jnp.dtype(np.float64): _Range(2.0**-900, 2.0**600, 2.0**-560),
}


# Compiled as one function, so that eager calls are cached; inlined under an outer jit.
@functools.partial(
    jax.jit,
    static_argnames=("axes", "shards", "weights", "ord", "in_total"),
    inline=True,
)
def _norms(
    arrays: Sequence[Array],
    axes: tuple[tuple[int, ...], ...],
    shards: tuple[tuple[Any, ...], ...],
    weights: tuple[float, ...],
    ord: float,
    in_total: bool,
) -> list[Array]:
    """One norm over all arrays, or one for each over its own axes, kept with size one."""
    groups = _grouped(arrays, axes, shards)
    stacks = [jnp.stack([arrays[index] for index in group.members]) for group in groups]
    widths = [_leaves.wide_dtype(stack.dtype) for stack in stacks]
    if in_total:
        widths = [_leaves.wide_dtype(*widths)] * len(groups)

    def reduce(operation: _Operation, power: float, units: Sequence[Any]) -> list[Array]:
        local, _ = operation
        parts = [
            local(_powers(stack, width, unit, power), axis=group.axes, keepdims=True)
            for stack, width, unit, group in zip(stacks, widths, units, groups, strict=True)
        ]
        return (_in_total if in_total else _across_shards)(operation, parts, groups)

    def spread(units: list[Array]) -> list[Array]:
        return units * len(groups) if in_total else units

    no_units = [None] * len(groups)
    if ord == math.inf:
        norms = reduce(_MAX, 1.0, no_units)
    elif ord == 1:
        norms = reduce(_SUM, 1.0, no_units)
    else:
        if ord == 2:
            sums = reduce(_SUM, ord, no_units)
            units = [_unit_for(part) for part in sums]
            # The second read of the arrays happens only when the first left the range.
            sums = jax.lax.cond(
                functools.reduce(jnp.logical_and, [jnp.all(unit == 1) for unit in units]),
                lambda: sums,
                lambda: reduce(_SUM, ord, spread(units)),
            )
        else:
            units = [_finite_or_one(part) for part in reduce(_MAX, 1.0, no_units)]
            sums = reduce(_SUM, ord, spread(units))
        norms = [_root(part, ord) * unit for part, unit in zip(sums, units, strict=True)]
    if in_total:
        return norms

    by_leaf: dict[int, Array] = {}
    for group, norm in zip(groups, norms, strict=True):
        weighted = norm * weights[group.members[0]]
        by_leaf.update((index, weighted[row]) for row, index in enumerate(group.members))
    return [by_leaf[index] for index in range(len(arrays))]


def _grouped(
    arrays: Sequence[Array],
    axes: tuple[tuple[int, ...], ...],
    shards: tuple[tuple[Any, ...], ...],
) -> list[_Group]:
    groups: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        alike = (jax.typeof(array), axes[index], shards[index])
        groups.setdefault(alike if array.size <= _SMALL else index, []).append(index)
    return [
        _Group(tuple(members), tuple(axis + 1 for axis in axes[first]), shards[first])
        for members in groups.values()
        for first in members[:1]
    ]


def _powers(stack: Array, width: Any, unit: Array | None, power: float) -> Array:
    """|x / unit|^power in the given width."""

    def in_units(x: Array) -> Array:
        return x.astype(width) if unit is None else x.astype(width) / unit

    is_complex = jnp.iscomplexobj(stack)
    if power == 2:
        squared = jnp.square(in_units(stack.real if is_complex else stack))
        return squared + jnp.square(in_units(stack.imag)) if is_complex else squared
    modulus = in_units(jnp.abs(stack))
    if power == 1:
        return modulus
    # The inner `where` keeps the derivative of x**p finite at zero for p < 1.
    return jnp.where(modulus > 0, jnp.where(modulus > 0, modulus, 1.0) ** power, 0.0)


def _across_shards(
    operation: _Operation, parts: list[Array], groups: Sequence[_Group]
) -> list[Array]:
    """Completes sharded parts with one collective for each set of axes."""
    _, collective = operation
    complete = list(parts)
    for shards in {group.shards for group in groups if group.shards}:
        rows = [row for row, group in enumerate(groups) if group.shards == shards]
        whole = collective([parts[row] for row in rows], shards)
        for row, part in zip(rows, whole, strict=True):
            complete[row] = part
    return complete


def _in_total(operation: _Operation, parts: list[Array], groups: Sequence[_Group]) -> list[Array]:
    """One scalar out of all parts, replicated leaves counted once."""
    local, _ = operation
    by_shards: dict[Any, list[Array]] = {}
    for part, group in zip(parts, groups, strict=True):
        by_shards.setdefault(group.shards, []).append(local(part))
    partial = [local(jnp.stack(scalars)) for scalars in by_shards.values()]
    representatives = [_Group((), (), shards) for shards in by_shards]
    return [local(jnp.stack(_across_shards(operation, partial, representatives)))]


def _unit_for(sums: Array) -> Array:
    within = _RANGES[sums.dtype]
    one, huge, tiny = (jnp.full_like(sums, unit) for unit in (1.0, *within[1:]))
    return jnp.where(sums < within.lowest_sum, tiny, jnp.where(sums == jnp.inf, huge, one))


def _finite_or_one(largest: Array) -> Array:
    usable = (largest > 0) & jnp.isfinite(largest)
    return jax.lax.stop_gradient(jnp.where(usable, largest, jnp.ones_like(largest)))


def _root(sums: Array, power: float) -> Array:
    """sums**(1/power) with a derivative of zero, not NaN, at zero."""
    positive = jnp.where(sums > 0, sums, jnp.ones_like(sums))
    root = jnp.sqrt(positive) if power == 2 else positive ** (1 / power)
    # A NaN is not > 0 and must come through.
    return jnp.where(sums > 0, root, sums)
