"""Which leaves are measured, in what width, and what a rule says of each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from clipax._core import _compat, _paths
from clipax._core._typing import Array, Axes, LeafRule, Updates


def is_measured(leaf: Any) -> bool:
    """Floating and complex leaves are; integer, bool, float0 and foreign ones are not."""
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.inexact)


def wide_dtype(*dtypes: Any) -> Any:
    """The real dtype in which leaves of these dtypes are measured and scaled."""
    double = any(np.dtype(dtype) in (np.float64, np.complex128) for dtype in dtypes)
    return jnp.dtype(np.float64 if double else np.float32)


def widened(leaf: Array, *dtypes: Any) -> Array:
    """The leaf in the width of its dtype, or of the given ones; complex if it is."""
    kind = np.complex64 if jnp.iscomplexobj(leaf) else np.float32
    return leaf.astype(np.result_type(wide_dtype(*(dtypes or (leaf.dtype,))), kind))


def is_none(node: Any) -> bool:
    return node is None


def only_measured(updates: Updates, mask: LeafRule = True) -> Updates:
    """The updates with None for every leaf that is not measured, or masked out."""
    leaves, treedef = jax.tree.flatten(updates)
    rows = zip(leaves, wanted(updates, mask), strict=True)
    return jax.tree.unflatten(treedef, [leaf if is_wanted else None for leaf, is_wanted in rows])


def over(updates: Updates, some: Updates) -> Updates:
    """Some leaves, with None in the place of the others, over the leaves that were there."""
    leaves, treedef = jax.tree.flatten(updates)
    rows = zip(leaves, up_to(treedef, some), strict=True)
    return jax.tree.unflatten(treedef, [old if new is None else new for old, new in rows])


def up_to(treedef: Any, tree: Any) -> list[Any]:
    """The subtrees of a tree where the structure has its leaves."""
    return list(treedef.flatten_up_to(tree))


def map_measured(
    function: Callable[..., Any], updates: Updates, *prefixes: Any, name: str = "coefficients"
) -> Updates:
    """Maps `function(leaf, *values)` over measured leaves of which every prefix says something.

    A leaf without entries stays as it is.
    """
    leaves, treedef = jax.tree.flatten(updates)
    columns = [
        _paths.spread(prefix, updates, is_leaf=is_none, is_optional=is_unmeasured, name=name)
        for prefix in prefixes
    ]
    mapped = [
        function(leaf, *values)
        if is_measured(leaf) and jnp.size(leaf) and not any(value is None for value in values)
        else leaf
        for leaf, *values in zip(leaves, *columns, strict=True)
    ]
    return jax.tree.unflatten(treedef, mapped)


def is_unmeasured(leaf: Any) -> bool:
    return not is_measured(leaf)


def is_function(value: Any) -> bool:
    """Whether it is called, and not a tree of numbers that could be called too, as a layer."""
    if not callable(value) or isinstance(value, jax.Array):
        return False
    # An object that is no pytree is its own leaf.
    return isinstance(value, jax.tree_util.Partial) or jax.tree_util.all_leaves([value])


def per_leaf(updates: Updates, **rule: LeafRule) -> list[Any]:
    """What `name=rule` says of each leaf, in the order of `jax.tree.leaves`."""
    ((name, value),) = rule.items()
    if is_function(value):
        rows = zip(_paths.of_leaves(updates), jax.tree.leaves(updates), strict=True)
        return [value(path, leaf) if is_measured(leaf) else None for path, leaf in rows]
    if is_rule_value(value) and type(value) is not tuple:
        return [value] * len(jax.tree.leaves(updates))
    for pair in _paths.paired_tuples(value, updates, is_rule_value):
        if len(set(pair)) > 1:
            raise ValueError(
                f"{name} has {pair!r}, which is one value for all leaves of a tuple of"
                f" {len(pair)}, but could be meant as one for each. Write a list:"
                f" {list(pair)!r} for one each, {[pair] * len(pair)!r} for the same."
            )
    return _paths.spread(
        value, updates, is_leaf=is_rule_value, is_optional=is_unmeasured, name=name
    )


def is_rule_value(node: Any) -> bool:
    """Whether a node of a rule's tree is one value."""
    # A tuple of integers or of names is one value: several axes of one leaf.
    return node is None or (
        type(node) is tuple
        and all(isinstance(item, int | str) and not isinstance(item, bool) for item in node)
    )


def names_of(value: Any) -> tuple[Any, ...]:
    """The names that a leaf of `axis_name` stands for."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def wanted(updates: Updates, mask: LeafRule = True) -> list[bool]:
    """Which leaves are measured and not masked out."""
    rows = zip(jax.tree.leaves(updates), per_leaf(updates, mask=mask), strict=True)
    answers = []
    for leaf, is_unmasked in rows:
        measured = is_measured(leaf)
        if measured and not isinstance(is_unmasked, bool | np.bool_):
            raise ValueError(f"mask must say True or False of each leaf, got {is_unmasked!r}.")
        answers.append(measured and bool(is_unmasked))
    return answers


def axis_tuple(leaf: Any, **argument: Axes) -> tuple[int, ...]:
    """Axes of a leaf counted from the front, in order."""
    ((name, axes),) = argument.items()
    rank = jnp.ndim(leaf)
    given: tuple[Any, ...] = axes if isinstance(axes, tuple) else (axes,)
    for axis in given:
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise ValueError(f"{name} must be an integer, got {axis!r} in {axes!r}.")
        if not -rank <= axis < rank:
            raise ValueError(
                f"A leaf of shape {jnp.shape(leaf)} has no axis {axis}, got"
                f" {name}={axes!r}. Give {name} leaf by leaf, as a tree prefix or a function"
                " (path, leaf) -> axes."
            )
    return tuple(sorted({int(axis) % rank for axis in given}))


def filled_like(norm: Array, value: Any) -> Array:
    """An array of a value in the shape, dtype and sharding of a norm."""
    # Chosen by the norm: a constant would not have its sharding. And what XLA knows to be one
    # value, it computes elsewhere and copies, in a kernel for each norm.
    filled = _compat.optimization_barrier(jnp.asarray(value).astype(norm.dtype))
    return jnp.where(jnp.isnan(norm), value, filled)


def in_dtype_of(norm: Array, *values: Any) -> tuple[Array, ...]:
    """Numbers, or arrays that were traced in another dtype, in the dtype of a norm."""
    return tuple(jnp.asarray(value).astype(norm.dtype) for value in values)


def unit_of(largest: Array) -> Array:
    """What to divide by, so that numbers up to the largest are about one at most; 1 for 0."""
    # XLA multiplies by the inverse, which for the largest floats is flushed to zero.
    invertible = jnp.minimum(largest, np.finfo(largest.dtype).max / 16)
    return jnp.where(largest > 0, invertible, 1)


def zeros_like(leaf: Any) -> Array:
    """Zeros as wide as moments of a leaf are, which lie where it does."""
    wide = widened(jnp.zeros_like(leaf))
    # In jit, nothing but a value of the program itself tells it where that runs.
    is_on_mesh = isinstance(leaf, jax.core.Tracer) and _sharding_of(leaf) is not None
    return jnp.where(jnp.isnan(leaf), wide, wide) if is_on_mesh else wide


def choose(condition: Array, new: Any, old: Any) -> Any:
    """The new tree where the condition holds, else the old one, bit for bit.

    A leaf that is neither a number nor an array of numbers or keys stays the object that it is.
    """

    def choose_leaf(path: Any, one: Any, other: Any) -> Any:
        if one is other or is_float0(other):
            return other
        if _can_be_selected(one) and _can_be_selected(other):
            is_static = type(one) is type(other) and isinstance(one, int)
            # A product with 0 or 1 would not do: 0 * NaN is NaN.
            return other if is_static and one == other else jnp.where(condition, one, other)
        if type(one) is type(other) and np.array_equal(one, other):
            return other
        if isinstance(condition, jax.core.Tracer):
            raise ValueError(
                "While tracing, a step that may be left out can change only numbers, arrays and"
                f" keys, got both {other!r} and {one!r} at {jax.tree_util.keystr(path)!r}."
            )
        return one if condition else other

    return jax.tree_util.tree_map_with_path(choose_leaf, new, old)


def holds_numbers(leaf: Any) -> bool:
    """Whether it is a number or an array of them: no key, float0, function or string."""
    if isinstance(leaf, (bool, int, float, complex)) or hasattr(leaf, "__jax_array__"):
        return True
    return _is_array_of(leaf, np.bool_, np.number)


def _is_array_of(leaf: Any, *kinds: Any) -> bool:
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    return is_array and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _can_be_selected(leaf: Any) -> bool:
    return holds_numbers(leaf) or _is_array_of(leaf, jax.dtypes.prng_key)


def is_float0(leaf: Any) -> bool:
    """Such a leaf has no values, and nothing can be done to it."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def zero_norms(norm: Callable[[Any], Any], params: Any) -> Any:
    """Zeros in the type and sharding of the norms of `params`, flat by path."""
    if not any(map(_tells_its_place, jax.tree.leaves(params))):
        norms = norm(params)
        return jax.tree.map(lambda size: filled_like(size, 0.0), _paths.flat(norms))
    shapes = jax.tree.map(_shape_on_device, params)
    sharded = {
        path: leaf.sharding
        for path, leaf in zip(_paths.of_leaves(shapes), jax.tree.leaves(shapes), strict=True)
        if getattr(leaf, "sharding", None) is not None
    }
    whole = next(iter(sharded.values()), None)

    def zero(path: str, norm: Any) -> Any:
        sharding = sharded.get(path, whole)
        if isinstance(sharding, NamedSharding):
            # What is summed has one entry left, on every device.
            kept = zip(norm.shape, tuple(sharding.spec), strict=False)
            spec = [part if size != 1 else None for size, part in kept]
            sharding = NamedSharding(sharding.mesh, _compat.partition_spec(*spec))
        return jnp.zeros(norm.shape, norm.dtype, device=sharding)

    norms = _paths.flat(jax.eval_shape(norm, shapes))
    if not isinstance(norms, dict):
        return zero("", norms)
    return {path: None if size is None else zero(path, size) for path, size in norms.items()}


def _tells_its_place(leaf: Any) -> bool:
    """Whether where its norm lies is known from its type, or cannot be computed where it is."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return _shape_on_device(leaf) is not leaf or not jax.typeof(leaf).sharding.mesh.empty


def _shape_on_device(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or isinstance(leaf, jax.core.Tracer):
        return leaf
    sharding = leaf.sharding
    if sharding is None:
        return leaf
    device = next(iter(sharding.device_set))
    usual = device.default_memory().kind
    if sharding.memory_kind in (None, usual):
        return leaf
    return _compat.shape_dtype_struct(
        leaf.shape, leaf.dtype, sharding=sharding.with_memory_kind(usual)
    )


def beside(norm: Array, state: Any) -> Any:
    """The state laid on the mesh of a norm; what has its shape, as for each unit, like it."""
    sharding = _sharding_of(norm)
    if sharding is None:
        return state
    whole = NamedSharding(sharding.mesh, _compat.partition_spec())

    def lay(leaf: Any) -> Any:
        is_alike = jnp.shape(leaf) == norm.shape
        if not isinstance(leaf, jax.Array) or (_sharding_of(leaf) and not is_alike):
            return leaf
        put = _compat.reshard if isinstance(leaf, jax.core.Tracer) else jax.device_put
        return put(leaf, sharding if is_alike else whole)

    return jax.tree.map(lay, state)


def _sharding_of(array: Array) -> NamedSharding | None:
    """How an array is sharded over a mesh, as far as it is known here."""
    if not isinstance(array, jax.core.Tracer):
        return array.sharding if isinstance(array.sharding, NamedSharding) else None
    sharding = jax.typeof(array).sharding
    return None if sharding.mesh.empty else sharding


class Alike:
    """Stacks the scalars of a tree that have one dtype, so that one operation serves them.

    Arrays stand alone, for each may be sharded in its own way.
    """

    def __init__(self, tree: Any):
        leaves, self._treedef = jax.tree.flatten(tree)
        groups: dict[Any, list[int]] = {}
        for index, leaf in enumerate(leaves):
            # By nothing that depends on how a leaf is sharded: a state has one structure.
            is_scalar = jnp.ndim(leaf) == 0
            groups.setdefault(leaf.dtype if is_scalar else index, []).append(index)
        self._groups = list(groups.values())

    def stack(self, tree: Any) -> list[Array]:
        """Stacks a tree of the same structure."""
        leaves = up_to(self._treedef, tree)
        return [jnp.stack([leaves[index] for index in group]) for group in self._groups]

    def unstack(self, stacks: list[Array]) -> Any:
        """Undoes `stack`."""
        leaves: list[Any] = [None] * sum(map(len, self._groups))
        for group, stack in zip(self._groups, stacks, strict=True):
            for row, index in enumerate(group):
                leaves[index] = stack[row]
        return jax.tree.unflatten(self._treedef, leaves)
