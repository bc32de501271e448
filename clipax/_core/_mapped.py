"""Which mapped axes a norm sums over.

| program | `axis_name` | type of the leaf | summed over |
|---|---|---|---|
| not mapped, `jit` of sharded arrays too | None, `()` | any | none: XLA adds the shards |
| mapped, no types: `pmap`, `vmap`, `check_vma=False` | None | none | refused |
| the same | names | none | these names |
| `shard_map` | None, names | varies, all axes summed | what it varies over |
| `shard_map` | None | varies, some axes summed | what the state shows, or refused |
| `shard_map` | names | varies, some axes summed | names that it varies over |
| any | `()` | any | none |
| any, at `update` | a name that is not bound | any | refused |
| any, at `init` | a name that is not bound | any | left out: `init` often runs outside |
| explicit axes | any | unreduced | added up before it is measured |

`tests/test_mapped.py` has a test for each row.

A type says that a leaf varies over an axis. It does not say whether the axis divides the units
or what is summed within a unit. A state that was made outside of the program shows it: its
norms vary over the axes that divide the units.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from clipax._core import _compat, _leaves, _paths, _rules
from clipax._core._typing import Array, AxisName, Norm, Norms, Updates

# JAX gives these no types.
_sum_over: Callable[..., Array] = jax.lax.psum


def sharding_axes(
    array: Array, axis_name: Any, summed: Sequence[int] | None
) -> tuple[Hashable, ...]:
    """The mapped axes over which one leaf's sum continues; `summed` is None for all of its axes.

    Raises:
      ValueError: The program does not say which axes those are.
    """
    names = _rules.names_of(axis_name)
    for name in names:
        if name not in _compat.bound_axes():
            raise ValueError(
                f"axis_name {name!r} is not bound here; the mapped axes that are bound:"
                f" {', '.join(map(repr, _compat.bound_axes())) or 'none'}."
            )
    if axis_name is None and (untyped := _compat.untyped_axes()):
        raise ValueError(
            f"This program is mapped over {untyped} without types that say over which axes a leaf"
            " is sharded, so that its norm is unknown. Pass axis_name= with the names of the axes"
            " that shard the leaves, or axis_name=() if the leaves are replicated."
        )
    varying = _compat.varying_axes(array)
    is_partial = summed is not None
    if is_partial and varying and axis_name is None:
        raise ValueError(
            f"A leaf of shape {array.shape} varies over {sorted(map(str, varying))}, and only"
            " some of its axes are summed. Pass axis_name= with the names of the axes that shard"
            " the summed ones, or axis_name=() if none does. A state that is made outside of the"
            " mapped program shows them too."
        )
    shards = {name for name in names if name in varying or not _compat.is_typed(name)}
    if axis_name is None or (names and not is_partial):
        shards |= varying
    return tuple(sorted(shards, key=str))


def bound_here(axis_name: AxisName) -> AxisName:
    """Drops the names that are not bound, because states are often made outside a program."""
    if axis_name is None:
        return None
    bound = _compat.bound_axes()

    def keep(value: Any) -> tuple[Any, ...]:
        return tuple(name for name in _rules.names_of(value) if name in bound)

    return jax.tree.map(keep, axis_name, is_leaf=_rules.is_rule_value)


def with_names(norm: Norm, axis_name: AxisName) -> Norm:
    """The norm as it is called with these names, or without any if None is given."""
    return norm if axis_name is None else functools.partial(norm, axis_name=axis_name)


def takes_axis_name(norm: Norm) -> bool:
    parameters = inspect.signature(norm).parameters.values()
    return any(each.name == "axis_name" or each.kind is each.VAR_KEYWORD for each in parameters)


def summed_according_to(last_norms: Norms, updates: Updates) -> AxisName:
    """The `axis_name` that the norms in a state imply for leaves with units, or None.

    A leaf is summed over those axes that it varies over and the norms of its units do not.
    """
    if _compat.untyped_axes() or not any(jnp.ndim(norm) for norm in jax.tree.leaves(last_norms)):
        return None
    by_path = _paths.by_path(last_norms)
    names = {
        path: _summed_axes(leaf, by_path.get(path))
        for path, leaf in _paths.leaves(updates).items()
    }
    if all(name is None for name in names.values()):
        return None
    return names if isinstance(last_norms, dict) else names[""]


def _summed_axes(leaf: Any, norm: Array | None) -> tuple[Hashable, ...] | None:
    varying = _compat.varying_axes(leaf) if _leaves.is_measured(leaf) else frozenset()
    if norm is None or not norm.ndim or not varying:
        return None
    return tuple(sorted(varying - _compat.varying_axes(norm), key=str))


def may_divide(leaf: Any) -> list[str]:
    """The mapped axes over which a leaf may be a shard of a larger one."""
    axes = _compat.untyped_axes() or _compat.varying_axes(jnp.asarray(leaf))
    return sorted(map(str, axes))


def reduced(tree: Updates) -> Updates:
    """The tree with each unreduced leaf added up over its devices."""
    return jax.tree.map(_reduced, tree)


def _reduced(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    if axes := _compat.unreduced_axes(leaf):
        leaf = _sum_over(leaf, axes)
    spec = _compat.reduced_spec(leaf)
    if spec is None:
        return leaf
    return _compat.reshard(leaf, NamedSharding(jax.typeof(leaf).sharding.mesh, spec))
